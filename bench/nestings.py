"""``python -m bench.nestings``: the time of other methods' subnetworks beside HydraViT's of as many operations."""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

import hydravit_kernels as kernels
from bench.measuring.timer import Effort, Timer, quantiles
from bench.measuring.workloads import Workload, make_images, make_model
from bench.report.wording import number
from hydravit import HydraViTConfig, geometry
from hydravit.config import resolve_config
from hydravit.evaluation.cost import cost
from hydravit.evaluation.environment import commit, cpu_name
from hydravit.evaluation.latency import with_backend
from hydravit.evaluation.report import aligned
from hydravit_kernels import CpuNetwork, Subnetwork

SHARES = (0.25, 0.5, 0.75)
WAYS = ("packed", "in place")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for wrong input, or where ``native`` cannot run."""
    parser = argparse.ArgumentParser(prog="python -m bench.nestings", description=__doc__.partition(": ")[2])
    parser.add_argument("--config", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        config = resolve_config(args.config)
        kernels.select("native", "cpu", torch.float32)
    except (ValueError, RuntimeError) as error:
        print(f"bench.nestings: error: {error}", file=sys.stderr)
        return 2
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}; commit {commit()}")
    print(
        f"{args.config}, 1 image, native; medians; x: times as long as HydraViT's width of as many GMACs, the same way"
    )
    nested, others = subnetworks(config)
    print(table(config, nested, others, _times(args.config, {**nested, **others}, args.seconds)))
    return 0


def subnetworks(config: HydraViTConfig) -> tuple[dict[str, Subnetwork], dict[str, Subnetwork]]:
    """Return every width of HydraViT, and those of the other methods at ``SHARES`` that the model has."""
    nested = {f"HydraViT {k}": geometry.hydravit(config, k) for k in range(1, config.max_heads + 1)}
    others = {}
    for share in SHARES:
        embed, channels = int(share * config.embed), int(share * config.head_dim)
        for name, options in (
            ("first part", {"suffix": False}),
            ("last part", {"suffix": True}),
            ("last part per role", {"suffix": True, "per_role": True}),
        ):
            others[f"Scala {share:g}, {name}"] = geometry.scala(config, embed, **options)
        lengths = [(channels, int(share * config.hidden))] * config.depth
        others[f"SKD {share:g}"] = geometry.skd(config, lengths)
    return nested, others


@torch.inference_mode()
def _times(config: str, named: Mapping[str, Subnetwork], seconds: float) -> dict[tuple[str, str], list[float]]:
    """Return the milliseconds of every subnetwork by its name and way, as many for each, all in turns.

    Only what packed weights serve is measured packed.
    """
    workload, cpu = Workload("inference", (1,), 1, config=config), torch.device("cpu")
    packed, images = with_backend(make_model(workload, cpu), "native"), make_images(workload, cpu)
    in_place = copy.copy(packed)
    in_place.packed_inference = None
    closures: dict[tuple[str, str], Callable[[], object]] = {}
    for way, (name, subnetwork) in itertools.product(WAYS, named.items()):
        if way == "in place" or not CpuNetwork.why_not(subnetwork):
            closures[name, way] = partial(in_place if way == "in place" else packed, images, heads=subnetwork)
    for call in (*closures.values(), *closures.values()):  # the second call packs the weights
        call()
    timer = Timer(cpu, Effort(most=sys.maxsize, seconds=seconds, attempts=1))
    return {key: times.samples for key, times in timer.interleave(closures).items()}


def table(
    config: HydraViTConfig,
    nested: Mapping[str, Subnetwork],
    others: Mapping[str, Subnetwork],
    times: Mapping[tuple[str, str], Sequence[float]],
) -> str:
    """Return a row per other subnetwork and way: milliseconds, and their ratio to HydraViT's between two widths.

    The ratio is that of every round, with HydraViT's time interpolated between the widths of fewer and of more GMACs.
    """
    gmacs = {name: cost(config, each).macs / 1e9 for name, each in {**nested, **others}.items()}
    rows = []
    for name, way in itertools.product(others, WAYS):
        if (name, way) not in times:
            continue
        ratios = []
        for i, ms in enumerate(times[name, way]):
            ratios.append(ms / _between([(gmacs[k], times[k, way][i]) for k in nested], gmacs[name]))
        low, ratio, high = quantiles(ratios)
        ms = quantiles(list(times[name, way]))[1]
        rows.append([name, way, f"{gmacs[name]:.3g}", number(ms), f"{ratio:.2f}", f"{low:.2f}-{high:.2f}"])
    return aligned(["subnetwork", "way", "GMACs", "ms", "x", "20-80 %"], rows)


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at ``x`` on the line between the neighbours among ``(x, value)``, ascending."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right or right == points[-1][0]:
            return low + (high - low) * (x - left) / (right - left)
    return points[0][1]  # there is one width


if __name__ == "__main__":
    sys.exit(main())
