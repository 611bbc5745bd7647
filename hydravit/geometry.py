"""The slice geometry: which part of every full weight one subnetwork reads.

A ``Geometry`` is small, frozen and hashable. It is resolved once per width, never inside a forward. The constructors
below are the nesting methods; kernels know none of them. Interval arithmetic follows the cited papers, and the released
checkpoints where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hydravit.config import HydraViTConfig
from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice

# A set of channels along one axis of a weight: disjoint (offset, length) intervals in the subnetwork's own order.
Intervals = tuple[tuple[int, int], ...]


class Geometry(NamedTuple):
    """One subnetwork: the residual stream's interval, one attention and one MLP slice per layer, head, norms' epsilon.

    ``heads`` says which classifier and label the width goes by; the kernels read the per-layer slices.
    """

    heads: int
    embed: EmbedSlice
    attention: tuple[AttentionSlice, ...]
    mlp: tuple[MlpSlice, ...]
    head: HeadSlice
    eps: float

    def parameter_slices(self, config: HydraViTConfig) -> dict[str, tuple[Intervals, ...]]:
        """For every parameter of the model that is sliced: per axis, the intervals the subnetwork reads.

        Axes beyond the given ones are read whole. A skipped branch reads nothing: its intervals are empty.
        """
        embed = ((self.embed.embed_offset, self.embed.embed),)
        whole_axis = ((0, 1),)
        slices: dict[str, tuple[Intervals, ...]] = {
            "patch_embed.proj.weight": (embed,),
            "patch_embed.proj.bias": (embed,),
            "cls_token": (whole_axis, whole_axis, embed),
            "reg_token": (whole_axis, ((0, config.register_tokens),), embed),
            "pos_embed": (whole_axis, ((0, config.pos_tokens),), embed),
        }
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            block = f"blocks.{i}."
            query, key = (head_intervals(attention, row, attention.head_dim) for row in attention[2:4])
            value = head_intervals(attention, attention.value_row, attention.value_dim)
            columns = head_intervals(attention, attention.proj_column, attention.value_dim)
            stream = embed if attention.heads else ()
            for norm in ("norm1.weight", "norm1.bias", "attn.proj.bias", "ls1.gamma"):
                slices[block + norm] = (stream,)
            slices[block + "attn.qkv.weight"] = (query + key + value, stream)
            slices[block + "attn.qkv.bias"] = (query + key + value,)
            slices[block + "attn.proj.weight"] = (stream, columns)
            hidden = ((mlp.hidden_offset, mlp.hidden),) if mlp.hidden else ()
            stream = embed if mlp.hidden else ()
            for norm in ("norm2.weight", "norm2.bias", "mlp.fc2.bias", "ls2.gamma"):
                slices[block + norm] = (stream,)
            slices[block + "mlp.fc1.weight"] = (hidden, stream)
            slices[block + "mlp.fc1.bias"] = (hidden,)
            slices[block + "mlp.fc2.weight"] = (stream, hidden)
        for norm in ("norm.", "fc_norm."):
            slices[norm + "weight"] = slices[norm + "bias"] = (embed,)
        classes = (((self.head.class_offset, self.head.classes),),)
        if config.separate_classifiers:
            index, whole = self.head.class_offset // max(config.num_classes, 1), ((0, config.num_classes),)
            classes = (((index, 1),), whole)
        slices["head.weight"], slices["head.bias"] = (*classes, embed), classes
        return slices

    def validate(self, config: HydraViTConfig) -> Geometry:
        """Raise ``ValueError`` where the geometry does not fit the model; return it otherwise."""
        if len(self.attention) != config.depth or len(self.mlp) != config.depth:
            raise ValueError(
                f"geometry has {len(self.attention)} attention and {len(self.mlp)} MLP slices for depth {config.depth}"
            )
        if not self.eps > 0:
            raise ValueError(f"geometry: eps must be positive, not {self.eps}")
        _check_interval("embed", *self.embed, config.embed)
        if self.head[:2] != self.embed:
            raise ValueError(f"geometry: the head does not use the embed interval {tuple(self.embed)} of the stream")
        rows = config.num_classes * max(len(config.separate_classifiers), 1)
        if config.num_classes:
            _check_interval("classes", self.head.class_offset, self.head.classes, rows)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            if attention[:2] != self.embed or mlp[:2] != self.embed:
                raise ValueError(f"geometry: layer {i} does not use the embed interval {tuple(self.embed)}")
            if attention.heads < 0 or mlp.hidden < 0:
                raise ValueError(f"geometry: layer {i} has a negative length")
            if attention.heads:
                if not math.isfinite(attention.scale):
                    raise ValueError(f"geometry: layer {i} has an attention scale of {attention.scale}")
                if min(attention.head_dim, attention.value_dim) < 1:
                    raise ValueError(f"geometry: layer {i} has heads without channels")
                if attention.pitch < max(attention.head_dim, attention.value_dim) and attention.heads > 1:
                    raise ValueError(f"geometry: layer {i} has heads that overlap (pitch {attention.pitch})")
                for name, start, length, size in (
                    ("query rows", attention.query_row, attention.head_dim, 3 * config.embed),
                    ("key rows", attention.key_row, attention.head_dim, 3 * config.embed),
                    ("value rows", attention.value_row, attention.value_dim, 3 * config.embed),
                    ("proj columns", attention.proj_column, attention.value_dim, config.embed),
                ):
                    _check_interval(f"layer {i} {name}", start, (attention.heads - 1) * attention.pitch + length, size)
            if mlp.hidden:
                _check_interval(f"layer {i} hidden", mlp.hidden_offset, mlp.hidden, config.hidden)
        return self


class Widths(NamedTuple):
    """The subnetworks of one call: one geometry for the batch, or several and, per image, which of them it uses."""

    geometries: tuple[Geometry, ...]
    subnet: Tensor | None

    @property
    def eps(self) -> float:
        return self.geometries[0].eps

    @property
    def embed(self) -> list[EmbedSlice]:
        return [geometry.embed for geometry in self.geometries]


def head_intervals(attention: AttentionSlice, start: int, length: int) -> Intervals:
    """The intervals ``[start + h * pitch, ... + length)`` of all heads, joined where heads touch."""
    if attention.pitch == length:
        return ((start, attention.heads * length),) if attention.heads else ()
    return tuple((start + head * attention.pitch, length) for head in range(attention.heads))


def _check_interval(name: str, offset: int, length: int, size: int) -> None:
    if offset < 0 or length < 1 or offset + length > size:
        raise ValueError(f"geometry: {name} [{offset}, {offset + length}) is not inside [0, {size})")


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


def _geometry(config, heads, attention: Sequence[AttentionSlice], mlp: Sequence[MlpSlice], eps=None) -> Geometry:
    own = config.separate_classifiers
    index = position(own, heads, "has no classifier of its own") if own else 0
    embed = EmbedSlice(*attention[0][:2])
    head = HeadSlice(*embed, index * config.num_classes, config.num_classes)
    return Geometry(heads, embed, tuple(attention), tuple(mlp), head, config.norm_eps if eps is None else eps)


def _uniform(config, heads, attention, mlp, eps=None) -> Geometry:
    """The same slices in every layer."""
    return _geometry(config, heads, (attention,) * config.depth, (mlp,) * config.depth, eps)


def hydravit(config: HydraViTConfig, heads: int) -> Geometry:
    """The first ``heads`` heads and the matching first channels of everything else (arXiv 2409.17978, section 3)."""
    width = heads * config.head_dim
    return _uniform(
        config,
        heads,
        _per_role_attention(config, width, heads, config.head_dim),
        MlpSlice(0, width, 0, heads * config.hidden_per_head),
    )


def sortednet(config: HydraViTConfig, heads: int) -> Geometry:
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


def dynabert(config: HydraViTConfig, heads: int) -> Geometry:
    """The first ``heads`` heads and as large a part of the MLP; the residual stream is whole (arXiv 2004.04037)."""
    return _uniform(
        config,
        heads,
        _per_role_attention(config, config.embed, heads, config.head_dim),
        MlpSlice(0, config.embed, 0, heads * config.hidden_per_head),
    )


def matformer(config: HydraViTConfig, heads: int) -> Geometry:
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
GEOMETRIES: dict[str, Callable[[HydraViTConfig, int], Geometry]] = {
    "hydravit": hydravit,
    "sortednet": sortednet,
    "dynabert": dynabert,
    "matformer": matformer,
}


def every_width(config: HydraViTConfig) -> dict[int, Geometry]:
    """The validated geometry of every number of heads that the config's nesting has, ascending."""
    found = {}
    for heads in range(1, config.max_heads + 1):
        try:
            found[heads] = GEOMETRIES[config.geometry](config, heads).validate(config)
        except ValueError:  # SortedNet's heads must divide the width; a separate classifier must exist
            continue
    return found


def scala(config: HydraViTConfig, width: int, *, suffix: bool) -> Geometry:
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


def skd(config: HydraViTConfig, widths: Sequence[tuple[int, int]]) -> Geometry:
    """Per layer ``(r, m)``: the first ``r`` channels inside every head and the first ``m`` hidden ones.

    SKD, arXiv 2511.11683. The residual stream and the number of heads stay whole; 0 skips that branch of the layer, its
    bias included.
    """
    full, pitch = config.embed, config.head_dim
    attention = [
        AttentionSlice(0, full, 0, full, 2 * full, 0, config.max_heads if r else 0, r, r, pitch, pitch**-0.5)
        for r, _ in widths
    ]
    return _geometry(config, config.max_heads, attention, [MlpSlice(0, full, 0, m) for _, m in widths])
