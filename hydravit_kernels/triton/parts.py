"""Which part of a full weight one product reads, for kernels and their launchers.

A product multiplies rows of activations with some rows and columns of a weight, in place. Kernels count both from zero;
``row_of`` and ``column_of`` say where they lie in the full weight. One slice for the whole batch comes as plain
arguments, so a width is no part of what a kernel is compiled for; with one slice per image the integers of all slices
come as a table on the device, and every program looks its image's up.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, unflatten


class Part(NamedTuple):
    """``rows`` outputs and ``columns`` inputs of a product, and where they lie in the full weight.

    Rows begin at ``row`` and columns at ``column``. The rows of fused queries, keys and values: heads of ``head_dim``
    rows, ``pitch`` apart, ``query_length`` rows in all from ``row``, as many from ``key_row``, and heads of
    ``value_dim`` rows from ``value_row``. The columns of a projection: heads of ``value_dim`` columns, ``pitch`` apart.
    """

    rows: int
    columns: int
    row: int
    column: int
    query_length: int = 0
    key_row: int = 0
    value_row: int = 0
    head_dim: int = 0
    value_dim: int = 0
    pitch: int = 0


PART_INTS = tl.constexpr(len(Part._fields))


class Slices(NamedTuple):
    """The parts of one product: a single one, coded, or the ``table`` of all and each image's index ``subnet (B,)``."""

    part: Part | None
    table: Tensor | None
    subnet: Tensor | None


# ---- In kernels ----


@triton.jit
def _plain(coded, ALIGN: tl.constexpr):
    return ((coded >> 1) - 1) * ALIGN


@triton.jit
def _entry(table, index: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(table + index), ALIGN)


@triton.jit
def part_at(slices, index, ALIGN: tl.constexpr):
    """The part with this index; ``ALIGN`` divides all its integers."""
    if slices.table is None:
        part = plain_part(slices.part, ALIGN)
    else:
        entry = slices.table + index * PART_INTS
        part = Part(
            _entry(entry, 0, ALIGN),
            _entry(entry, 1, ALIGN),
            _entry(entry, 2, ALIGN),
            _entry(entry, 3, ALIGN),
            _entry(entry, 4, ALIGN),
            _entry(entry, 5, ALIGN),
            _entry(entry, 6, ALIGN),
            _entry(entry, 7, ALIGN),
            _entry(entry, 8, ALIGN),
            _entry(entry, 9, ALIGN),
        )
    return part


@triton.jit
def plain_part(coded, ALIGN: tl.constexpr):
    """What ``Parts.coded`` made of a part."""
    return Part(
        _plain(coded.rows, ALIGN),
        _plain(coded.columns, ALIGN),
        _plain(coded.row, ALIGN),
        _plain(coded.column, ALIGN),
        _plain(coded.query_length, ALIGN),
        _plain(coded.key_row, ALIGN),
        _plain(coded.value_row, ALIGN),
        _plain(coded.head_dim, ALIGN),
        _plain(coded.value_dim, ALIGN),
        _plain(coded.pitch, ALIGN),
    )


@triton.jit
def part_of(slices, image, ALIGN: tl.constexpr):
    """The part that an image uses."""
    if slices.subnet is None:
        index = 0
    else:
        index = tl.load(slices.subnet + image)
    return part_at(slices, index, ALIGN)


@triton.jit
def row_of(i, part, QKV: tl.constexpr, SPREAD: tl.constexpr):
    """Where row ``i`` of the part lies in the full weight, and in the bias.

    QKV: of fused queries, keys and values; SPREAD: of heads that do not touch, at the cost of divisions.
    """
    if QKV:
        key = i - part.query_length
        value = key - part.query_length
        within = tl.where(value >= 0, value, tl.where(key >= 0, key, i))
        start = tl.where(value >= 0, part.value_row, tl.where(key >= 0, part.key_row, part.row))
        if SPREAD:
            dim = tl.where(value >= 0, part.value_dim, part.head_dim)
            within = within // dim * part.pitch + within % dim
        row = start + within
    else:
        row = part.row + i
    return row


@triton.jit
def column_of(i, part, QKV: tl.constexpr, SPREAD: tl.constexpr):
    """Where column ``i`` of the part lies in the full weight."""
    if SPREAD and not QKV:
        column = part.column + i // part.value_dim * part.pitch + i % part.value_dim
    else:
        column = part.column + i
    return column


# ---- On the host ----


class Parts:
    """The parts of one product at every slice of a call; ``qkv``: the rows are fused queries, keys and values."""

    def __init__(self, parts: Sequence[Part], qkv: bool = False):
        self.parts, self.qkv = tuple(parts), qkv
        self.rows = max(part.rows for part in parts)  # outputs of the product at its widest
        self.columns = max(part.columns for part in parts)
        # Whether heads do not touch.
        self.spread = any({part.head_dim, part.value_dim, part.pitch} != {part.value_dim} for part in parts)
        # A power of two that divides all integers: as many elements are loaded at once.
        self.align = math.gcd(16, *itertools.chain(*parts))

    def slices(self, subnet: Tensor | None) -> Slices:
        if subnet is None:
            return Slices(self.coded(self.parts[0]), None, None)
        return Slices(None, table(self.parts, subnet.device), subnet)

    def coded(self, part: Part) -> Part:
        """For arguments of a kernel, as odd numbers from 3 on: for 1 and for multiples of 16 Triton compiles anew."""
        return Part(*(value // self.align * 2 + 3 for value in part))

    def reach(self) -> tuple[int, int]:
        """The first row and the first column behind all that is read."""
        reached = [(0, 0)]
        for part in self.parts:
            if min(part) < 0 or max(part) >= 2**30:
                raise RuntimeError(f"slices: integers in [0, 2**30) expected, {tuple(part)} given")
            if part.rows and part.columns:
                reached.append((self._row_end(part), self._column_end(part)))
        rows, columns = zip(*reached, strict=True)
        return max(rows), max(columns)

    def _row_end(self, part: Part) -> int:
        return max(stop for _, stop in self._intervals(part))

    def _intervals(self, part: Part) -> list[tuple[int, int]]:
        """Where rows lie: of fused queries, keys and values the three intervals from the first to the last head."""
        if not self.qkv:
            return [(part.row, part.row + part.rows)]
        last = (part.query_length // max(part.head_dim, 1) - 1) * part.pitch
        starts = ((part.row, part.head_dim), (part.key_row, part.head_dim), (part.value_row, part.value_dim))
        return [(start, start + last + dim) for start, dim in starts]

    def row_ranges(self, part: Part) -> list[tuple[int, int]]:
        """All rows in ranges of which none has a row of the full weight twice: queries, keys and values may share."""
        intervals = sorted(self._intervals(part))
        if all(stop <= start for (_, stop), (start, _) in itertools.pairwise(intervals)):
            return [(0, part.rows)]
        return [(0, part.query_length), (part.query_length, 2 * part.query_length), (2 * part.query_length, part.rows)]

    def _column_end(self, part: Part) -> int:
        if self.qkv or not self.spread:
            return part.column + part.columns
        return part.column + (part.columns // part.value_dim - 1) * part.pitch + part.value_dim


@functools.cache
def table(parts: tuple[Part, ...], device: torch.device) -> Tensor:
    """``parts`` as ``(len(parts), PART_INTS)`` int32: copied once, so a captured graph may use them from then on."""
    return torch.tensor(parts, dtype=torch.int32, device=device)


@functools.cache
def scale_table(scales: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


class AttentionParts(NamedTuple):
    qkv: Parts
    proj: Parts
    heads: int  # at most


@functools.cache
def attention_parts(slices: tuple[int, ...]) -> AttentionParts:
    qkv, proj, heads = [], [], 0
    for s in unflatten(AttentionSlice, slices):
        least, most = sorted((s.head_dim, s.value_dim))
        if s.heads and least < 1:
            raise RuntimeError(f"slices: head_dim and value_dim of 1 at least expected, {least} given")
        if s.heads > 1 and s.pitch < most:
            raise RuntimeError(f"slices: a pitch of {most} at least expected, {s.pitch} given")
        pitch = s.value_dim if s.heads < 2 else s.pitch
        queries, values = s.heads * s.head_dim, s.heads * s.value_dim
        lengths = (queries, s.key_row, s.value_row, s.head_dim, s.value_dim, pitch)
        qkv.append(Part(2 * queries + values, s.embed, s.query_row, s.embed_offset, *lengths))
        proj.append(Part(s.embed, values, s.embed_offset, s.proj_column, *lengths))
        heads = max(heads, s.heads)
    return AttentionParts(Parts(qkv, qkv=True), Parts(proj), heads)


class MlpParts(NamedTuple):
    fc1: Parts
    fc2: Parts


@functools.cache
def mlp_parts(slices: tuple[int, ...]) -> MlpParts:
    each = unflatten(MlpSlice, slices)
    fc1 = [Part(s.hidden, s.embed, s.hidden_offset, s.embed_offset) for s in each]
    fc2 = [Part(s.embed, s.hidden, s.embed_offset, s.hidden_offset) for s in each]
    return MlpParts(Parts(fc1), Parts(fc2))


class HeadParts(NamedTuple):
    classifier: Parts
    features: Parts  # rows and columns are the channels of the stream


@functools.cache
def head_parts(slices: tuple[int, ...]) -> HeadParts:
    each = unflatten(HeadSlice, slices)
    classifier = [Part(s.classes, s.embed, s.class_offset, s.embed_offset) for s in each]
    features = [Part(s.embed, s.embed, s.embed_offset, s.embed_offset) for s in each]
    return HeadParts(Parts(classifier), Parts(features))


@functools.cache
def stem_parts(slices: tuple[int, ...], pixels: int) -> Parts:
    """Of the patch embedding, whose columns are all ``pixels`` of a patch, channel by channel."""
    return Parts([Part(s.embed, pixels, s.embed_offset, 0) for s in unflatten(EmbedSlice, slices)])
