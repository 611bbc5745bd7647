"""The description of a subnetwork: which slices of the full weights one width reads.

A subnetwork consists of offsets and lengths. Each pair is a contiguous interval of a full weight, so kernels need only
base pointers, lengths and strides, and a new nesting method is a new constructor (``hydravit/geometry.py``), not a new
kernel. ``csrc/subnetwork.h`` has the same structs, field by field, for C++.

Sources of the methods: HydraViT (arXiv 2409.17978), Scala (arXiv 2412.04786), SKD (arXiv 2511.11683).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

# The channels that a subnetwork reads along one axis of a weight: disjoint (offset, length), in the order it reads
# them.
Intervals = tuple[tuple[int, int], ...]

Slice = TypeVar("Slice", "EmbedSlice", "AttentionSlice", "MlpSlice", "HeadSlice")


class EmbedSlice(NamedTuple):
    """The interval of the residual that the stem writes."""

    embed_offset: int
    embed: int


class AttentionSlice(NamedTuple):
    """The slice of one attention block. All lengths are in channels (rows or columns of the full weights).

    Head ``h`` reads rows ``[query_row + h * pitch, query_row + h * pitch + head_dim)`` of ``qkv.weight`` for its query,
    as many from ``key_row + h * pitch`` for its key, and ``value_dim`` rows from ``value_row + h * pitch`` for its
    value. It reads ``value_dim`` columns of ``proj.weight`` from ``proj_column + h * pitch``. ``heads == 0`` skips the
    branch with its norm and its biases: the block is the identity.
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

    @property
    def qkv_rows(self) -> Intervals:
        """The rows of the queries, the keys and the values."""
        query, key = (self._of_heads(row, self.head_dim) for row in (self.query_row, self.key_row))
        return query + key + self._of_heads(self.value_row, self.value_dim)

    @property
    def proj_columns(self) -> Intervals:
        return self._of_heads(self.proj_column, self.value_dim)

    def _of_heads(self, start: int, length: int) -> Intervals:
        """The intervals ``[start + h * pitch, ... + length)`` of all heads, joined where heads touch."""
        if self.pitch == length:
            return ((start, self.heads * length),) if self.heads else ()
        return tuple((start + head * self.pitch, length) for head in range(self.heads))


class MlpSlice(NamedTuple):
    """The slice of one MLP block: ``hidden`` rows of fc1 and columns of fc2. ``hidden == 0`` skips the branch."""

    embed_offset: int
    embed: int
    hidden_offset: int
    hidden: int


class HeadSlice(NamedTuple):
    """The classifier's slice: ``classes`` rows and ``embed`` columns of its weight. A width may have rows of its
    own."""

    embed_offset: int
    embed: int
    class_offset: int
    classes: int


class Subnetwork(NamedTuple):
    """Everything that one width reads: slices of the residual, of both blocks of every layer, and of the head.

    It is frozen and hashable, and made once per width, never inside a forward. ``heads`` names the width; kernels read
    only the slices. ``eps`` is the epsilon of every norm.
    """

    heads: int
    embed: EmbedSlice
    attention: tuple[AttentionSlice, ...]
    mlp: tuple[MlpSlice, ...]
    head: HeadSlice
    eps: float

    def flat(self) -> tuple[list[int], list[float]]:
        """The integers and the attention scales, in the order of ``csrc/subnetwork.h``: embed, layer by layer, head."""
        layers = [s for layer in zip(self.attention, self.mlp, strict=True) for s in layer]
        return flatten((self.embed, *layers, self.head)), [s.scale for s in self.attention]

    def axes(self, layer: int) -> dict[str, Intervals]:
        """The intervals that the subnetwork reads along each axis it slices, by the axes' names in ``parameters.py``.

        A skipped branch reads nothing, so its axes have no intervals.
        """
        attention, mlp = self.attention[layer], self.mlp[layer]
        embed = ((self.embed.embed_offset, self.embed.embed),)
        return {
            "embed": embed,
            "attention_embed": embed if attention.heads else (),
            "qkv": attention.qkv_rows,
            "attended": attention.proj_columns,
            "mlp_embed": embed if mlp.hidden else (),
            "hidden": ((mlp.hidden_offset, mlp.hidden),) if mlp.hidden else (),
            "classes": ((self.head.class_offset, self.head.classes),),
        }


def flatten(slices: Iterable[tuple]) -> list[int]:
    """The integers of the slices in order, as the ops take them. The attention scale, the last field, is left out."""
    return [value for entry in slices for value in (entry[:-1] if isinstance(entry, AttentionSlice) else entry)]


def unflatten(kind: type[Slice], integers: Sequence[int]) -> list[Slice]:
    """The inverse of ``flatten`` for slices of one kind; the scale of an attention slice, which it left out, is NaN.

    Raises ``RuntimeError`` if the integers are not those of one or more slices.
    """
    scale = (float("nan"),) if kind is AttentionSlice else ()
    count = len(kind._fields) - len(scale)
    if not integers or len(integers) % count:
        raise RuntimeError(f"slices: {count} integers for each expected, {len(integers)} given")
    return [kind(*integers[start : start + count], *scale) for start in range(0, len(integers), count)]


def widest(slices: Sequence[Slice]) -> int:
    """How many channels the residual has that serves all ``slices``; narrow images leave the rest zero."""
    embed = slices[0].embed
    for entry in slices[1:]:
        embed = max(embed, entry.embed)
    return embed
