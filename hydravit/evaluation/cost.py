"""The cost of a subnetwork, counted from its slices."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from hydravit.config import HydraViTConfig
from hydravit.geometry import every_width, parameter_slices
from hydravit.model import HydraViT
from hydravit_kernels import AttentionSlice, MlpSlice, Subnetwork


class Cost(NamedTuple):
    """``params``: elements of all weights the subnetwork reads. ``macs``: multiply-accumulates of one image."""

    params: int
    macs: int


def cost(config: HydraViTConfig, subnetwork: Subnetwork, pooled_only: bool = False) -> Cost:
    """Count parameters and multiply-accumulates of one subnetwork.

    As in the ViT literature, attention's products (queries by keys, weights by values) count; norms, softmax, GELU,
    residuals and pooling do not. ``pooled_only`` leaves out the last block's work on tokens that are not pooled.
    """
    tokens, embed = config.tokens, subnetwork.embed.embed
    macs = math.prod(config.grid) * embed * config.in_channels * config.patch_size**2
    macs += sum(attention_macs(tokens, attention) for attention in subnetwork.attention)
    macs += sum(mlp_macs(tokens, mlp) for mlp in subnetwork.mlp)
    macs += embed * subnetwork.head.classes
    if pooled_only:
        attention, mlp = subnetwork.attention[-1], subnetwork.mlp[-1]
        keys, values = attention.heads * attention.head_dim, attention.heads * attention.value_dim
        unpooled = config.prefix_tokens if config.pool == "avg" else tokens - 1
        macs -= unpooled * ((embed + tokens) * (keys + values) + 2 * embed * mlp.hidden)  # all but key and value

    slices = parameter_slices(config, subnetwork)
    params = 0
    for name, shape in _parameter_shapes(config).items():
        read = [sum(length for _, length in axis) for axis in slices.get(name, ())]
        params += math.prod([*read, *shape[len(read) :]])
    return Cost(params, macs)


def attention_macs(tokens: int, attention: AttentionSlice) -> int:
    """Count the multiply-accumulates of one attention block on one image."""
    keys, values = attention.heads * attention.head_dim, attention.heads * attention.value_dim
    products = tokens * attention.embed * (2 * keys + 2 * values)  # Q and K; V and the projection
    return products + tokens**2 * (keys + values)


def mlp_macs(tokens: int, mlp: MlpSlice) -> int:
    """Count the multiply-accumulates of one MLP block on one image."""
    return tokens * mlp.embed * 2 * mlp.hidden


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: HydraViTConfig) -> dict[str, tuple[int, ...]]:
    model = HydraViT(config, backend="reference", device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def costs(config: HydraViTConfig) -> dict[int, Cost]:
    """Return the cost of every width that the config's nesting method has."""
    return {heads: cost(config, subnetwork) for heads, subnetwork in every_width(config).items()}
