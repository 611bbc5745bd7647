"""``make gpu`` without a GPU: a dry run of the whole script, and parts that fail, hang or are not there."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from bench import gpu

SUITE = "--parts inference --config tiny --heads 1 --batch 1 --peers views --rounds 3 --seconds 0.1 --attempts 1"


def dry(out, *arguments, parts="tests,bench", minutes=1):
    return gpu.main(
        ["--device", "cpu", "--out", str(out), "--parts", parts, "--minutes", str(minutes), *map(str, arguments)]
    )


@pytest.fixture
def commands(monkeypatch):
    """Python code per part, in place of what it would run."""
    chosen = {}
    monkeypatch.setattr(gpu, "commands", lambda part, *_: [[sys.executable, "-u", "-c", code] for code in chosen[part]])
    monkeypatch.setattr(gpu, "_facts", lambda: {"torch": "any"})
    return chosen


def test_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert dry(tmp_path, "--bench", SUITE, parts="sanitizer,tests,bench", minutes=4) == 0
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


def test_a_part_that_fails(tmp_path, capsys, commands):
    """The next one goes on, a part's second command does not."""
    commands.update(
        build=["print('error: no compiler'); raise SystemExit(3)", "print('never')"], tests=["print('1 passed')"]
    )
    assert dry(tmp_path, parts="build,tests") == 1
    output = capsys.readouterr().out
    assert "never" not in output
    assert "build      failed" in output and "exit code 3: error: no compiler" in output
    assert "tests      passed" in output


def test_a_part_that_outruns_its_time(tmp_path, capsys, commands):
    """It is stopped with its children, what it printed is kept, and the suite still has its half."""
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); "
    commands.update(tests=[child + "import time; time.sleep(60)"], bench=["print('suite')"])
    start = time.monotonic()
    assert dry(tmp_path, minutes=0.4) == 1
    assert time.monotonic() - start < 18
    output = capsys.readouterr().out
    assert "tests      timed out" in output and "bench      passed" in output
    state = Path("/proc", (tmp_path / "tests.log").read_text().split()[-1], "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # ended, though perhaps nobody asked for its code


def test_no_time_left(tmp_path, capsys, commands):
    assert dry(tmp_path, minutes=0.01) == 1
    assert "no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "code", "text", "device", "state"),
    [
        ("tests", 0, "3 passed, 1 skipped in 1.0s", "cuda", "passed"),
        ("tests", 0, "SKIPPED [3] no GPU\n18 skipped in 0.1s", "cuda", "failed"),
        ("tests", 5, "NOT RUN [3] for want of GPU\n18 deselected in 0.1s", "cpu", "nothing ran"),
        ("tests", 5, "no tests ran", "cuda", "failed"),
        ("tests", 1, "1 failed, 2 passed", "cuda", "failed"),
        ("sanitizer", 1, "========= Error: Device not supported. Please refer to", "cuda", "absent"),
        ("sanitizer", 86, "2 passed\n========= ERROR SUMMARY: 1 error", "cuda", "failed"),
        ("sanitizer", 0, "2 passed\n========= ERROR SUMMARY: 0 errors", "cuda", "passed"),
        ("bench", None, "half a line", "cuda", "timed out"),
        ("bench", 0, "", "cuda", "passed"),
    ],
)
def test_what_an_end_means(part, code, text, device, state):
    assert gpu._judge(part, code, text, device, 1.0)[0] == state


def test_a_long_log_keeps_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 100)
    log = tmp_path / "part.log"
    log.write_text("first\n" + "x" * 1000 + "\nlast\n")
    text = gpu._shorten(log)
    assert text.startswith("first") and text.endswith("last\n") and len(text) < 120
    assert log.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tests,lunch"], "unknown 'lunch'; known: build, tests, sanitizer, bench, tiles, phases"),
        (["--parts", "bench,tiles"], "one of bench, tiles, phases"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--device", "cuda"], "finds no CUDA device"),
    ],
)
def test_wrong_input(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(gpu, "_facts", lambda: {"torch": "2.11.0"})
    assert dry(tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
