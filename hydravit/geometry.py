"""The nesting methods: constructors of the subnetwork that each width is.

A ``Subnetwork`` is made once per width, never inside a forward. Kernels know none of the methods; a new nesting is a
new constructor here. Interval arithmetic follows the cited papers, and the released checkpoints where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hydravit.config import HydraViTConfig
from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, Intervals, MlpSlice, Subnetwork


class Widths(NamedTuple):
    """The subnetworks of one call: one for the batch, or several and, per image, which of them it uses."""

    subnetworks: tuple[Subnetwork, ...]
    subnet: Tensor | None

    @property
    def eps(self) -> float:
        return self.subnetworks[0].eps

    @property
    def embed(self) -> list[EmbedSlice]:
        return [s.embed for s in self.subnetworks]

    def attention(self, layer: int) -> list[AttentionSlice]:
        return [s.attention[layer] for s in self.subnetworks]

    def mlp(self, layer: int) -> list[MlpSlice]:
        return [s.mlp[layer] for s in self.subnetworks]

    @property
    def head(self) -> list[HeadSlice]:
        return [s.head for s in self.subnetworks]


def parameter_slices(config: HydraViTConfig, subnetwork: Subnetwork) -> dict[str, tuple[Intervals, ...]]:
    """Per parameter of the model, by name, the intervals of every axis that the subnetwork reads.

    A skipped branch reads nothing: its parameters have axes without intervals.
    """
    slices = config.sizes.parameter_slices(subnetwork, config.final_norm)
    if config.separate_classifiers:  # the model keeps them apart, along an axis of their own
        width = ((subnetwork.head.class_offset // max(config.num_classes, 1), 1),)
        classes = ((0, config.num_classes),)
        slices["head.weight"] = (width, classes, slices["head.weight"][1])
        slices["head.bias"] = (width, classes)
    return slices


def position(widths: tuple[int, ...], heads: int, what: str) -> int:
    """Index of ``heads`` in the ascending ``widths``, or ``ValueError``.

    By arithmetic: torch.compile makes one graph for all members, where ``in`` and ``index`` would make one for each.
    """
    first, last = widths[0], widths[-1]
    if last - first + 1 == len(widths):
        if first <= heads <= last:
            return heads - first
    else:
        product, smaller = 1, 0
        for width in widths:
            product = product * (heads - width)
            smaller = smaller + (heads - width - 1) // last + 1
        if product == 0:
            return smaller
    raise ValueError(f"heads={heads} {what}; possible: {list(widths)}")


def _subnetwork(config, heads, attention: Sequence[AttentionSlice], mlp: Sequence[MlpSlice], eps=None) -> Subnetwork:
    own = config.separate_classifiers
    index = position(own, heads, "has no classifier of its own") if own else 0
    embed = EmbedSlice(*attention[0][:2])
    head = HeadSlice(*embed, index * config.num_classes, config.num_classes)
    return Subnetwork(heads, embed, tuple(attention), tuple(mlp), head, config.norm_eps if eps is None else eps)


def _uniform(config, heads, attention: AttentionSlice, mlp: MlpSlice, eps=None) -> Subnetwork:
    """The same slices in every layer."""
    return _subnetwork(config, heads, (attention,) * config.depth, (mlp,) * config.depth, eps)


def hydravit(config: HydraViTConfig, heads: int) -> Subnetwork:
    """The first ``heads`` heads and the matching first channels of everything else (arXiv 2409.17978, section 3)."""
    width = heads * config.head_dim
    return _uniform(
        config,
        heads,
        _per_role_attention(config, width, heads, config.head_dim),
        MlpSlice(0, width, 0, heads * config.hidden_per_head),
    )


def sortednet(config: HydraViTConfig, heads: int) -> Subnetwork:
    """The same widths with every head kept: each head is narrower (SortedNet, arXiv 2309.00255).

    Width ``heads * head_dim`` must be divisible by ``max_heads``. The scale stays the full model's.
    """
    width = heads * config.head_dim
    if width % config.max_heads:
        raise ValueError(f"sortednet: width {width} is not divisible by {config.max_heads} heads")
    return _uniform(
        config,
        heads,
        _per_role_attention(config, width, config.max_heads, width // config.max_heads),
        MlpSlice(0, width, 0, heads * config.hidden_per_head),
    )


def dynabert(config: HydraViTConfig, heads: int) -> Subnetwork:
    """The first ``heads`` heads and as large a part of the MLP; the residual stream is whole (arXiv 2004.04037)."""
    return _uniform(
        config,
        heads,
        _per_role_attention(config, config.embed, heads, config.head_dim),
        MlpSlice(0, config.embed, 0, heads * config.hidden_per_head),
    )


def matformer(config: HydraViTConfig, heads: int) -> Subnetwork:
    """Only the MLP's hidden layer is cut, to ``heads / max_heads`` of it (MatFormer, arXiv 2310.07707)."""
    return _uniform(
        config,
        heads,
        _per_role_attention(config, config.embed, config.max_heads, config.head_dim),
        MlpSlice(0, config.embed, 0, heads * config.hidden_per_head),
    )


def _per_role_attention(config, width, heads, head_dim) -> AttentionSlice:
    """The first heads of Q, K and V, each in its own third of the fused weight, from the first ``width`` channels."""
    full = config.embed
    return AttentionSlice(0, width, 0, full, 2 * full, 0, heads, head_dim, head_dim, head_dim, config.head_dim**-0.5)


# The nestings whose widths go by a number of heads, for `HydraViTConfig.geometry`.
GEOMETRIES: dict[str, Callable[[HydraViTConfig, int], Subnetwork]] = {
    "hydravit": hydravit,
    "sortednet": sortednet,
    "dynabert": dynabert,
    "matformer": matformer,
}


def every_width(config: HydraViTConfig) -> dict[int, Subnetwork]:
    """The validated subnetwork of every width that the config's nesting has, ascending."""
    found = {}
    for heads in range(1, config.max_heads + 1):
        try:
            found[heads] = config.sizes.validate(GEOMETRIES[config.geometry](config, heads))
        except ValueError:  # SortedNet's heads must divide the width; a separate classifier must exist
            continue
    return found


def scala(config: HydraViTConfig, width: int, *, suffix: bool) -> Subnetwork:
    """``width`` channels from the start or the end of every axis, all heads kept (Scala, arXiv 2412.04786).

    Follows the released checkpoints: the fused QKV weight is cut as one block of ``3 * width`` rows and split again, so
    a subnetwork's queries may come from the full model's key rows; the scale stays the full model's; epsilon is 1e-5.
    """
    if not 1 <= width <= config.embed or width % config.max_heads:
        raise ValueError(f"scala: width {width} must be in 1..{config.embed} and divisible by {config.max_heads} heads")
    hidden = round(config.mlp_ratio * width)
    channel = config.embed - width if suffix else 0
    row = 3 * channel
    head_dim = width // config.max_heads
    attention = AttentionSlice(
        channel, width, row, row + width, row + 2 * width, channel,
        config.max_heads, head_dim, head_dim, head_dim, config.head_dim**-0.5,
    )  # fmt: skip
    mlp = MlpSlice(channel, width, config.hidden - hidden if suffix else 0, hidden)
    return _uniform(config, config.max_heads, attention, mlp, eps=1e-5)


def skd(config: HydraViTConfig, widths: Sequence[tuple[int, int]]) -> Subnetwork:
    """Per layer ``(r, m)``: the first ``r`` channels inside every head and the first ``m`` hidden ones.

    SKD, arXiv 2511.11683. The residual stream and the number of heads stay whole; 0 skips that branch of the layer, its
    bias included.
    """
    full, pitch = config.embed, config.head_dim
    attention = [
        AttentionSlice(0, full, 0, full, 2 * full, 0, config.max_heads if r else 0, r, r, pitch, pitch**-0.5)
        for r, _ in widths
    ]
    return _subnetwork(config, config.max_heads, attention, [MlpSlice(0, full, 0, m) for _, m in widths])
