"""``python -m bench.checks``: what a packed call costs beside its arithmetic, for its checks and for another width."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import hydravit_kernels as kernels
from bench.measuring.clock import SYSTEM, Clock
from bench.measuring.measure import measure
from bench.measuring.timer import Effort, Timer, quantiles
from bench.measuring.workloads import Workload, default_heads, make_images, make_model
from bench.peers.ours import PEERS
from bench.report.wording import number
from hydravit import HydraViT
from hydravit.cli import parse_heads
from hydravit.config import resolve_config
from hydravit.evaluation.environment import commit, cpu_name
from hydravit.evaluation.latency import with_backend
from hydravit.inference.packed import PackedWeights

_LEAST = 7  # rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for wrong input, or where ``native`` cannot run."""
    parser = argparse.ArgumentParser(prog="python -m bench.checks", description=__doc__.partition(": ")[2])
    parser.add_argument("--config", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--heads", help="the narrowest is checked, all take turns (default: 3,6,12)")
    parser.add_argument("--seconds", type=float, default=30, help="for either measurement (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        config = resolve_config(args.config)
        heads = tuple(parse_heads(args.heads or default_heads(config), config.max_heads))
        kernels.select("native", "cpu", torch.float32)
    except (ValueError, RuntimeError) as error:
        print(f"bench.checks: error: {error}", file=sys.stderr)
        return 2
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}; commit {commit()}")
    print(f"{args.config}, 1 image, native, packed; medians")
    print("\n".join(_cost_of_checks(args.config, heads[0], args.seconds)))
    if len(heads) > 1:
        print(_cost_of_switching(args.config, heads, args.seconds))
    return 0


def _cost_of_checks(config: str, heads: int, seconds: float) -> list[str]:
    workload, cpu = Workload("inference", (heads,), 1, config=config), torch.device("cpu")
    model, images = with_backend(make_model(workload, cpu), "native"), make_images(workload, cpu)
    with torch.inference_mode():
        call = partial(model, images, heads=heads)
        for _ in range(2):  # the second call packs the weights
            call()
        calls, checks = after_calls(call, checks_of(model, images), seconds)
    checks["all checks"] = [sum(parts) for parts in zip(*checks.values(), strict=True)]
    lines = [f"a call at {heads} heads takes {number(quantiles(calls)[1] * 1e3)} ms, of which"]
    for name, times in checks.items():
        low, share, high = quantiles([100 * time / whole for time, whole in zip(times, calls, strict=True)])
        microseconds = number(quantiles(times)[1] * 1e6)
        lines.append(
            f"  {name:12} {microseconds:>5} µs, {share:.3f} % (20th to 80th percentile: {low:.3f} to {high:.3f} %)"
        )
    return lines


def checks_of(model: HydraViT, images: Tensor) -> dict[str, Callable[[], object]]:
    """The questions that every packed call asks of the model, by what they look at."""
    weights = PackedWeights.of(model)
    parameters = model.structure().parameters()
    return {
        "structure": model.structure,
        "contents": lambda: weights.fresh(model, model.structure(look=False).parameters()),
        "derivatives": lambda: kernels.transformed(images, *parameters),
    }


def after_calls(
    call: Callable[[], object], checks: Mapping[str, Callable[[], object]], seconds: float, clock: Clock = SYSTEM
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the seconds of every call, and of every check after it.

    They take turns, because a call leaves the processor's caches as the checks of the next call find them.
    """
    calls: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in checks}
    start = clock.now()
    while len(calls) < _LEAST or clock.now() - start < seconds:
        calls.append(_seconds(call, clock))
        for name, check in checks.items():
            times[name].append(_seconds(check, clock))
    return calls, times


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    start = clock.now()
    run()
    return clock.now() - start


def _cost_of_switching(config: str, heads: Sequence[int], seconds: float) -> str:
    native = next(peer for peer in PEERS if peer.name == "native")
    timer = Timer(torch.device("cpu"), Effort(_LEAST, most=sys.maxsize, seconds=seconds, attempts=1))
    (row,) = measure(Workload("switching", tuple(heads), 1, config=config), [native], timer)
    widths = ", ".join(map(str, heads))
    if row["status"] != "measured":
        return f"another width in every call ({widths} heads) was not measured: {row['reason']}"
    noisy = " (noisy)" if row["noisy"] else ""
    return f"another width in every call ({widths} heads) costs {100 * row['switch_cost'] + 0:+.2f} %{noisy}"


if __name__ == "__main__":
    sys.exit(main())
