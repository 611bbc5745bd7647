"""Gradients of parameters: sums over all rows, added to the slice of the full-size buffers.

A sum is cut over the rows into pieces that are computed side by side, kept apart in float32, and added in a fixed
order; so the same call gives the same bits. Where images differ in width, every slice has pieces of its own, which
take that slice's images only, and the slices are added one after the other: they may share elements of a buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import CHUNK, ROWS, Batch, dot, launch, precision, split_rows, tiles
from hydravit_kernels.triton.norm import Norm
from hydravit_kernels.triton.parts import Parts, column_of, part_at, plain_part, row_of


class Patches(NamedTuple):
    """How the rows of a product are the patches of images ``(B, channels, height, width)`` of any strides.

    The first ``prefix`` of an image's ``tokens`` rows are no patches and hold zeros.
    """

    image_stride: int
    channel_stride: int
    y_stride: int
    x_stride: int
    grid_width: int
    tokens: int
    prefix: int


@triton.jit
def patch_values(images, row, k, mask, patches, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """``[rows, k]`` of the patches, row by row of each; ``k`` counts channels, then patch rows, then patch columns."""
    token = row % patches.tokens - patches.prefix
    origin = (row // patches.tokens).to(tl.int64) * patches.image_stride
    origin += token // patches.grid_width * (HEIGHT * patches.y_stride)
    origin += token % patches.grid_width * (WIDTH * patches.x_stride)
    within = k // (HEIGHT * WIDTH) * patches.channel_stride
    within += k % (HEIGHT * WIDTH) // WIDTH * patches.y_stride + k % WIDTH * patches.x_stride
    return tl.load(images + origin[:, None] + within[None, :], mask=mask & (token >= 0)[:, None], other=0.0)


# Grid: (tiles of the gradient, pieces of the rows, slices).
@triton.jit(do_not_specialize=["rows", "groups", "groups_per_split", "rows_per_group", "tokens", "column_tiles"])
def _weight_gradient_kernel(
    grad, x, partial, grad_stride, x_stride, partial_rows, partial_columns, slices,
    rows, groups, groups_per_split, rows_per_group, tokens, column_tiles,
    branch_scale, patches,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    split, index = tl.program_id(1), tl.program_id(2)
    part = part_at(slices, index, ALIGN)
    if (row_tile * ROWS >= part.rows) | (column_tile * COLUMNS >= part.columns):
        return
    n = row_tile * ROWS + tl.arange(0, ROWS)
    k = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < part.rows
    k_here = k < part.columns

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = split * groups_per_split
    for group in range(first, tl.minimum(first + groups_per_split, groups)):
        begin = group * rows_per_group
        end = tl.minimum(begin + rows_per_group, rows)
        if slices.subnet is not None:  # another slice's image has no rows here
            end = tl.where(tl.load(slices.subnet + group) == index, end, begin)
        for start in range(begin, end, DEPTH):
            row = start + tl.arange(0, DEPTH)
            here = row < end
            g_mask = here[:, None] & n_here[None, :]
            g_place = row.to(tl.int64)[:, None] * grad_stride + n[None, :]
            g = tl.load(grad + g_place, mask=g_mask, other=0.0)  # [DEPTH, ROWS]
            if branch_scale is not None:
                image_scale = tl.load(branch_scale + row // tokens, mask=here, other=0.0).to(tl.float32)
                g = (g.to(tl.float32) * image_scale[:, None]).to(g.dtype)
            mask = here[:, None] & k_here[None, :]
            if patches is not None:
                a = patch_values(x, row, k, mask, patches, PATCH_HEIGHT, PATCH_WIDTH)  # [DEPTH, COLUMNS]
            else:
                a = tl.load(x + row.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
            total = dot(tl.trans(g), a, total, PRECISION)
    piece = (index * tl.num_programs(1) + split).to(tl.int64) * partial_rows
    place = (piece + n)[:, None] * partial_columns + k[None, :]
    tl.store(partial + place, total, mask=n_here[:, None] & k_here[None, :])


# Grid: (tiles of rows, tiles of columns).
@triton.jit(do_not_specialize=["first", "last", "splits"])
def _add_weight_gradient_kernel(
    partial, buffer, scale, partial_rows, partial_columns, buffer_stride, coded_part, first, last, splits,
    QKV: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part = plain_part(coded_part, ALIGN)
    n = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < last
    mask = n_here[:, None] & (k < part.columns)[None, :]
    place = (n[:, None] * partial_columns + k[None, :])[None, :, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, splits, PIECES):  # one piece at a time would be one wait for memory after another
        split = (start + tl.arange(0, PIECES))[:, None, None]
        piece = partial + split.to(tl.int64) * partial_rows * partial_columns
        total += tl.sum(tl.load(piece + place, mask=mask[None, :, :] & (split < splits), other=0.0), 0)
    n_place = row_of(n, part, QKV, SPREAD)
    if scale is not None:
        total *= tl.load(scale + n_place, mask=n_here, other=0.0).to(tl.float32)[:, None]
    place = buffer + n_place[:, None] * buffer_stride + column_of(k, part, QKV, SPREAD)[None, :]
    total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(buffer.dtype.element_ty), mask=mask)


def add_weight_gradient(
    batch: Batch,
    grad: Tensor,
    x: Tensor,
    buffer: Tensor | None,
    parts: Parts,
    *,
    branch_scale: Tensor | None = None,
    scale: Tensor | None = None,
    patches: Patches | None = None,
    patch_size: tuple[int, int] = (1, 1),
) -> None:
    """Add the gradient of a product's weight to ``buffer``, which is like the full weight; None: nobody wants it.

    From the gradient ``grad (rows, outputs)`` of the product and its input ``x (rows, inputs)``, or the images whose
    ``patches`` are the rows. ``branch_scale (B,)`` and ``scale``, a full vector of the outputs' axis, multiplied the
    product.
    """
    if buffer is None:
        return
    t = tiles("gradient", x, parts.align)
    column_tiles = triton.cdiv(parts.columns, t.columns)
    tile_count = triton.cdiv(parts.rows, t.rows) * column_tiles
    splits = split_rows(batch, tile_count * len(parts.parts), t.depth, 2, x.device)
    partial = grad.new_empty(len(parts.parts), splits.count, parts.rows, parts.columns, dtype=torch.float32)
    launch(
        _weight_gradient_kernel, (tile_count, splits.count, len(parts.parts)), x,
        grad, x, partial, grad.stride(0), x.stride(0), parts.rows, parts.columns, parts.slices(batch.subnet),
        batch.rows, splits.groups, splits.groups_per_split, splits.rows_per_group, batch.tokens, column_tiles,
        branch_scale, patches,
        ALIGN=parts.align, PRECISION=precision(), PATCH_HEIGHT=patch_size[0], PATCH_WIDTH=patch_size[1],
        ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, tiles=t,
    )  # fmt: skip
    for pieces, part in zip(partial, parts.parts, strict=True):
        for first, last in parts.row_ranges(part):
            launch(
                _add_weight_gradient_kernel, (triton.cdiv(last - first, 8), triton.cdiv(part.columns, CHUNK)), x,
                pieces, buffer, scale, parts.rows, parts.columns, buffer.stride(0), parts.coded(part), first, last,
                splits.count,
                QKV=parts.qkv, SPREAD=parts.spread, ALIGN=parts.align, PIECES=8, ROWS=8, COLUMNS=CHUNK,
            )  # fmt: skip


# Grid: (chunks of columns, pieces of the rows, slices).
@triton.jit(do_not_specialize=["rows", "groups", "groups_per_split", "rows_per_group", "tokens"])
def _column_sums_kernel(
    grad, x, partial, grad_stride, x_stride, partial_columns, slices,
    rows, groups, groups_per_split, rows_per_group, tokens, mean, rstd, branch_scale,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, index = tl.program_id(1), tl.program_id(2)
    part = part_at(slices, index, ALIGN)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < part.rows
    if tl.program_id(0) * COLUMNS >= part.rows:
        return
    plain = tl.zeros((ROWS, COLUMNS), tl.float32)
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = split * groups_per_split
    for group in range(first, tl.minimum(first + groups_per_split, groups)):
        begin = group * rows_per_group
        end = tl.minimum(begin + rows_per_group, rows)
        if slices.subnet is not None:
            end = tl.where(tl.load(slices.subnet + group) == index, end, begin)
        for start in range(begin, end, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            here = row < end
            mask = here[:, None] & n_here[None, :]
            g = tl.load(grad + row[:, None] * grad_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
            if branch_scale is not None:
                g *= tl.load(branch_scale + row // tokens, mask=here, other=0.0).to(tl.float32)[:, None]
            plain += g
            if x is not None:
                value = tl.load(x + row[:, None] * x_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
                if mean is not None:
                    row_mean = tl.load(mean + row, mask=here, other=0.0)
                    row_rstd = tl.load(rstd + row, mask=here, other=0.0)
                    value = (value - row_mean[:, None]) * row_rstd[:, None]
                weighted += g * value
    place = ((index * tl.num_programs(1) + split) * 2 * partial_columns).to(tl.int64) + n
    tl.store(partial + place, tl.sum(plain, 0), mask=n_here)
    if x is not None:
        tl.store(partial + place + partial_columns, tl.sum(weighted, 0), mask=n_here)


# Grid: (chunks of columns,).
@triton.jit(do_not_specialize=["first", "last", "splits"])
def _add_column_sums_kernel(
    partial, plain, weighted, scale, partial_columns, coded_part, first, last, splits,
    QKV: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part = plain_part(coded_part, ALIGN)
    n = first + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = n < last
    plain_total = tl.zeros((COLUMNS,), tl.float32)
    weighted_total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, splits, PIECES):
        split = (start + tl.arange(0, PIECES))[:, None]
        place = partial + split * 2 * partial_columns + n[None, :]
        mask = here[None, :] & (split < splits)
        if plain is not None:
            plain_total += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        if weighted is not None:
            weighted_total += tl.sum(tl.load(place + partial_columns, mask=mask, other=0.0), 0)
    n_place = row_of(n, part, QKV, SPREAD)
    if plain is not None:
        if scale is not None:
            plain_total *= tl.load(scale + n_place, mask=here, other=0.0).to(tl.float32)
        plain_total += tl.load(plain + n_place, mask=here, other=0.0).to(tl.float32)
        tl.store(plain + n_place, plain_total.to(plain.dtype.element_ty), mask=here)
    if weighted is not None:
        weighted_total += tl.load(weighted + n_place, mask=here, other=0.0).to(tl.float32)
        tl.store(weighted + n_place, weighted_total.to(weighted.dtype.element_ty), mask=here)


def add_column_sums(
    batch: Batch,
    grad: Tensor,
    plain: Tensor | None,
    weighted: Tensor | None,
    parts: Parts,
    *,
    x: Tensor | None = None,
    norm: Norm | None = None,
    branch_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Add the sum of ``grad (rows, n)`` over its rows to ``plain``, that of ``grad * x`` to ``weighted``.

    The two are full vectors of the axis that the parts' rows are of; None: nobody wants it. ``x`` is normalised by
    ``norm``, without its parameters; ``branch_scale (B,)`` multiplies an image's rows, ``scale`` the plain sum.
    """
    if plain is None and weighted is None:
        return
    x = None if weighted is None else x
    chunks = triton.cdiv(parts.rows, CHUNK)
    splits = split_rows(batch, chunks * len(parts.parts), ROWS, 4, grad.device)
    partial = grad.new_empty(len(parts.parts), splits.count, 2, parts.rows, dtype=torch.float32)
    mean, rstd = (None, None) if norm is None or x is None else (norm.mean, norm.rstd)
    launch(
        _column_sums_kernel, (chunks, splits.count, len(parts.parts)), grad,
        grad, x, partial, grad.stride(0), 0 if x is None else x.stride(0), parts.rows, parts.slices(batch.subnet),
        batch.rows, splits.groups, splits.groups_per_split, splits.rows_per_group, batch.tokens,
        mean, rstd, branch_scale,
        ALIGN=parts.align, ROWS=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    for pieces, part in zip(partial, parts.parts, strict=True):
        # Of a branch without columns, which is skipped, biases and norm have no say.
        for first, last in parts.row_ranges(part) if part.columns else ():
            launch(
                _add_column_sums_kernel, (triton.cdiv(last - first, CHUNK),), grad,
                pieces, plain, weighted, scale, parts.rows, parts.coded(part), first, last, splits.count,
                QKV=parts.qkv, SPREAD=parts.spread, ALIGN=parts.align, PIECES=32, COLUMNS=CHUNK,
            )  # fmt: skip
