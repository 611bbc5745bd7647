"""``python -m bench.gpu``, or ``make gpu``: everything that needs a GPU, in one command, against one deadline.

It uses what is installed for the Python that runs it; it downloads nothing and makes no environment. A part that fails
or outruns its time is named, and the next part goes on. A part that measures always has half of the time. This command
imports nothing that has to be built, because it builds. ``--device cpu`` is a dry run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import RESULTS
from bench.gpu import process
from bench.gpu.parts import GOOD, MEASURED, PARTS, Outcome, Run, closing_seconds, run_part
from bench.measuring.clock import SYSTEM, Clock

_DEFAULT_PARTS = PARTS[:4]


def main(argv: Sequence[str] | None = None, clock: Clock = SYSTEM, run: Run = process.run) -> int:
    """Exit code 0; 1 if a part failed, was stopped or found no time; 2 for wrong input; 130 when interrupted."""
    args, start = _parser().parse_args(argv), clock.now()
    facts = _facts()
    try:
        parts = _check(args, facts)
    except ValueError as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 2
    out = Path(args.out or RESULTS / _slug(facts, args.device)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline, outcomes, code = start + 60 * args.minutes - closing_seconds(args.minutes), [], 0
    try:
        for part in parts:
            left = deadline - clock.now()
            reserve = 30 * args.minutes if part not in MEASURED and {*MEASURED} & {*parts} else 0.0
            outcomes.append(run_part(part, args, out, left - reserve, clock, run))
            _write_report(out, facts, outcomes)
    except KeyboardInterrupt:
        outcomes.append(Outcome(part, "stopped", 0.0, "interrupted"))
        code = 130
    for unfinished in out.glob("*.part"):
        unfinished.unlink()
    _write_report(out, facts, outcomes)
    print(f"\n{_table(outcomes)}\n{len(list(out.iterdir()))} files in {out}", flush=True)
    return code or int(any(outcome.state not in GOOD for outcome in outcomes))


def _facts() -> dict[str, str]:
    """The environment, for the report. Another process asks torch, so that this one holds nothing on the GPU."""
    facts = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "triton", "numpy", "timm", "onnxruntime", "openvino", "nvtx"):
        found = importlib.util.find_spec(name) is not None
        facts[name] = importlib.metadata.version(name) if found else "not installed"
    if gpu := process.output([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]):
        facts["gpu"] = gpu
    fields = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    smi = process.output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"])
    facts["nvidia-smi"] = smi or "not available"
    facts["nvcc"] = (process.output(["nvcc", "--version"]) or "not available").splitlines()[-1]
    return facts


def _slug(facts: dict[str, str], device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-") if device == "cuda" else "cpu-dry-run"


def _check(args: argparse.Namespace, facts: dict[str, str]) -> list[str]:
    """The parts in the order in which they run. Raises ``ValueError`` for arguments that cannot be met."""
    named = [part.strip() for part in args.parts.split(",")]
    for part in named:
        if part not in PARTS:
            raise ValueError(f"--parts {args.parts!r}: unknown {part!r}; known: {', '.join(PARTS)}")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, not {args.minutes}")
    if facts["torch"] == "not installed":
        raise ValueError(f"{sys.executable} cannot import torch")
    if args.device == "cuda" and "gpu" not in facts:
        raise ValueError(f"torch {facts['torch']} finds no CUDA device (--device cpu is a dry run)")
    if len({*MEASURED} & {*named}) > 1:
        raise ValueError(f"--parts {args.parts!r}: one of {', '.join(MEASURED)}: each wants the time that is left")
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
    )
    known = f"of {', '.join(PARTS)} (default: %(default)s)"
    parser.add_argument("--parts", default=",".join(_DEFAULT_PARTS), help=known)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="default: bench/results/ and the GPU's name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    for part, module in (("bench", "bench.run"), ("phases", "bench.gpu.phases"), ("tiles", "bench.gpu.tiles")):
        parser.add_argument(
            f"--{part}", default="", metavar="ARGUMENTS", help=f"more arguments for {module}, in quotes"
        )
    return parser


def _interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # so that a termination ends the part's processes too
    sys.exit(main())
