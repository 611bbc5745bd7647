"""The cost of a subnetwork, counted from its slices."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from hydravit.config import HydraViTConfig
from hydravit.geometry import every_width, parameter_slices
from hydravit.model import HydraViT
from hydravit_kernels import Subnetwork, network_macs


class Cost(NamedTuple):
    """``params``: elements of all weights the subnetwork reads. ``macs``: multiply-accumulates of one image."""

    params: int
    macs: int


def cost(config: HydraViTConfig, subnetwork: Subnetwork, pooled_only: bool = False) -> Cost:
    """Count parameters and multiply-accumulates of one subnetwork.

    As in the ViT literature, attention's products (queries by keys, weights by values) count; norms, softmax, GELU,
    residuals and pooling do not. ``pooled_only`` leaves out the last block's work on tokens that are not pooled.
    """
    macs = network_macs(config.sizes, subnetwork, pooled_only)
    if config.distilled:  # the second classifier
        macs += subnetwork.head.embed * subnetwork.head.classes
    slices = parameter_slices(config, subnetwork)
    params = 0
    for name, shape in _parameter_shapes(config).items():
        read = [sum(length for _, length in axis) for axis in slices.get(name, ())]
        params += math.prod([*read, *shape[len(read) :]])
    return Cost(params, macs)


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: HydraViTConfig) -> dict[str, tuple[int, ...]]:
    model = HydraViT(config, backend="reference", device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def widest_within(model: HydraViT, macs: float) -> int:
    """Return the widest width that a call may name with at most so many multiply-accumulates of an image.

    Raises ``ValueError`` if even the narrowest has more.
    """
    found = {heads: cost(model.config, model.subnetwork(heads)).macs for heads in model.allowed_heads}
    within = [heads for heads, each in found.items() if each <= macs]
    if not within:
        raise ValueError(f"budget {macs:g}: the narrowest width has {min(found.values()):g} multiply-accumulates")
    return max(within, key=found.__getitem__)


def costs(config: HydraViTConfig) -> dict[int, Cost]:
    """Return the cost of every width that the config's nesting method has."""
    return {heads: cost(config, subnetwork) for heads, subnetwork in every_width(config).items()}
