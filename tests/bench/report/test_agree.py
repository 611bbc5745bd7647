"""The comparison of two runs, with invented results."""

import json

import pytest

from bench.report.agree import main
from bench.rows import COLUMNS, write_results


@pytest.fixture
def run(tmp_path):
    """Writes a run in which the peer "views" has these pairs of ratio and noisy; returns its path."""
    names = iter("abcdef")

    def write(*pairs):
        rows = [
            {**dict.fromkeys(COLUMNS), "peer": "views", "batch": batch, "ratio": ratio, "noisy": noisy}
            for batch, (ratio, noisy) in enumerate(pairs)
        ]
        return str(write_results(tmp_path, next(names), {}, rows)[0])

    return write


def test_the_same_run_agrees(run):
    path = run((1.2, False), (1.5, True))
    assert main([path, path]) == 0


def test_most_ratios_must_agree(run, capsys):
    assert main([run((1.0, True), (2.0, True)), run((1.1, True), (2.2, False))]) == 1
    assert "10 % apart, marked noisy" in capsys.readouterr().out


@pytest.mark.parametrize(("noisy", "code"), [(True, 0), (False, 1)])
def test_a_ratio_that_is_apart_must_be_noisy(run, noisy, code):
    others = [(2.0, False)] * 11
    assert main([run((2.0, False), *others), run((3.0, noisy), *others)]) == code


def test_runs_with_nothing_in_common(run, tmp_path):
    (tmp_path / "empty.json").write_text(json.dumps({"environment": {}, "rows": []}))
    assert main([run((1.0, False)), str(tmp_path / "empty.json")]) == 2
