"""The parts of ``make gpu``: which commands each part runs, and what their end means."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.measuring.clock import Clock

PARTS = ("build", "tests", "sanitizer", "bench", "tiles", "phases")
MEASURED = PARTS[3:]  # a run has at most one of them
GOOD = ("passed", "absent", "nothing ran")  # the other states: failed, timed out, skipped, stopped
LOG_BYTES, TAIL_LINES = 1_000_000, 40
_SANITIZER_FOUND = 86  # exit code

Run = Callable[..., "int | None"]  # as ``bench.gpu.process.run``


class Outcome(NamedTuple):
    part: str
    state: str
    seconds: float
    why: str = ""


def closing_seconds(minutes: float) -> float:
    """The part of the time that is kept for ending processes, for the report and for the page."""
    return min(30.0, 6.0 * minutes)


def commands(part: str, args: argparse.Namespace, out: Path, seconds: float) -> list[list[str]]:
    """The commands of a part; they run in order until one fails. Raises ``FileNotFoundError`` for a missing program."""
    python = [sys.executable, "-u", "-m"]
    # A test file that cannot be imported is an error, but no reason to run none of the others.
    tests = [*python, "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "gpu and not long"]
    if part == "build":
        install = [*python, "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps"]
        return [[*install, "--no-build-isolation", "-v", "-e", "."], [*python, "hydravit_kernels"]]
    if part == "tests":
        return [tests]
    if part == "sanitizer":
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if program is None:
            raise FileNotFoundError("compute-sanitizer was not found")
        check = [program, "--error-exitcode", str(_SANITIZER_FOUND), "--tool"]
        return [[*check, tool, *tests, "-k", "sanitizer"] for tool in ("memcheck", "racecheck")]
    device = ["--device", args.device]
    # The benchmarks and the search stop by themselves, somewhat late, because they finish what they began.
    minutes = ["--minutes", f"{max(0.8 * seconds - 5, 1) / 60:.3f}"]
    where = ["--out", str(out)]
    if part == "phases":
        return [[*python, "bench.gpu.phases", *device, *shlex.split(args.phases), *where]]
    if part == "tiles":
        return [[*python, "bench.gpu.tiles", *device, *minutes, *shlex.split(args.tiles), *where]]
    suite = [*python, "bench.run", "--parts", "all", *device, *minutes]
    return [[*suite, *shlex.split(args.bench), *where, "--name", "gpu"]]


def run_part(part: str, args: argparse.Namespace, out: Path, seconds: float, clock: Clock, run: Run) -> Outcome:
    """Run a part; its log gets everything that it prints, and the terminal the end of the log."""
    if seconds < 1:
        return Outcome(part, "skipped", 0.0, "no time left")
    print(f"\n== {part}, for at most {seconds:.0f} s", flush=True)
    log, start = out / f"{part}.log", clock.now()
    try:
        steps = commands(part, args, out, seconds)
    except FileNotFoundError as error:
        log.write_text(f"{error}\n")
        return Outcome(part, "absent", 0.0, str(error))
    with open(log, "w", encoding="utf-8", errors="replace") as file:
        for command in steps:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            code = run(command, file, start + seconds - clock.now(), _environment(command, args.device))
            if code != 0:
                break
        # If time was up, the table and the page of what was measured until then are still missing.
        if part == "bench" and code is None and (out / "gpu.json").exists():
            for module in ("bench.report.summary", "bench.report.page"):
                command = [sys.executable, "-m", module, str(out / "gpu.json")]
                run(command, file, closing_seconds(args.minutes) / 2, _environment(command, args.device))
    text = shorten(log)
    print(*text.splitlines()[-TAIL_LINES:], sep="\n", flush=True)
    return Outcome(part, *judge(part, code, text, args.device, clock.now() - start))


def _environment(command: Sequence[str], device: str) -> dict[str, str]:
    environment = {"HYDRAVIT_BUILD": "auto", **os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if "sanitizer" in Path(command[0]).name:
        # With its cache torch makes few large allocations, and an access beyond a tensor stays inside one of them.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def judge(part: str, code: int | None, text: str, device: str, seconds: float) -> tuple[str, float, str]:
    """State, seconds, and for any state but passed the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    refusal = next((line for line in lines if "Device not supported" in line), None)
    if part == "sanitizer" and refusal:
        return "absent", seconds, refusal
    if code is None:
        return "timed out", seconds, "stopped when its time was up"
    if part in ("tests", "sanitizer") and code in (0, 5) and not re.search(r"\b[1-9]\d* passed", text):
        skipped = next((line for line in lines if line.startswith(("SKIPPED", "NOT RUN"))), lines[-1])
        return "failed" if device == "cuda" else "nothing ran", seconds, f"no test ran: {skipped}"
    if code:
        found = "the sanitizer found errors; " if code == _SANITIZER_FOUND else ""
        error = next((line for line in reversed(lines) if re.search(r"\berror\b", line, re.I)), lines[-1])
        return "failed", seconds, f"{found}exit code {code}: {error}"
    return "passed", seconds, ""


def shorten(log: Path) -> str:
    """The text of the log; a log that is too large keeps only its beginning and its end."""
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        half = LOG_BYTES // 2
        content = content[:half] + b"\n[...]\n" + content[-half:]
        log.write_bytes(content)
    return content.decode(errors="replace")
