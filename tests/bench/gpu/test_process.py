"""Real processes: none outlives its command, and ``make gpu`` goes through all of them in a dry run."""

import os
import shutil
import subprocess
import sys

import pytest
from fake_clock import FakeClock

from bench.gpu import __main__ as gpu
from bench.gpu import process


def test_a_command_leaves_its_output_and_exit_code(tmp_path):
    with open(tmp_path / "log", "w") as log:
        assert process.run([sys.executable, "-c", "print('done'); raise SystemExit(3)"], log, 600.0, os.environ) == 3
    assert (tmp_path / "log").read_text() == "done\n"


def test_time_is_up_at_once(tmp_path):
    with open(tmp_path / "log", "w") as log:
        assert process.run(["sleep", "600"], log, 0.0, os.environ) is None


def test_what_a_process_started_ends_with_it():
    """Reading ends only when nobody has the pipe open any more."""
    command = ["sh", "-c", "sh -c 'echo started; sleep 600; echo late' & wait"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stdout.readline() == "started\n"
    process.end(started)
    assert started.stdout.read() == "" and started.returncode < 0


def test_output():
    assert process.output([sys.executable, "-c", "print('text')"]) == "text"
    assert process.output(["/nowhere/nvcc"]) == process.output([sys.executable, "-c", "raise SystemExit(1)"]) == ""


@pytest.mark.long
def test_dry_run(tmp_path, capsys, monkeypatch):
    """On a clock that stands still, so that a busy machine has time enough."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    suite = "--parts inference --config tiny --heads 1 --batch 1 --peers views --rounds 3 --seconds 0.1 --attempts 1"
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--parts", "sanitizer,tests,bench", "--minutes", "60"]
    assert gpu.main([*arguments, "--bench", suite], FakeClock()) == 0
    output = capsys.readouterr().out
    assert "inference" in output  # the suite's own table
    last = [line.split()[:2] for line in output.splitlines()[-4:-1]]
    assert last == [["tests", "nothing"], ["sanitizer", "absent"], ["bench", "passed"]]
    assert "finds no CUDA device" in output
    names = {path.name for path in tmp_path.iterdir()}
    logs = {"tests.log", "sanitizer.log", "bench.log", "report.txt"}
    assert names == logs | {"gpu.json", "gpu.csv", "gpu.html"}  # and build.log: eight
    report = (tmp_path / "report.txt").read_text()
    assert "torch: " in report and "nvidia-smi: " in report and "sanitizer  absent" in report
