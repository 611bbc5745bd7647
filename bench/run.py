"""``python -m bench.run``: workloads times peers, written after every workload. ``hydravit benchmark`` calls it."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench.measuring.clock import SYSTEM
from bench.measuring.dtypes import DTYPES
from bench.measuring.machine import Machine, keep_freed_memory
from bench.measuring.measure import make_row, measure
from bench.measuring.timer import Effort, Timer, Witness
from bench.measuring.workloads import PARTS, default_heads, workloads
from bench.peers.registry import EVERY_PEER
from bench.report.page import page
from bench.report.summary import line, summary
from bench.rows import write_results
from hydravit.cli import parse_heads
from hydravit.config import resolve_config

_DEFAULT_PARTS = "inference"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a share above 100 % or wrong outputs of ours make the results worthless; 2 for wrong input;
    130 when interrupted, after writing what was measured until then."""
    try:
        plan = _Plan(_parser().parse_args(argv))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"hydravit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module=r"torch\.")  # exporters and compilers warn about themselves
    keep_freed_memory()
    rows: list[dict] = []
    interrupted = False
    try:
        run(plan, rows)
    except KeyboardInterrupt:
        interrupted = True
    paths = [*_write(plan, rows), plan.out / f"{plan.name}.html"]
    paths[-1].write_text(page(paths[0]), encoding="utf-8")
    print("\n" + summary(plan.machine.environment(), rows))
    print("wrote", *paths)
    faults = _faults(rows)
    for fault in [*faults, *["interrupted"] * interrupted]:
        print(f"hydravit: error: {fault}", file=sys.stderr)
    return 130 if interrupted else int(bool(faults))


class _Plan:
    """The run that the arguments ask for, and the folder of its results.

    Raises ``ValueError`` for arguments that make no sense, ``OSError`` for a folder that cannot be written.
    """

    def __init__(self, args: argparse.Namespace):
        if args.device not in ("cpu", "cuda"):
            raise ValueError(f"--device {args.device!r}: expected cpu or cuda")
        device = torch.device(args.device)
        gpu = device.type == "cuda"
        if gpu and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device")
        for option in ("threads", "minutes", "rounds", "attempts"):
            value = getattr(args, option)
            if value is not None and not value > 0:
                raise ValueError(f"--{option} must be positive, not {value}")
        if args.seconds < 0:
            raise ValueError(f"--seconds must not be negative, but is {args.seconds}")
        config = resolve_config(args.config)
        parts = _choose("--parts", args.parts, tuple(PARTS))
        heads = parse_heads(args.heads or default_heads(config), config.max_heads)
        batches = args.batch or ("1,8,64,256" if gpu else "1,8")
        if not all(part.isdecimal() and int(part) > 0 for part in batches.split(",")):
            raise ValueError(f"--batch {batches!r}: expected numbers of images such as 1,8")
        dtypes = _choose("--dtype", args.dtype or ("bf16" if gpu else "fp32"), tuple(DTYPES))
        chosen = _choose("--peers", args.peers, tuple(peer.name for peer in EVERY_PEER))
        self.peers = [peer for peer in EVERY_PEER if peer.name in chosen]
        self.workloads = workloads(parts, heads, [int(part) for part in batches.split(",")], dtypes, args.config)
        deadline = SYSTEM.now() + 60 * args.minutes if args.minutes else float("inf")
        effort = Effort(args.rounds, max(args.rounds, 30), args.seconds, args.attempts, deadline=deadline)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.machine = Machine(device, dtypes)
        self.timer = Timer(device, effort, witness=None if gpu else Witness())
        self.name = args.name or ("suite" if args.parts == _DEFAULT_PARTS else args.parts.replace(",", "-"))
        self.out = self.machine.folder(args.out)


def run(plan: _Plan, rows: list[dict]) -> None:
    """Measure, adding to ``rows``. Whatever ends it early, the rows until then are on disk."""
    plan.machine.probe()
    with tqdm(plan.workloads, unit="workload", disable=not sys.stderr.isatty(), leave=False) as bar:
        for workload in bar:
            bar.set_description(str(workload))
            if plan.timer.late():
                rows.extend(make_row(workload, peer, "skipped", "no time left") for peer in plan.peers)
                continue
            start = SYSTEM.now()
            found = measure(workload, plan.peers, plan.timer._replace(progress=bar.set_postfix_str))
            rows.extend(found)
            _write(plan, rows)
            plan.machine.probe()
            bar.write(f"{line(found)}  ({SYSTEM.now() - start:.0f} s)", file=sys.stdout)
            sys.stdout.flush()


def _write(plan: _Plan, rows: list[dict]) -> list[Path]:
    """Write all rows with their shares of the limits that the machine has shown so far.

    A row is also noisy if the machine was slower then than at its best.
    """
    for row in rows:
        row.update(_share(row, plan.machine))
        if plan.timer.witness is not None and plan.timer.witness.slow(row["witness_ms"]):
            row["noisy"] = True
    return write_results(plan.out, plan.name, plan.machine.environment(), rows)


def _share(row: dict, machine: Machine) -> dict:
    if row["p50_ms"] is None:
        return {}
    limit_ms, limit = machine.limit_ms(row["dtype"], row["gflop"] * 1e9, row["mbyte"] * 1e6)
    return {"share": limit_ms / row["p50_ms"], "limit": limit}


def _faults(rows: Sequence[dict]) -> list[str]:
    """Reasons why the results are worthless."""
    faults = []
    for row in rows:
        about = f"{row['peer']}, {row['task']} k={row['heads']} batch {row['batch']} {row['dtype']}"
        if row["share"] is not None and row["share"] > 1.0:
            faults.append(f"{about}: {100 * row['share']:.0f} % of the limit, so the time or the limit is wrong")
        if row["status"] in ("refused", "failed") and row["ours"]:
            faults.append(f"{about}: {row['reason']}")
    return faults


def _choose(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of ``known`` in ``text``, in the order of ``known``; all of them for ``all``. Raises ``ValueError``."""
    if text == "all":
        return known
    named = [part.strip() for part in text.split(",")]
    for name in named:
        if name not in known:
            raise ValueError(f"{option} {text!r}: unknown {name!r}; known: all, {', '.join(known)}")
    return tuple(name for name in known if name in named)


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {peer.name:16} {peer.about}" for peer in EVERY_PEER)
    parts = "\n".join(f"  {name:16} {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="hydravit benchmark",
        description="Measure every width beside the best other tools; writes NAME.json, NAME.csv and NAME.html.",
        epilog=f"parts:\n{parts}\n\npeers:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=_DEFAULT_PARTS, help="see below; or all (default: %(default)s)")
    parser.add_argument("--heads", help="widths such as 3,6,12 or 3-12 (default: 3,6,12)")
    parser.add_argument("--batch", help="images per call (default: 1,8; on a GPU 1,8,64,256)")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)} (default: fp32; on a GPU bf16)")
    parser.add_argument("--config", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of every peer on the CPU (default: torch's)")
    parser.add_argument("--peers", default="all", help="see below (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start nothing new after these; what is left is named as skipped")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="of a workload, or more (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20, help="of rounds, or more (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, metavar="N", help="at a noisy one (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="default: bench/results/ and the machine's name")
    parser.add_argument("--name", help="of the three files (default: suite, or the parts)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a termination too leaves what was measured
    sys.exit(main())
