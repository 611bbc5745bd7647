"""``python -m bench.gpu.phases``: where the time of a call of the CUDA engine goes, and which tiles would be faster.

Every phase of a chain is timed by itself, the layers in turns, in every shape that its tiles can have.
csrc/cuda/plan.cpp chooses among these by estimates: where a row names a better tile, an estimate is wrong. If a call
takes longer than the sum of its phases, the rest is waiting between them; if it takes less, they overlap. The command
writes phases.json after every call.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence

import torch

import hydravit_kernels as kernels
from bench.measuring.dtypes import DTYPES
from bench.measuring.machine import Machine
from bench.measuring.timer import Effort, Timer, quantiles
from bench.measuring.workloads import Workload, default_heads, make_images, make_model
from bench.report.wording import number
from bench.rows import replace_file
from hydravit.cli import parse_heads
from hydravit.config import resolve_config
from hydravit.inference import make_network

_DTYPES = {**{name: DTYPES[name] for name in ("bf16", "fp16")}, "e4m3": torch.float8_e4m3fn}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for wrong input, or if there is no engine."""
    args = _parser().parse_args(argv)
    try:
        device = torch.device(args.device)
        if reason := kernels.CudaNetwork.why_not(device):
            raise RuntimeError(f"the CUDA network {reason}")
        config = resolve_config(args.config)
        heads = parse_heads(args.heads or default_heads(config), config.max_heads)
        batches = [int(batch) for batch in args.batch.split(",")]
        if min(*batches, args.repeats) < 1 or args.dtype not in _DTYPES:
            raise ValueError(f"--batch and --repeats must be positive, --dtype one of {', '.join(_DTYPES)}")
        machine = Machine(device, [])
        path = machine.folder(args.out) / "phases.json"
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench.gpu.phases: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    calls = []
    environment = machine.environment() | {"config": args.config, "dtype": args.dtype, "loader": args.loader}
    for call in measure(args, device, heads, batches):
        calls.append(call)
        replace_file(path, json.dumps({"environment": environment, "calls": calls}, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


def measure(args: argparse.Namespace, device: torch.device, heads: Sequence[int], batches: Sequence[int]):
    """Per width and batch the time of a call and of its phases, in microseconds; also printed at once."""
    stored = "fp16" if args.dtype == "e4m3" else args.dtype
    model = make_model(Workload("inference", tuple(heads), max(batches), stored, args.config), device)
    network = make_network(model, _DTYPES[args.dtype], max(batches), args.loader)
    for k in heads:
        for batch in batches:
            images = make_images(Workload("inference", (k,), batch, stored, args.config), device)
            subnetwork = model.subnetwork(k)
            run = {"call": lambda images=images, subnetwork=subnetwork: network.run(images, (subnetwork,))}
            times = Timer(device, Effort(args.repeats, args.repeats, 0.0, attempts=1)).interleave(run)
            call = 1e3 * quantiles(times["call"].samples)[1]
            phases = [time._asdict() for time in network.time_phases(images, subnetwork, args.repeats)]
            result = {"heads": k, "batch": batch, "call": call, "phases": phases}
            print(f"\n{table(result)}", flush=True)
            yield result


def table(call: dict) -> str:
    """A line per kind of phase: the planned tile, and another where it is faster."""
    lines, total, best_total = [], 0.0, 0.0
    for name, shapes in _by_phase(call["phases"]):
        planned = next(shape for shape in shapes if shape["planned"])
        best = min(shapes, key=lambda shape: shape["microseconds"])
        time, least = (shape["count"] * shape["microseconds"] for shape in (planned, best))
        total, best_total = total + time, best_total + least
        better = "" if best is planned else f"{best['tile']} would take {number(least)}"
        about = f"{name:16} {planned['count']:3} x {planned['tile']:8} {planned['blocks']:5} blocks"
        lines.append(f"{about} {number(time):>8} us  {better}".rstrip())
    head = f"k={call['heads']}, batch {call['batch']}: a call takes {number(call['call'])} us"
    sums = f"its phases {number(total)}, with the fastest tiles {number(best_total)}"
    return "\n".join([f"{head}, {sums}", *lines])


def _by_phase(phases: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Phases, each with all its shapes.

    The shapes of one phase follow each other; a shape that comes again begins another phase of the same name.
    """
    groups: list[tuple[str, list[dict]]] = []
    for phase in phases:
        if not groups or groups[-1][0] != phase["name"] or phase["tile"] in [s["tile"] for s in groups[-1][1]]:
            groups.append((phase["name"], []))
        groups[-1][1].append(phase)
    return groups


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.phases",
        description="Time every phase of the CUDA engine, in every shape of its tiles; writes phases.json.",
    )
    parser.add_argument("--heads", help="widths such as 3,6,12 or 3-12 (default: 3,6,12)")
    parser.add_argument("--batch", default="1,8", help="images per call (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", help=f"of {', '.join(_DTYPES)} (default: %(default)s)")
    parser.add_argument("--loader", default="best", help="best, or async: the way of sm_80 (default: %(default)s)")
    parser.add_argument("--config", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="of every phase (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="default: bench/results/ and the machine's name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
