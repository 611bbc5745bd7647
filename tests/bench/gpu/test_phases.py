"""``python -m bench.gpu.phases``: what it measures, on the emulator, and its table of times."""

import pytest
import torch
from small import SMALL_CUDA

from bench.gpu import phases


def phase(name, tile, microseconds, count=1, planned=False):
    return {
        "name": name, "tile": tile, "count": count, "planned": planned, "blocks": 7, "microseconds": microseconds,
    }  # fmt: skip


def test_the_table_adds_up_and_names_what_is_faster():
    times = [
        phase("stem", "32x64", 4.0, planned=True), phase("stem", "128x64", 5.0),
        phase("fc2", "32x32", 3.0, count=11), phase("fc2", "32x64", 2.5, count=11, planned=True),
        phase("fc2", "32x32", 1.0), phase("fc2", "32x64", 2.0, planned=True),
        phase("attention", "", 2.0, count=11, planned=True), phase("attention", "", 1.5, planned=True),
    ]  # fmt: skip
    lines = phases.table({"heads": 3, "batch": 1, "call": 70.0, "phases": times}).splitlines()
    assert lines[0] == "k=3, batch 1: a call takes 70.0 us, its phases 57.0, with the fastest tiles 56.0"
    assert len(lines) == 6
    assert lines[1].split() == ["stem", "1", "x", "32x64", "7", "blocks", "4.00", "us"]
    assert lines[2].endswith("27.5 us") and lines[3].endswith("2.00 us  32x32 would take 1.00")
    assert lines[4].endswith("22.0 us") and lines[5].endswith("1.50 us")


def test_wrong_input(capsys):
    assert phases.main(["--device", "cpu"]) == 2
    assert "the CUDA network has no kernels for device 'cpu'" in capsys.readouterr().err


@pytest.mark.long
def test_phases_are_timed_in_every_shape(cuda_on_the_cpu, capsys):
    """The emulator's times mean nothing. Every phase is there, with the planned tile among the others."""
    args = phases._parser().parse_args(["--repeats", "1", "--dtype", "bf16", "--device", "cpu"])
    args.config = SMALL_CUDA
    (call,) = phases.measure(args, torch.device("cpu"), [2], [2])
    groups = phases._by_phase(call["phases"])
    assert groups[0][0] == "stem" and groups[-1][0] == "head"
    # The last of the two layers computes the class token only, so most of its phases are unlike the first layer's.
    assert sum(shapes[0]["count"] for _, shapes in groups) == 2 + 5 * SMALL_CUDA.depth
    for name, shapes in groups:
        assert [shape["planned"] for shape in shapes].count(True) == 1, name
        assert (len(shapes) > 1) == (name != "attention")
        assert all(shape["microseconds"] > 0 for shape in shapes)
    assert call["call"] > 0 and "k=2, batch 2: a call takes" in capsys.readouterr().out
