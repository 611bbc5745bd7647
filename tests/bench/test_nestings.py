"""``python -m bench.nestings``: what is compared with what."""

import re

import pytest
import torch

from bench import nestings
from hydravit.config import CONFIGS, resolve_config

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = resolve_config("tiny", image_size=32, depth=2, max_heads=4)


def test_times_are_compared_at_equal_costs():
    """Scala's subnetworks cost what HydraViT's of their width do; SKD's lie between two of them."""
    nested, others = nestings.subnetworks(CONFIG)
    times = {(name, way): [2.0 * k, 4.0 * k] for k, name in enumerate(nested, 1) for way in nestings.WAYS}
    times |= {(name, "in place"): [3.0, 9.0] for name in others}
    rows = [re.split(r"\s{2,}", line.strip()) for line in nestings.table(CONFIG, nested, others, times).splitlines()]
    found = {name: float(x) for name, *_, x, _ in rows[1:]}
    assert found["Scala 0.25, first part"] == round((3 / 2 + 9 / 4) / 2, 2)
    assert found["Scala 0.75, last part per role"] == round((3 / 6 + 9 / 12) / 2, 2)
    assert (3 / 6 + 9 / 12) / 2 > found["SKD 0.75"] > (3 / 8 + 9 / 16) / 2


def test_values_between_points():
    points = [(1.0, 10.0), (2.0, 30.0), (4.0, 40.0)]
    assert [nestings._between(points, x) for x in (0.5, 1.0, 1.5, 3.0, 5.0)] == [0.0, 10.0, 20.0, 35.0, 45.0]
    assert nestings._between([(1.0, 7.0)], 3.0) == 7.0


@pytest.mark.needs("backend native")
def test_it_runs(monkeypatch, capsys):
    monkeypatch.setitem(CONFIGS, "tiny", CONFIG)
    assert nestings.main(["--config", "tiny", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{torch.get_num_threads()} threads" in lines[0]
    served = [line for line in lines[3:] if " packed " in line]
    assert len(lines[3:]) == len(served) + 12 and served
    assert nestings.main(["--config", "enormous"]) == 2
