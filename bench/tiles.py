"""``python -m bench.tiles``: which tile sizes of the Triton kernels are the fastest on this GPU.

From the tiles of hydravit_kernels/triton/launch.py to the fastest neighbour (one number doubled or halved) while it is
faster, problem by problem. What counts is the sum of the times of all widths, as the width chooses no tiles; nobody is
timed whose outputs are wrong. Writes tiles.json after every round and prints what the table should say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import results
from bench.check import Reference
from bench.machine import Machine, precision
from bench.measure import one_line
from bench.peers import Step
from bench.peers.ours import PEERS
from bench.timer import Effort, captured, interleave, quantiles
from bench.workloads import DTYPES, Workload, default_heads, make_model, make_stream
from hydravit.cli import parse_heads
from hydravit.config import resolve_config
from hydravit_kernels import backends

# The block task whose time tells about a problem's tiles.
TASKS = {
    "product": "mlp",
    "gelu_backward": "mlp_backward",
    "gradient": "mlp_backward",
    "attention": "attention",
    "attention_backward": "attention_backward",
}
GAIN = 1.01  # a neighbour that is faster by less is not better
_LIMITS = {"rows": (16, 256), "columns": (16, 256), "depth": (16, 128), "warps": (1, 16), "stages": (1, 8)}
_EXAMPLES = """examples:
  python -m bench.tiles                                  # every problem in bf16, k=3,6,12 at batch 64
  python -m bench.tiles --problems product,gradient --dtype bf16,tf32 --minutes 8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where the table's own tiles do not run; 2 for wrong input; 130 when interrupted."""
    try:
        search = Search(_parser().parse_args(argv))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench.tiles: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    interrupted = False
    try:
        search.run()
    except KeyboardInterrupt:
        interrupted = True
    print(f"\n{search.summary()}\nwrote {search.path}")
    return 130 if interrupted else int(any(best is None for best in search.best.values()))


def neighbours(tiles) -> Iterator:
    """Of ``Tiles``: one number doubled or halved, within what a kernel can be compiled for."""
    for field, (least, most) in _LIMITS.items():
        value = getattr(tiles, field)
        nearby = (value - 1, value + 1) if field == "stages" else (value // 2, value * 2)
        for other in nearby:
            if value and least <= other <= most:
                yield tiles._replace(**{field: other})


class Search:
    """Best tiles per problem and dtype. ``rows``: every candidate, with its time or why it has none. ``best``: per
    problem and dtype the tiles, None where the table's own did not run."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        reason = backends.report(self.device)["triton"]
        if reason != "available":
            raise RuntimeError(f"triton {reason}")
        self.config, config = args.config, resolve_config(args.config)
        self.heads = parse_heads(args.heads or default_heads(config), config.max_heads)
        self.problems = [(problem, dtype) for dtype in args.dtype.split(",") for problem in args.problems.split(",")]
        for problem, dtype in self.problems:
            if problem not in TASKS or dtype not in DTYPES:
                raise ValueError(f"{problem} in {dtype}: known are {', '.join(TASKS)}; {', '.join(DTYPES)}")
        if args.batch < 1 or args.rounds < 1 or not args.minutes > 0:
            raise ValueError("--batch, --rounds and --minutes must be positive")
        self.batch, self.deadline = args.batch, time.monotonic() + 60 * args.minutes
        self.effort = Effort(args.rounds, args.rounds, 0.0, attempts=2)
        self.machine = Machine(self.device, [])
        folder = Path(args.out) if args.out else Path(__file__).with_name("results") / self.machine.slug
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "tiles.json"
        self.rows: list[dict] = []
        self.best: dict[tuple[str, str], object] = {}

    def run(self) -> None:
        with tqdm(self.problems, unit="problem", disable=not sys.stderr.isatty(), leave=False) as bar:
            for i, (problem, dtype) in enumerate(bar):
                bar.set_description(f"{problem} {dtype}")
                now = time.monotonic()
                if now < self.deadline:  # an equal share of what is left, for each that is left
                    self.effort = self.effort._replace(deadline=now + (self.deadline - now) / (len(self.problems) - i))
                    self._climb(problem, dtype, bar.set_postfix_str)

    def _climb(self, problem: str, dtype: str, progress: Callable[[str], None]) -> None:
        from hydravit_kernels.triton import launch

        table = launch.table(self.device)[problem]
        size = DTYPES[dtype].itemsize
        best = first = table[size]
        self.best[problem, dtype] = None
        known: dict = {}
        with precision(dtype):
            workloads = [Workload(TASKS[problem], (k,), self.batch, dtype, self.config) for k in self.heads]
            model = make_model(workloads[0], self.device)
            references = [Reference(workload, model) for workload in workloads]
            while True:
                # The table's own in every round: what is compared was measured in the same minutes.
                new = (tiles for tiles in neighbours(best) if tiles not in known)
                candidates = list(dict.fromkeys([best, first, *new]))
                ready = {}
                for i, tiles in enumerate(candidates):
                    progress(f"{i + 1} of {len(candidates)}")
                    with _using(table, size, tiles):
                        try:
                            ready[tiles] = self._prepare(workloads, model, references)
                        except Exception as error:  # too much shared memory, a compiler's refusal, wrong outputs
                            known[tiles] = None
                            self._note(problem, dtype, tiles, reason=one_line(error))
                    if time.monotonic() > self.effort.deadline:
                        break
                if best not in ready:
                    return
                self.best[problem, dtype] = best
                for tiles, times in self._time(ready, table, size, progress).items():
                    known[tiles] = times
                    self._note(problem, dtype, tiles, times=times, table=tiles == first)
                del ready
                fastest = min((t for t in candidates if known.get(t)), key=lambda t: sum(known[t]))
                if sum(known[best]) < GAIN * sum(known[fastest]):
                    return
                best = self.best[problem, dtype] = fastest
                if time.monotonic() > self.effort.deadline:
                    return

    def _prepare(self, workloads: Sequence[Workload], model, references: Sequence[Reference]) -> list[Step]:
        """A closure per width, compiled and right. Raises whatever a candidate raises."""
        steps = []
        for workload, reference in zip(workloads, references, strict=True):
            (k,), (kind, _, backward) = workload.heads, workload.task.partition("_")
            peer = next(peer for peer in PEERS if peer.name == "triton")
            x, grad = make_stream(workload, self.device)
            step = peer.block(model, kind, k, x, grad if backward else None)
            reference.check(k, step.outputs())
            steps.append(captured(step.run, self.device) if self.device.type == "cuda" else step.run)
        return steps

    def _time(self, ready: dict, table: dict, size: int, progress: Callable[[str], None]) -> dict:
        """Milliseconds per width, by tiles. A graph has its tiles in it; a call asks for them every time."""

        def call(tiles, run):
            with _using(table, size, tiles):
                run()

        def closure(tiles, run):
            return run if self.device.type == "cuda" else lambda: call(tiles, run)

        closures = {(t, i): closure(t, run) for t, runs in ready.items() for i, run in enumerate(runs)}
        times = interleave(closures, self.device, self.effort, progress=progress)
        medians = {name: quantiles(found.samples)[1] for name, found in times.items()}
        return {tiles: [medians[tiles, i] for i in range(len(runs))] for tiles, runs in ready.items()}

    def _note(
        self, problem: str, dtype: str, tiles, times: Sequence[float] = (), reason: str = "", table=False
    ) -> None:
        """A row, to disk at once; a candidate that was timed in a later round too has the later one."""
        about = {"problem": problem, "dtype": dtype, **tiles._asdict()}
        self.rows = [row for row in self.rows if {key: row[key] for key in about} != about]
        by_width = dict(zip(map(str, self.heads), times, strict=False))
        total = sum(times) if times else None
        self.rows.append({**about, "table": table, "ms": by_width, "sum_ms": total, "reason": reason})
        facts = {"batch": self.batch, "config": self.config}
        content = {"environment": self.machine.environment() | facts, "rows": self.rows}
        results.replace(self.path, json.dumps(content, indent=1) + "\n")

    def summary(self) -> str:
        """A line per problem: the best tiles, beside those of the table."""
        lines = []
        for problem, dtype in self.problems:
            best = self.best.get((problem, dtype))
            own = [row for row in self.rows if (row["problem"], row["dtype"]) == (problem, dtype)]
            timed = {tuple(row[field] for field in _LIMITS): row["sum_ms"] for row in own if row["sum_ms"]}
            if best is None or tuple(best) not in timed:
                reason = own[0]["reason"] if own else "no time left"
                lines.append(f"{problem:20} {dtype:5} not measured: {reason}")
                continue
            start = next(row["sum_ms"] for row in own if row["table"])
            found = f"{len(timed)} of {len(own)} candidates ran"
            faster = f"{start / timed[tuple(best)]:.2f} times as fast as the table's"
            lines.append(f"{problem:20} {dtype:5} {best}: {timed[tuple(best)]:.3f} ms, {faster}; {found}")
        return "\n".join(lines)


@contextlib.contextmanager
def _using(table: dict, size: int, tiles) -> Iterator[None]:
    before, table[size] = table[size], tiles
    try:
        yield
    finally:
        table[size] = before


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tiles",
        description="Find the fastest tile sizes of the Triton kernels on this GPU; writes tiles.json.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--problems", default=",".join(TASKS), help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", help=f"of {', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--heads", help="widths such as 3,6,12 or 3-12 (default: 3,6,12)")
    parser.add_argument("--batch", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument("--config", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda; cpu on Triton's interpreter, for tests")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of a comparison (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new candidates after these (default: 8)")
    parser.add_argument("--out", metavar="FOLDER", help="default: bench/results/ and the machine's name")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
