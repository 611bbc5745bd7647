"""``python -m bench.run``: workloads times peers, written after every workload. ``hydravit benchmark`` calls it."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import page, results, tables
from bench.machine import Machine
from bench.measure import measure, measure_copies, measure_memory, row
from bench.peers import Peer, peers
from bench.timer import Effort
from bench.workloads import DTYPES, PARTS, Workload, workloads
from hydravit.cli import parse_heads
from hydravit.config import resolve_config

_EXAMPLES = """examples:
  hydravit benchmark                                     # k=3,6,12 at batch 1 and 8 beside every peer; minutes
  hydravit benchmark --heads 3-12                        # every width
  hydravit benchmark --parts blocks,training --batch 16 --peers views,native,native-inplace
  hydravit benchmark --parts all --minutes 30 --out runs/bench
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a share above 100 % or wrong outputs of ours make the results worthless; 2 for wrong input."""
    try:
        plan = _Plan(_parser().parse_args(argv))
    except (ValueError, TypeError) as error:
        print(f"hydravit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    torch.set_num_threads(plan.threads)
    warnings.filterwarnings("ignore", module=r"torch\.")  # the exporters' and compilers' own affairs
    rows, machine = run(plan)
    paths = [*results.write(plan.out, plan.name, machine.environment(), rows), plan.out / f"{plan.name}.html"]
    paths[-1].write_text(page.page([paths[0]]), encoding="utf-8")
    print("\n" + tables.summary(machine.environment(), rows))
    print("wrote", *paths)
    faults = _faults(rows)
    for fault in faults:
        print(f"hydravit: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


class _Plan:
    """What the arguments ask for. Raises ``ValueError`` for what makes no sense."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device")
        gpu = self.device.type == "cuda"
        config = resolve_config(args.config)
        self.threads = args.threads or torch.get_num_threads()
        self.parts = _choose("--parts", args.parts, PARTS)
        heads = args.heads or ",".join(str(k) for k in (3, 6, 12) if k <= config.max_heads)
        self.heads = parse_heads(heads, config.max_heads)
        batches = args.batch or ("1,8,64,256" if gpu else "1,8")
        if not all(part.isdecimal() and int(part) > 0 for part in batches.split(",")):
            raise ValueError(f"--batch {batches!r}: expected numbers of images such as 1,8")
        self.batches = [int(part) for part in batches.split(",")]
        self.dtypes = _choose("--dtype", args.dtype or ("bf16" if gpu else "fp32"), tuple(DTYPES))
        known = peers()
        chosen = _choose("--peers", args.peers, tuple(peer.name for peer in known))
        self.peers = [peer for peer in known if peer.name in chosen]
        self.workloads = workloads(self.parts, self.heads, self.batches, self.dtypes, args.config)
        deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self.effort = Effort(args.rounds, max(args.rounds, 30), args.seconds, args.attempts, deadline)
        self.out = Path(args.out) if args.out else None
        self.name = args.name


def run(plan: _Plan) -> tuple[list[dict], Machine]:
    """Measure; rows and the machine they belong to. Whatever ends it early, what was measured is on disk."""
    machine = Machine(plan.device, plan.dtypes)
    plan.out = plan.out or Path(__file__).with_name("results") / machine.slug
    rows: list[dict] = []
    machine.probe()
    with tqdm(plan.workloads, unit="workload", disable=not sys.stderr.isatty(), leave=False) as bar:
        for workload in bar:
            bar.set_description(str(workload))
            if time.monotonic() > plan.effort.deadline:
                rows.extend(row(workload, peer, "skipped", "no time left") for peer in plan.peers)
                continue
            start = time.monotonic()
            found = _measure(workload, plan.peers, plan, lambda text: bar.set_postfix_str(text))
            machine.probe()
            rows.extend(found)
            for entry in rows:
                entry.update(_share(entry, machine))
            results.write(plan.out, plan.name, machine.environment(), rows)
            bar.write(f"{tables.line(found)}  ({time.monotonic() - start:.0f} s)", file=sys.stdout)
            sys.stdout.flush()
    return rows, machine


def _measure(workload: Workload, peers: Sequence[Peer], plan: _Plan, progress) -> list[dict]:
    if workload.task == "memory":
        return measure_memory(workload, peers, plan.device, progress)
    if workload.task == "copies":
        return measure_copies(workload, peers, plan.device, progress)
    return measure(workload, peers, plan.device, plan.effort, progress)


def _share(entry: dict, machine: Machine) -> dict:
    """Of the limit that the machine has shown so far."""
    if entry["p50_ms"] is None:
        return {}
    limit_ms, limit = machine.limit_ms(entry["dtype"], entry["gflop"] * 1e9, entry["mbyte"] * 1e6)
    return {"share": limit_ms / entry["p50_ms"], "limit": limit}


def _faults(rows: Sequence[dict]) -> list[str]:
    """What makes the results worthless."""
    faults = []
    for entry in rows:
        about = f"{entry['peer']}, {entry['task']} k={entry['heads']} batch {entry['batch']} {entry['dtype']}"
        if entry["share"] is not None and entry["share"] > 1.0:
            faults.append(f"{about}: {100 * entry['share']:.0f} % of the limit, so the time or the limit is wrong")
        if entry["status"] in ("refused", "failed") and entry["ours"]:
            faults.append(f"{about}: {entry['reason']}")
    return faults


def _choose(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Of ``known`` those that are named, in its order; ``all``: all. Raises ``ValueError`` for others."""
    if text == "all":
        return known
    named = [part.strip() for part in text.split(",")]
    for name in named:
        if name not in known:
            raise ValueError(f"{option} {text!r}: unknown {name!r}; known: all, {', '.join(known)}")
    return tuple(name for name in known if name in named)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hydravit benchmark",
        description="Measure every width beside the best other tools; writes NAME.json, NAME.csv and NAME.html.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", default="inference,switching,copies", help=f"of {', '.join(PARTS)}; or all (default: %(default)s)"
    )
    parser.add_argument("--heads", help="widths such as 3,6,12 or 3-12 (default: 3,6,12)")
    parser.add_argument("--batch", help="images per call (default: 1,8; on a GPU 1,8,64,256)")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)} (default: fp32; on a GPU bf16)")
    parser.add_argument("--config", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="on the CPU, of every peer (default: torch's)")
    parser.add_argument("--peers", default="all", help="names, as in the tables (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun; the rest is named")
    parser.add_argument("--rounds", type=int, default=7, help="at least, per workload (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of rounds, at least (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, help="while the spread is too large (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="default: bench/results/ and the machine's name")
    parser.add_argument("--name", default="suite", help="of the files (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
