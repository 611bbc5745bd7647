"""``python -m bench.gpu.tiles``: what it tries, which tiles it takes, and what it writes."""

import json
import os
import subprocess
import sys

import pytest
from fake_clock import FakeClock

from bench import ROOT
from bench.gpu import tiles
from hydravit_kernels import backends
from hydravit_kernels.triton import launch

FIRST = launch.Tiles(64, 64, 32, 4, 2)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Makes a search in which a candidate takes ``cost(tiles)`` seconds."""
    monkeypatch.setattr(backends, "report", lambda device: {"triton": "available"})
    monkeypatch.setattr(tiles, "Reference", lambda *_: None)
    table = {"product": {2: FIRST, 4: FIRST}}
    monkeypatch.setattr(launch, "tile_table", lambda device: table)
    clock = FakeClock()

    def make(cost):
        def prepare(self, workloads, *_):
            cost(table["product"][4])  # may refuse the candidate
            return [lambda: clock.sleep(cost(table["product"][4])) for _ in workloads]

        monkeypatch.setattr(tiles.Search, "_prepare", prepare)
        options = ["--device", "cpu", "--dtype", "fp32", "--problems", "product", "--config", "tiny", "--rounds", "3"]
        return tiles.Search(tiles._parser().parse_args([*options, "--out", str(tmp_path)]), clock)

    make.table = table
    return make


def test_neighbours_change_one_number():
    found = list(tiles.neighbours(FIRST))
    assert len(set(found)) == len(found) == 10
    for other in found:
        changed = [(a, b) for a, b in zip(FIRST, other, strict=True) if a != b]
        assert len(changed) == 1
    assert all(other.k_step == 0 for other in tiles.neighbours(FIRST._replace(k_step=0)))  # attention has no such axis
    assert all(other.rows >= 16 for other in tiles.neighbours(FIRST._replace(rows=16)))  # the least of a product


def test_the_fastest_is_found_step_by_step(search):
    """Two steps away, past candidates that do not fit; the table is as it was, and every candidate has a row."""

    def cost(t):
        if t.rows * t.columns > 128 * 64:
            raise RuntimeError("out of shared memory")
        return 2e-3 * (64 / t.rows + 4 / t.warps)

    run = search(cost)
    run.run()
    best = run.best["product", "fp32"]
    assert (best.rows, best.warps) == (128, 16)
    assert search.table["product"][4] == FIRST
    rows = json.loads(run.path.read_text())["rows"]
    refused = [row for row in rows if row["reason"]]
    assert refused and all("out of shared memory" in row["reason"] and row["sum_ms"] is None for row in refused)
    assert [row["rows"] for row in rows if row["table"]] == [FIRST.rows]
    assert "times as fast as the table's" in run.summary() and str(best) in run.summary()


def test_tiles_that_do_not_run_are_no_result(search):
    def cost(t):
        raise RuntimeError("refused by the compiler")

    run = search(cost)
    run.run()
    assert run.best == {("product", "fp32"): None}
    assert "not measured: RuntimeError: refused by the compiler" in run.summary()


def test_on_the_interpreter(tmp_path):
    """The real kernels, on a clock by which the time is up after the first candidate, the table's own."""
    code = """
import sys
from bench.gpu.tiles import main
from fake_clock import FakeClock
sys.exit(main(sys.argv[1:], FakeClock(tick=10.0)))
"""
    command = [sys.executable, "-c", code, "--device", "cpu", "--dtype", "fp32", "--config", "tiny", "--heads", "1"]
    command += ["--batch", "1", "--rounds", "1", "--problems", "attention", "--minutes", "0.3", "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "tiles.json").read_text())["rows"]
    assert row["table"] and row["sum_ms"] > 0 and row["reason"] == ""
    assert "1 of 1 candidates ran" in result.stdout


def test_wrong_input(capsys):
    assert tiles.main(["--device", "cpu"]) == 2
    assert "triton runs on a CPU only on Triton's interpreter" in capsys.readouterr().err
