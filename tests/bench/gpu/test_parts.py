"""``make gpu`` with processes and clock replaced: parts that fail, outrun their time or are not there."""

import shutil

import pytest
from fake_clock import FakeClock

from bench.gpu import __main__ as gpu
from bench.gpu import parts


class Machine:
    """Replaces processes and clock.

    ``steps``: by a word of the command what it prints, its seconds and its exit code. Any other command passes at once.
    """

    def __init__(self, **steps):
        self.clock, self.steps, self.limits = FakeClock(), steps, {}

    def run(self, command, log, seconds, environment):
        name = next((word for word in command if word in self.steps), command[3])
        text, takes, code = self.steps.get(name, ("1 passed", 0.0, 0))
        self.limits[name] = seconds
        log.write(text + "\n")
        self.clock.sleep(min(takes, seconds))
        return None if takes > seconds else code

    def main(self, out, wanted, *, minutes=1, device="cpu", options=()):
        arguments = ["--device", device, "--out", str(out), "--parts", wanted, "--minutes", str(minutes), *options]
        return gpu.main(arguments, self.clock, self.run)


@pytest.fixture(autouse=True)
def facts(monkeypatch):
    monkeypatch.setattr(gpu, "_facts", lambda: {"torch": "2.11.0"})


def test_a_part_that_fails(tmp_path, capsys):
    """The next part goes on, the part's second command does not."""
    machine = Machine(pip=("error: no compiler", 0.0, 3), hydravit_kernels=("never", 0.0, 0))
    assert machine.main(tmp_path, "build,tests") == 1
    output = capsys.readouterr().out
    assert "never" not in output
    assert "build      failed" in output and "exit code 3: error: no compiler" in output
    assert "tests      passed" in output


def test_a_part_that_outruns_its_time(tmp_path, capsys):
    """What it printed is kept, and the part that measures still has its half of the 60 s, less 6 s to close."""
    machine = Machine(pytest=("half a line", 1000.0, 0))
    assert machine.main(tmp_path, "tests,bench") == 1
    output = capsys.readouterr().out
    assert "tests      timed out      24.0 s" in output and "bench      passed" in output
    assert "half a line" in (tmp_path / "tests.log").read_text()
    assert machine.limits == {"pytest": 24.0, "bench.run": 30.0}


def test_a_part_that_measures_gets_the_time_that_the_others_left(tmp_path):
    machine = Machine(pytest=("2 passed", 4.0, 0))
    assert machine.main(tmp_path, "tests,tiles") == 0
    assert machine.limits == {"pytest": 24.0, "bench.gpu.tiles": 50.0}


def test_what_was_measured_is_drawn_where_time_was_up(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    (tmp_path / "gpu.json.part").write_text("{")
    machine = Machine(**{"bench.run": ("inference", 1000.0, 0), "bench.report.page": ("wrote it", 1.0, 0)})
    assert machine.main(tmp_path, "bench") == 1
    assert "bench      timed out" in capsys.readouterr().out
    assert machine.limits["bench.report.page"] == 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.log", "gpu.json", "report.txt"]


def test_no_time_left(tmp_path, capsys):
    assert Machine().main(tmp_path, "tests,bench", minutes=0.01) == 1
    assert "no time left" in capsys.readouterr().out


def test_an_interrupted_run_is_reported(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    machine = Machine()
    machine.run = interrupt
    assert machine.main(tmp_path, "tests") == 130
    assert "tests      stopped" in (tmp_path / "report.txt").read_text()


def test_commands(tmp_path, monkeypatch):
    """Options reach the part; the sanitizer runs twice, and is absent where it is not installed."""
    options = ["--bench=--heads 3-12", "--device", "cpu", "--minutes", "1"]
    args = gpu._parser().parse_args(options)
    (suite,) = parts.commands("bench", args, tmp_path, 50.0)
    assert suite[3:] == ["bench.run", *"--parts all --device cpu --minutes 0.583 --heads 3-12".split()] + [
        "--out", str(tmp_path), "--name", "gpu",
    ]  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/usr/bin/compute-sanitizer")
    assert [command[4] for command in parts.commands("sanitizer", args, tmp_path, 50.0)] == ["memcheck", "racecheck"]
    assert parts._environment(["/usr/bin/compute-sanitizer"], "cuda")["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert parts._environment(["python"], "cpu")["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert Machine().main(tmp_path, "sanitizer") == 0
    assert "sanitizer  absent" in (tmp_path / "report.txt").read_text()


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
    assert parts.judge(part, code, text, device, 1.0)[0] == state


def test_a_long_log_keeps_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LOG_BYTES", 100)
    log = tmp_path / "part.log"
    log.write_text("first\n" + "x" * 1000 + "\nlast\n")
    text = parts.shorten(log)
    assert text.startswith("first") and text.endswith("last\n") and len(text) < 120
    assert log.read_text() == text


@pytest.mark.parametrize(
    ("wanted", "settings", "message"),
    [
        ("tests,lunch", {}, "unknown 'lunch'; known: build, tests, sanitizer, bench, tiles, phases"),
        ("bench,tiles", {}, "one of bench, tiles, phases"),
        ("tests", {"minutes": 0}, "--minutes must be positive"),
        ("tests", {"device": "cuda"}, "finds no CUDA device"),
    ],
)
def test_wrong_input(tmp_path, capsys, wanted, settings, message):
    assert Machine().main(tmp_path / "out", wanted, **settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
