"""The description of a subnetwork: which part of every full weight one width reads.

A subnetwork is offsets and lengths, nothing else. Each names a contiguous interval of a full weight, so a kernel needs
only base pointers, lengths and strides, and a new nesting method is a new constructor (``hydravit/geometry.py``), not a
new kernel. ``csrc/subnetwork.h`` is the same in C++, field by field.

Sources of the methods: HydraViT (arXiv 2409.17978), Scala (arXiv 2412.04786), SKD (arXiv 2511.11683).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

# A set of channels along one axis of a weight: disjoint (offset, length) intervals in the subnetwork's own order.
Intervals = tuple[tuple[int, int], ...]

Slice = TypeVar("Slice", "EmbedSlice", "AttentionSlice", "MlpSlice", "HeadSlice")


class EmbedSlice(NamedTuple):
    """The interval of the residual stream that the stem writes."""

    embed_offset: int
    embed: int


class AttentionSlice(NamedTuple):
    """The slice of one attention block. All lengths are in channels (rows or columns of the full weights).

    Head ``h`` uses rows ``[role_row + h * pitch, role_row + h * pitch + head_dim)`` of ``qkv.weight`` for the query and
    key roles, ``value_dim`` of them for the value role, and columns ``[proj_column + h * pitch, ... + value_dim)`` of
    ``proj.weight``. ``heads == 0`` skips the branch, its norm and its biases: the block is the identity.
    """

    embed_offset: int
    embed: int
    query_row: int
    key_row: int
    value_row: int
    proj_column: int
    heads: int
    head_dim: int
    value_dim: int
    pitch: int
    scale: float


class MlpSlice(NamedTuple):
    """The slice of one MLP block: ``hidden`` rows of ``fc1``, columns of ``fc2``. ``hidden == 0`` skips the branch."""

    embed_offset: int
    embed: int
    hidden_offset: int
    hidden: int


class HeadSlice(NamedTuple):
    """The classifier's slice: ``classes`` rows of its weight (the width's own rows, if it has any), embed columns."""

    embed_offset: int
    embed: int
    class_offset: int
    classes: int


class Subnetwork(NamedTuple):
    """Everything one width reads: a slice of the residual stream, one attention and one MLP slice per layer, the head.

    It is frozen and hashable, and it is made once per width, never inside a forward. ``heads`` is the width's label;
    the kernels read the slices only. ``eps`` is the epsilon of every norm.
    """

    heads: int
    embed: EmbedSlice
    attention: tuple[AttentionSlice, ...]
    mlp: tuple[MlpSlice, ...]
    head: HeadSlice
    eps: float

    def flat(self) -> tuple[list[int], list[float]]:
        """Integers and attention scales in the order of ``csrc/subnetwork.h``: embed, layer by layer, head."""
        layers = [s for layer in zip(self.attention, self.mlp, strict=True) for s in layer]
        return flatten((self.embed, *layers, self.head)), [s.scale for s in self.attention]

    def axes(self, layer: int) -> dict[str, Intervals]:
        """The intervals that the subnetwork reads along every axis it cuts, by the axes' names in ``parameters.py``.

        A skipped branch reads nothing: its axes have no intervals.
        """
        attention, mlp = self.attention[layer], self.mlp[layer]
        embed = ((self.embed.embed_offset, self.embed.embed),)
        query, key = (head_intervals(attention, row, attention.head_dim) for row in attention[2:4])
        return {
            "embed": embed,
            "attention_embed": embed if attention.heads else (),
            "qkv": query + key + head_intervals(attention, attention.value_row, attention.value_dim),
            "attended": head_intervals(attention, attention.proj_column, attention.value_dim),
            "mlp_embed": embed if mlp.hidden else (),
            "hidden": ((mlp.hidden_offset, mlp.hidden),) if mlp.hidden else (),
            "classes": ((self.head.class_offset, self.head.classes),),
        }


def head_intervals(attention: AttentionSlice, start: int, length: int) -> Intervals:
    """The intervals ``[start + h * pitch, ... + length)`` of all heads, joined where heads touch."""
    if attention.pitch == length:
        return ((start, attention.heads * length),) if attention.heads else ()
    return tuple((start + head * attention.pitch, length) for head in range(attention.heads))


def flatten(slices: Iterable[NamedTuple]) -> list[int]:
    """The integers of slices in order, as the ops take them; the attention scale, last of its fields, is left out."""
    return [value for entry in slices for value in (entry[:-1] if isinstance(entry, AttentionSlice) else entry)]


def unflatten(kind: type[Slice], integers: Sequence[int]) -> list[Slice]:
    """The slices of one kind that ``flatten`` took apart; an attention slice's scale, which travels apart, is NaN.

    Raises ``RuntimeError`` if the integers are not those of one slice or more.
    """
    apart = (float("nan"),) if kind is AttentionSlice else ()
    count = len(kind._fields) - len(apart)
    if not integers or len(integers) % count:
        raise RuntimeError(f"slices: {count} integers for each expected, {len(integers)} given")
    return [kind(*integers[start : start + count], *apart) for start in range(0, len(integers), count)]


def widest(slices: Sequence[NamedTuple]) -> int:
    """Channels of the residual stream that serves all of ``slices``; a narrower image leaves the rest zero."""
    width = slices[0].embed
    for entry in slices[1:]:
        width = max(width, entry.embed)
    return width
