"""Slices on their way from an op to its kernels.

1. An op takes its slices as integers, because its schema cannot carry our tuples. ``attention_products`` and the other
   functions at the end of this file turn them back into ``AttentionSlice``, ``MlpSlice``, ...
2. A block is a few matrix products, and each reads some rows and columns of one full weight, in place. The same
   functions make one ``ProductSlice`` per product and slice, and one ``ProductSlices`` per product. Their results are
   cached, so that this happens once per width.
3. A kernel gets ``ProductSlices.argument(width_index)``. One slice for the whole batch travels as plain integers, so a
   kernel reads no memory to know it. With a slice per image, a table of all slices lies on the device, and each program
   looks up its image's. Either way another width compiles nothing.
4. In a kernel ``slice_of`` gives the ``ProductSlice`` back. Kernels count the rows and columns of a product from zero;
   ``weight_row`` and ``weight_column`` say where they lie in the full weight.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, unflatten


class ProductSlice(NamedTuple):
    """What one product reads of a full weight: ``rows``, its outputs, by ``columns``, its inputs.

    The rows follow each other from ``first_row`` and the columns from ``first_column``, except in attention:

    - The rows of qkv are the queries', the keys' and the values'. Queries are heads of ``head_dim`` rows that begin
      ``pitch`` rows apart from ``first_row``, ``query_length`` rows in all. Keys are as many from ``key_row``. Values
      are heads of ``value_dim`` rows from ``value_row``.
    - The columns of proj are heads of ``value_dim`` columns that begin ``pitch`` columns apart.
    """

    rows: int
    columns: int
    first_row: int
    first_column: int
    query_length: int = 0
    key_row: int = 0
    value_row: int = 0
    head_dim: int = 0
    value_dim: int = 0
    pitch: int = 0


_INTEGERS = tl.constexpr(len(ProductSlice._fields))


class SliceArgument(NamedTuple):
    """The argument ``slices`` of a kernel: one encoded slice, or a table and each image's row, ``width_index``."""

    encoded: ProductSlice | None
    table: Tensor | None
    width_index: Tensor | None


# ---- In kernels ----


@triton.jit
def _decode_integer(encoded, ALIGN: tl.constexpr):
    return ((encoded >> 1) - 1) * ALIGN


@triton.jit
def decode(encoded, ALIGN: tl.constexpr):
    """Undo the encoding of ``ProductSlices.encoded``."""
    return ProductSlice(
        _decode_integer(encoded.rows, ALIGN),
        _decode_integer(encoded.columns, ALIGN),
        _decode_integer(encoded.first_row, ALIGN),
        _decode_integer(encoded.first_column, ALIGN),
        _decode_integer(encoded.query_length, ALIGN),
        _decode_integer(encoded.key_row, ALIGN),
        _decode_integer(encoded.value_row, ALIGN),
        _decode_integer(encoded.head_dim, ALIGN),
        _decode_integer(encoded.value_dim, ALIGN),
        _decode_integer(encoded.pitch, ALIGN),
    )


@triton.jit
def _load_integer(row, index: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(row + index), ALIGN)


@triton.jit
def slice_at(slices, index, ALIGN: tl.constexpr):
    """Slice ``index`` of a ``SliceArgument``. ``ALIGN`` divides all its integers."""
    if slices.table is None:
        s = decode(slices.encoded, ALIGN)
    else:
        row = slices.table + index * _INTEGERS
        s = ProductSlice(
            _load_integer(row, 0, ALIGN),
            _load_integer(row, 1, ALIGN),
            _load_integer(row, 2, ALIGN),
            _load_integer(row, 3, ALIGN),
            _load_integer(row, 4, ALIGN),
            _load_integer(row, 5, ALIGN),
            _load_integer(row, 6, ALIGN),
            _load_integer(row, 7, ALIGN),
            _load_integer(row, 8, ALIGN),
            _load_integer(row, 9, ALIGN),
        )
    return s


@triton.jit
def slice_of(slices, group, ALIGN: tl.constexpr):
    """The slice of a group of rows (see ``Batch``): that of its image, or the only one."""
    if slices.width_index is None:
        index = 0
    else:
        index = tl.load(slices.width_index + group)
    return slice_at(slices, index, ALIGN)


@triton.jit
def weight_row(i, s, QKV: tl.constexpr, SPREAD: tl.constexpr):
    """Where row ``i`` of the slice lies in the full weight, and in the bias.

    ``QKV``: the rows are queries, keys and values. ``SPREAD``: their heads lie apart, which costs divisions.
    """
    if QKV:
        key = i - s.query_length
        value = key - s.query_length
        within = tl.where(value >= 0, value, tl.where(key >= 0, key, i))
        start = tl.where(value >= 0, s.value_row, tl.where(key >= 0, s.key_row, s.first_row))
        if SPREAD:
            dim = tl.where(value >= 0, s.value_dim, s.head_dim)
            within = within // dim * s.pitch + within % dim
        row = start + within
    else:
        row = s.first_row + i
    return row


@triton.jit
def weight_column(i, s, QKV: tl.constexpr, SPREAD: tl.constexpr):
    """Where column ``i`` of the slice lies in the full weight."""
    if SPREAD and not QKV:
        column = s.first_column + i // s.value_dim * s.pitch + i % s.value_dim
    else:
        column = s.first_column + i
    return column


# ---- On the host ----


class ProductSlices:
    """What one product reads at every slice of a call, and the properties by which its kernels are compiled.

    Attributes:
        each: one ``ProductSlice`` per slice of the call.
        encoded: the same for arguments of a kernel. Triton compiles anew for an argument of 1 and for multiples of 16,
            and ``do_not_specialize`` does not reach into tuples, so the integers become odd numbers from 3 on.
        rows, columns: the most of any slice.
        qkv: the rows are fused queries, keys and values.
        spread: heads lie apart.
        align: a power of two that divides all integers, so that as many elements can be read at once.
    """

    def __init__(self, each: Iterable[ProductSlice], qkv: bool = False):
        self.each, self.qkv = tuple(each), qkv
        self.rows = max(s.rows for s in self.each)
        self.columns = max(s.columns for s in self.each)
        self.spread = any({s.head_dim, s.value_dim, s.pitch} != {s.value_dim} for s in self.each)
        self.align = math.gcd(16, *itertools.chain(*self.each))
        self.encoded = tuple(ProductSlice(*(value // self.align * 2 + 3 for value in s)) for s in self.each)

    def argument(self, width_index: Tensor | None) -> SliceArgument:
        if width_index is None:
            return SliceArgument(self.encoded[0], None, None)
        return SliceArgument(None, slice_table(self.each, width_index.device), width_index)

    def reach(self) -> tuple[int, int]:
        """How many rows and columns a weight must have to contain every slice."""
        rows = columns = 0
        for s in self.each:
            if min(s) < 0 or max(s) >= 2**30:
                raise RuntimeError(f"slices: integers in [0, 2**30) expected, {tuple(s)} given")
            if s.rows and s.columns:
                rows = max(rows, *(stop for _, stop in self._row_intervals(s)))
                columns = max(columns, self._column_stop(s))
        return rows, columns

    def distinct_rows(self, s: ProductSlice) -> list[tuple[int, int]]:
        """Split the rows ``[0, s.rows)`` into ranges ``[start, stop)`` that have no row of the full weight twice.

        Queries, keys and values may share rows. One launch may then add to the rows of only one of the three.
        """
        intervals = sorted(self._row_intervals(s))
        if all(stop <= start for (_, stop), (start, _) in itertools.pairwise(intervals)):
            return [(0, s.rows)]
        return [(0, s.query_length), (s.query_length, 2 * s.query_length), (2 * s.query_length, s.rows)]

    def _row_intervals(self, s: ProductSlice) -> list[tuple[int, int]]:
        """Where the rows lie in the full weight, as ``[start, stop)``, gaps between heads included."""
        if not self.qkv:
            return [(s.first_row, s.first_row + s.rows)]
        last_head = (s.query_length // max(s.head_dim, 1) - 1) * s.pitch
        starts = ((s.first_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim))
        return [(start, start + last_head + dim) for start, dim in starts]

    def _column_stop(self, s: ProductSlice) -> int:
        if self.qkv or not self.spread:
            return s.first_column + s.columns
        return s.first_column + (s.columns // s.value_dim - 1) * s.pitch + s.value_dim


@functools.cache
def slice_table(each: tuple[ProductSlice, ...], device: torch.device) -> Tensor:
    """``(slices, fields)`` int32 on the device. It is copied once, so that captured graphs can use it from then on."""
    return torch.tensor(each, dtype=torch.int32, device=device)


@functools.cache
def scale_table(scales: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


class AttentionProducts(NamedTuple):
    qkv: ProductSlices
    proj: ProductSlices
    heads: int  # the most of any slice


@functools.cache
def attention_products(slices: tuple[int, ...]) -> AttentionProducts:
    qkv, proj, heads = [], [], 0
    for s in unflatten(AttentionSlice, slices):
        least, most = sorted((s.head_dim, s.value_dim))
        if s.heads and least < 1:
            raise RuntimeError(f"slices: head_dim and value_dim of 1 at least expected, {least} given")
        if s.heads > 1 and s.pitch < most:
            raise RuntimeError(f"slices: a pitch of {most} at least expected, {s.pitch} given")
        pitch = s.value_dim if s.heads < 2 else s.pitch
        queries, values = s.heads * s.head_dim, s.heads * s.value_dim
        of_heads = (queries, s.key_row, s.value_row, s.head_dim, s.value_dim, pitch)
        qkv.append(ProductSlice(2 * queries + values, s.embed, s.query_row, s.embed_offset, *of_heads))
        proj.append(ProductSlice(s.embed, values, s.embed_offset, s.proj_column, *of_heads))
        heads = max(heads, s.heads)
    return AttentionProducts(ProductSlices(qkv, qkv=True), ProductSlices(proj), heads)


class MlpProducts(NamedTuple):
    fc1: ProductSlices
    fc2: ProductSlices


@functools.cache
def mlp_products(slices: tuple[int, ...]) -> MlpProducts:
    each = unflatten(MlpSlice, slices)
    fc1 = (ProductSlice(s.hidden, s.embed, s.hidden_offset, s.embed_offset) for s in each)
    fc2 = (ProductSlice(s.embed, s.hidden, s.embed_offset, s.hidden_offset) for s in each)
    return MlpProducts(ProductSlices(fc1), ProductSlices(fc2))


class HeadProducts(NamedTuple):
    classifier: ProductSlices
    features: ProductSlices  # no product: rows and columns are the channels of the residual


@functools.cache
def head_products(slices: tuple[int, ...]) -> HeadProducts:
    each = unflatten(HeadSlice, slices)
    classifier = (ProductSlice(s.classes, s.embed, s.class_offset, s.embed_offset) for s in each)
    features = (ProductSlice(s.embed, s.embed, s.embed_offset, s.embed_offset) for s in each)
    return HeadProducts(ProductSlices(classifier), ProductSlices(features))


@functools.cache
def stem_product(slices: tuple[int, ...], pixels: int) -> ProductSlices:
    """The patch embedding, whose columns are all ``pixels`` of a patch, channel by channel."""
    return ProductSlices(ProductSlice(s.embed, pixels, s.embed_offset, 0) for s in unflatten(EmbedSlice, slices))
