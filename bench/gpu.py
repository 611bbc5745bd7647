"""``python -m bench.gpu``, or ``make gpu``: everything that needs a GPU, in one command, against one deadline.

It uses what is installed for the Python that runs it: nothing is downloaded and no environment is made. A part that
fails or outruns its time is named, and the next goes on; what measures always has half of the time. Imports nothing of
ours: it runs before anything is built. ``--device cpu`` is a dry run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "tests", "sanitizer", "bench", "tiles", "phases")
_DEFAULT_PARTS = PARTS[:4]
_MEASURED = PARTS[3:]  # one of them has half of the time, whatever became of the parts before
GOOD = ("passed", "absent", "nothing ran")  # the other states: failed, timed out, skipped, stopped
LOG_BYTES, TAIL_LINES = 1_000_000, 40
_SANITIZER_FOUND = 86  # exit code

_EXAMPLES = """examples:
  make gpu                                               # 8 minutes, results to bench/results/ and the GPU's name
  make gpu PARTS=build,tests MINUTES=3 OUT=/tmp/gpu
  make gpu PARTS=build,tiles                             # look for better tile sizes of the Triton kernels
  make gpu PARTS=build,phases                            # where the CUDA engine's time goes
  python -m bench.gpu --parts bench --bench "--dtype fp32 --heads 3-12"
  python -m bench.gpu --parts tests,bench --device cpu --minutes 1 --bench "--config tiny"
"""


class Outcome(NamedTuple):
    part: str
    state: str
    seconds: float
    why: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a part failed, was stopped or found no time; 2 for wrong input; 130 when interrupted."""
    args, start = _parser().parse_args(argv), time.monotonic()
    facts = _facts()
    try:
        parts = _check(args, facts)
    except ValueError as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 2
    out = Path(args.out or ROOT / "bench" / "results" / _slug(facts, args.device)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline, outcomes, code = start + 60 * args.minutes - _closing_seconds(args), [], 0
    try:
        for part in parts:
            left = deadline - time.monotonic()
            reserve = 30 * args.minutes if part not in _MEASURED and {*_MEASURED} & {*parts} else 0.0
            outcomes.append(_run_part(part, args, out, left - reserve))
            _write_report(out, facts, outcomes)
    except KeyboardInterrupt:
        outcomes.append(Outcome(part, "stopped", 0.0, "interrupted"))
        code = 130
    for unfinished in out.glob("*.part"):
        unfinished.unlink()
    _write_report(out, facts, outcomes)
    print(f"\n{_table(outcomes)}\n{len(list(out.iterdir()))} files in {out}", flush=True)
    return code or int(any(outcome.state not in GOOD for outcome in outcomes))


def _closing_seconds(args: argparse.Namespace) -> float:
    """Of the deadline, for ending what has to be ended, for the report and the page."""
    return min(30.0, 6.0 * args.minutes)


def commands(part: str, args: argparse.Namespace, out: Path, seconds: float) -> list[list[str]]:
    """What a part runs, one after the other until one fails. Raises ``FileNotFoundError`` for what is not there."""
    python = [sys.executable, "-u", "-m"]
    # What cannot be imported there is an error, but no reason to run nothing.
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
    if part == "phases":
        return [[*python, "bench.phases", "--device", args.device, *shlex.split(args.phases), "--out", str(out)]]
    # Both of the others stop by themselves, somewhat late: what was begun is finished.
    minutes = ["--minutes", f"{max(0.8 * seconds - 5, 1) / 60:.3f}"]
    if part == "tiles":
        return [
            [*python, "bench.tiles", "--device", args.device, *minutes, *shlex.split(args.tiles), "--out", str(out)]
        ]
    suite = [*python, "bench.run", "--parts", "all", "--device", args.device, *minutes]
    return [[*suite, *shlex.split(args.bench), "--out", str(out), "--name", "gpu"]]


def _run_part(part: str, args: argparse.Namespace, out: Path, seconds: float) -> Outcome:
    """Run it, with everything it prints in its log and the log's end on the terminal."""
    if seconds < 1:
        return Outcome(part, "skipped", 0.0, "no time left")
    print(f"\n== {part}, for at most {seconds:.0f} s", flush=True)
    log, start = out / f"{part}.log", time.monotonic()
    try:
        steps = commands(part, args, out, seconds)
    except FileNotFoundError as error:
        log.write_text(f"{error}\n")
        return Outcome(part, "absent", 0.0, str(error))
    with open(log, "w", errors="replace") as file:
        for command in steps:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            code = _run(command, file, start + seconds - time.monotonic(), args.device)
            if code != 0:
                break
        # The table and the page of what was measured are still to come, if anything was.
        if part == "bench" and code is None and (out / "gpu.json").exists():
            for module in ("bench.tables", "bench.page"):
                _run(
                    [sys.executable, "-m", module, str(out / "gpu.json")], file, _closing_seconds(args) / 2, args.device
                )
    text = _shorten(log)
    print(*text.splitlines()[-TAIL_LINES:], sep="\n", flush=True)
    return Outcome(part, *_judge(part, code, text, args.device, time.monotonic() - start))


def _run(command: Sequence[str], log, seconds: float, device: str) -> int | None:
    """The exit code; None where time was up. No process of its own outlives it."""
    environment = {
        "HYDRAVIT_BUILD": "auto",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        # Otherwise the sanitizer sees torch's few large allocations, and what is beyond a tensor is inside one of them.
        **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in Path(command[0]).name else {}),
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge(part: str, code: int | None, text: str, device: str, seconds: float) -> tuple[str, float, str]:
    """State, seconds and the reason of any state but passed."""
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


def _shorten(log: Path) -> str:
    """What the log says, of one that is too large its beginning and its end."""
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        half = LOG_BYTES // 2
        content = content[:half] + b"\n[...]\n" + content[-half:]
        log.write_bytes(content)
    return content.decode(errors="replace")


def _facts() -> dict[str, str]:
    """The environment, for the report; in processes of their own, so that this one holds nothing on the GPU."""
    code = """
import importlib.metadata, json, platform, torch
facts = {"python": platform.python_version(), "system": platform.platform(), "torch": torch.__version__}
for name in ("triton", "numpy", "timm", "onnxruntime", "openvino", "nvtx"):
    try:
        facts[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        facts[name] = "not installed"
if torch.cuda.is_available():
    facts["gpu"] = torch.cuda.get_device_name()
print(json.dumps(facts))
"""
    facts = json.loads(_output([sys.executable, "-c", code]) or "{}")
    fields = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    facts["nvidia-smi"] = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]) or "not available"
    facts["nvcc"] = (_output(["nvcc", "--version"]) or "not available").splitlines()[-1]
    return facts


def _output(command: Sequence[str]) -> str:
    """Of a command; empty where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _slug(facts: dict[str, str], device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-") if device == "cuda" else "cpu-dry-run"


def _check(args: argparse.Namespace, facts: dict[str, str]) -> list[str]:
    """The parts, in the order of a run. Raises ``ValueError`` for what cannot be run."""
    named = [part.strip() for part in args.parts.split(",")]
    for part in named:
        if part not in PARTS:
            raise ValueError(f"--parts {args.parts!r}: unknown {part!r}; known: {', '.join(PARTS)}")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, not {args.minutes}")
    if "torch" not in facts:
        raise ValueError(f"{sys.executable} cannot import torch")
    if args.device == "cuda" and "gpu" not in facts:
        raise ValueError(f"torch {facts['torch']} finds no CUDA device (--device cpu is a dry run)")
    if len({*_MEASURED} & {*named}) > 1:
        raise ValueError(f"--parts {args.parts!r}: one of {', '.join(_MEASURED)}: each wants the time that is left")
    return [part for part in PARTS if part in named]


def _write_report(out: Path, facts: dict[str, str], outcomes: Sequence[Outcome]) -> None:
    lines = [f"{name}: {value}" for name, value in facts.items()]
    (out / "report.txt").write_text("\n".join([*lines, "", _table(outcomes)]) + "\n")


def _table(outcomes: Sequence[Outcome]) -> str:
    return "\n".join(f"{o.part:10} {o.state:12} {o.seconds:6.1f} s  {o.why:.200}".rstrip() for o in outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Build, run the GPU tests and the compute sanitizer, and measure; leaves at most 8 files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = f"of {', '.join(PARTS)} (default: %(default)s)"
    parser.add_argument("--parts", default=",".join(_DEFAULT_PARTS), help=known)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="default: bench/results/ and the GPU's name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--bench", default="", metavar="ARGUMENTS", help="more arguments for bench.run, in quotes")
    parser.add_argument("--phases", default="", metavar="ARGUMENTS", help="more arguments for bench.phases, in quotes")
    parser.add_argument("--tiles", default="", metavar="ARGUMENTS", help="more arguments for bench.tiles, in quotes")
    return parser


def _interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # ends the part's processes too
    sys.exit(main())
