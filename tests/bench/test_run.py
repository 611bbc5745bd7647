"""A whole run on a tiny network: what it writes, when it fails, and which arguments it refuses."""

import csv

import pytest
import torch

from bench.measuring import machine, measure
from bench.measuring.machine import Machine
from bench.rows import read_results
from bench.run import main

pytestmark = pytest.mark.usefixtures("one_thread")
ARGUMENTS = "--config tiny --heads 1,3 --batch 1 --peers authors,views,native --rounds 2 --seconds 0 --attempts 1"


@pytest.fixture(scope="module", autouse=True)
def limits():
    """The machine's limits are short to measure, and so high that a busy machine reaches no share of 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_PROBE_SECONDS", 0.0)
        patch.setattr(Machine, "limit_ms", lambda *_: (1e-6, "peak"))
        yield


@pytest.fixture(scope="module")
def finished(limits, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    parts = ["--parts", "inference,switching,copies", "--name", "suite"]
    assert main([*ARGUMENTS.split(), *parts, "--out", str(out)]) == 0
    return out


def test_a_run_writes_rows_that_stand_alone(finished):
    environment, rows = read_results(finished / "suite.json")
    assert {row["task"] for row in rows} == {"inference", "switching", "copies"}
    assert all(row["status"] == "measured" for row in rows), [row["reason"] for row in rows]
    with open(finished / "suite.csv") as file:
        flat = list(csv.DictReader(file))
    assert len(flat) == len(rows)
    assert all(row["torch"] == torch.__version__ and row["threads"] == str(torch.get_num_threads()) for row in flat)
    timed = [row for row in rows if row["task"] == "inference"]
    assert all(0 < row["share"] <= 1 and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in timed)
    assert all((row["ratio"] is None) == (row["peer"] == "native") for row in timed)
    assert "<html" in (finished / "suite.html").read_text()


def test_an_impossible_share_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "limit_ms", lambda *_: (1e6, "peak"))
    assert main([*ARGUMENTS.replace("1,3", "1").split(), "--out", str(tmp_path)]) == 1
    assert "% of the limit" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_measure_copies", interrupt)
    assert main([*ARGUMENTS.split(), "--parts", "inference,copies", "--out", str(tmp_path)]) == 130
    _, rows = read_results(tmp_path / "inference-copies.json")
    assert len(rows) == 6 and (tmp_path / "inference-copies.html").exists()


def test_workloads_without_time_are_named(tmp_path):
    assert main([*ARGUMENTS.split(), "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    _, rows = read_results(tmp_path / "suite.json")
    assert {row["status"] for row in rows} == {"skipped"} and len(rows) == 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--parts speed", "--parts 'speed'"),
        ("--heads 13", "the model has the widths 1..12"),
        ("--batch 0", "--batch '0'"),
        ("--dtype int8", "--dtype 'int8'"),
        ("--peers nobody", "--peers 'nobody'"),
        ("--config huge", "huge"),
        ("--device cuda", "no CUDA device"),
        ("--device cuda:1", "expected cpu or cuda"),
        ("--device meta", "expected cpu or cuda"),
        ("--threads -1", "--threads must be positive"),
        ("--minutes 0", "--minutes must be positive"),
        ("--rounds 0", "--rounds must be positive"),
        ("--seconds -1", "--seconds must not be negative"),
        ("--out /proc/nowhere", "/proc/nowhere"),
    ],
)
def test_wrong_input_is_named(arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err
