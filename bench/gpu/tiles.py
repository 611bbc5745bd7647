"""``python -m bench.gpu.tiles``: which tile sizes of the Triton kernels are the fastest on this GPU.

Problem by problem, the search goes from the tiles of hydravit_kernels/triton/launch.py to the fastest neighbour (one
number doubled or halved) as long as that is faster. It compares the sum of the times of all widths, because one table
serves all widths. Tiles with wrong outputs are not timed. It writes tiles.json after every round and prints what the
table should contain.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from bench.measuring.check import Reference
from bench.measuring.clock import SYSTEM, Clock
from bench.measuring.cuda_graph import captured
from bench.measuring.dtypes import DTYPES, precision
from bench.measuring.machine import Machine
from bench.measuring.prepare import one_line
from bench.measuring.timer import Effort, Timer, quantiles
from bench.measuring.workloads import Workload, default_heads, make_model, make_residual
from bench.peers.ours import PEERS
from bench.rows import replace_file
from hydravit.cli import parse_heads
from hydravit.config import resolve_config
from hydravit_kernels import backends

# The block task whose time depends on a problem's tiles.
TASKS = {
    "product": "mlp",
    "gelu_backward": "mlp_backward",
    "gradient": "mlp_backward",
    "attention": "attention",
    "attention_backward": "attention_backward",
}
GAIN = 1.01  # a neighbour that is faster by less is not better
_LIMITS = {"rows": (16, 256), "columns": (16, 256), "k_step": (16, 128), "warps": (1, 16), "stages": (1, 8)}


def main(argv: Sequence[str] | None = None, clock: Clock = SYSTEM) -> int:
    """Exit code 0; 1 if the table's own tiles do not run; 2 for wrong input; 130 when interrupted."""
    try:
        search = Search(_parser().parse_args(argv), clock)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench.gpu.tiles: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    interrupted = False
    try:
        search.run()
    except KeyboardInterrupt:
        interrupted = True
    print(f"\n{search.summary()}\nwrote {search.path}")
    return 130 if interrupted else int(any(best is None for best in search.best.values()))


def neighbours(tiles) -> Iterator:
    """``tiles`` with one number doubled or halved, within the sizes for which a kernel can be compiled."""
    for field, (least, most) in _LIMITS.items():
        value = getattr(tiles, field)
        nearby = (value - 1, value + 1) if field == "stages" else (value // 2, value * 2)
        for other in nearby:
            if value and least <= other <= most:
                yield tiles._replace(**{field: other})


class Search:
    """The search for the best tiles per problem and dtype.

    ``rows``: every candidate, with its time or why it has none. ``best``: per problem and dtype the tiles, None if the
    table's own did not run.
    """

    def __init__(self, args: argparse.Namespace, clock: Clock):
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
        self.batch, self.deadline = args.batch, clock.now() + 60 * args.minutes
        self.timer = Timer(self.device, Effort(args.rounds, args.rounds, 0.0, attempts=2), clock)
        self.machine = Machine(self.device, [])
        self.path = self.machine.folder(args.out) / "tiles.json"
        self.rows: list[dict] = []
        self.best: dict[tuple[str, str], object] = {}

    def run(self) -> None:
        with tqdm(self.problems, unit="problem", disable=not sys.stderr.isatty(), leave=False) as bar:
            for i, (problem, dtype) in enumerate(bar):
                bar.set_description(f"{problem} {dtype}")
                now = self.timer.clock.now()
                if now < self.deadline:  # the problems that are left share the time that is left
                    effort = self.timer.effort._replace(deadline=now + (self.deadline - now) / (len(self.problems) - i))
                    self._climb(problem, dtype, self.timer._replace(effort=effort, progress=bar.set_postfix_str))

    def _climb(self, problem: str, dtype: str, timer: Timer) -> None:
        from hydravit_kernels.triton import launch

        table = launch.tile_table(self.device)[problem]
        size = DTYPES[dtype].itemsize
        best = first = table[size]
        self.best[problem, dtype] = None
        known: dict = {}
        with precision(dtype):
            workloads = [Workload(TASKS[problem], (k,), self.batch, dtype, self.config) for k in self.heads]
            model = make_model(workloads[0], self.device)
            references = [Reference(workload, model) for workload in workloads]
            while True:
                # The table's own are in every round, so that all times that are compared are of the same minutes.
                new = (tiles for tiles in neighbours(best) if tiles not in known)
                candidates = list(dict.fromkeys([best, first, *new]))
                ready = {}
                for i, tiles in enumerate(candidates):
                    timer.progress(f"{i + 1} of {len(candidates)}")
                    with _using(table, size, tiles):
                        try:
                            ready[tiles] = self._prepare(workloads, model, references)
                        except Exception as error:  # too much shared memory, a compiler's refusal, wrong outputs
                            known[tiles] = None
                            self._note(problem, dtype, tiles, reason=one_line(error))
                    if timer.late():
                        break
                if best not in ready:
                    return
                self.best[problem, dtype] = best
                for tiles, times in self._time(ready, table, size, timer).items():
                    known[tiles] = times
                    self._note(problem, dtype, tiles, times=times, table=tiles == first)
                del ready
                fastest = min((t for t in candidates if known.get(t)), key=lambda t: sum(known[t]))
                if sum(known[best]) < GAIN * sum(known[fastest]):
                    return
                best = self.best[problem, dtype] = fastest
                if timer.late():
                    return

    def _prepare(self, workloads: Sequence[Workload], model, references: Sequence[Reference]) -> list[Callable]:
        """A closure per width, compiled, with right outputs. Raises whatever a candidate raises."""
        steps = []
        for workload, reference in zip(workloads, references, strict=True):
            (k,), (kind, _, backward) = workload.heads, workload.task.partition("_")
            peer = next(peer for peer in PEERS if peer.name == "triton")
            x, grad = make_residual(workload, self.device)
            step = peer.block(model, kind, k, x, grad if backward else None)
            reference.check(k, step.outputs())
            steps.append(captured(step.run, self.device) if self.device.type == "cuda" else step.run)
        return steps

    def _time(self, ready: dict, table: dict, size: int, timer: Timer) -> dict:
        """Milliseconds per width, by tiles. A graph contains its tiles; a call looks them up every time."""

        def call(tiles, run):
            with _using(table, size, tiles):
                run()

        def closure(tiles, run):
            return run if self.device.type == "cuda" else lambda: call(tiles, run)

        closures = {(t, i): closure(t, run) for t, runs in ready.items() for i, run in enumerate(runs)}
        times = timer.interleave(closures)
        medians = {name: quantiles(found.samples)[1] for name, found in times.items()}
        return {tiles: [medians[tiles, i] for i in range(len(runs))] for tiles, runs in ready.items()}

    def _note(
        self, problem: str, dtype: str, tiles, times: Sequence[float] = (), reason: str = "", table=False
    ) -> None:
        """Write a row to disk at once; it replaces the candidate's row of an earlier round."""
        about = {"problem": problem, "dtype": dtype, **tiles._asdict()}
        self.rows = [row for row in self.rows if {key: row[key] for key in about} != about]
        by_width = dict(zip(map(str, self.heads), times, strict=False))
        total = sum(times) if times else None
        self.rows.append({**about, "table": table, "ms": by_width, "sum_ms": total, "reason": reason})
        facts = {"batch": self.batch, "config": self.config}
        content = {"environment": self.machine.environment() | facts, "rows": self.rows}
        replace_file(self.path, json.dumps(content, indent=1) + "\n")

    def summary(self) -> str:
        """A line per problem: the best tiles, beside the table's."""
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
        prog="python -m bench.gpu.tiles",
        description="Find the fastest tile sizes of the Triton kernels on this GPU; writes tiles.json.",
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
