"""Gradients of parameters: sums over all rows, added to the slice of the full-size buffers.

A sum over rows is split (see ``RowSplits``). Programs compute the partial sums in float32 side by side, and a second
kernel adds them in a fixed order, so that the same call gives the same bits. Where images have different slices, every
slice has partial sums of its own, over its own images only. The second kernel then runs for one slice after the other,
because slices may share elements of a buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import CHUNK, ROWS, Batch, dot, launch, precision, split_rows, tiles
from hydravit_kernels.triton.norm import Norm
from hydravit_kernels.triton.slices import ProductSlices, decode, slice_at, weight_column, weight_row


class Patches(NamedTuple):
    """How rows are read from images ``(B, channels, height, width)`` of any strides: a row is the pixels of a patch.

    The first ``prefix_tokens`` of an image's ``tokens`` rows are class and register tokens, which have no patch and are
    zero.
    """

    image_stride: int
    channel_stride: int
    y_stride: int
    x_stride: int
    grid_width: int
    tokens: int
    prefix_tokens: int


@triton.jit
def patch_values(images, row, k, mask, patches, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Elements ``k`` of rows ``row``: a tile ``[row, k]``. ``k`` counts channels, then pixel rows, then pixels."""
    token = row % patches.tokens - patches.prefix_tokens
    origin = (row // patches.tokens).to(tl.int64) * patches.image_stride
    origin += token // patches.grid_width * (HEIGHT * patches.y_stride)
    origin += token % patches.grid_width * (WIDTH * patches.x_stride)
    within = k // (HEIGHT * WIDTH) * patches.channel_stride
    within += k % (HEIGHT * WIDTH) // WIDTH * patches.y_stride + k % WIDTH * patches.x_stride
    return tl.load(images + origin[:, None] + within[None, :], mask=mask & (token >= 0)[:, None], other=0.0)


@triton.jit
def _group_rows(group, index, slices, rows_per_group, rows):
    """The rows ``[start, stop)`` of a group; none where the group is an image of another slice than ``index``."""
    start = group * rows_per_group
    stop = tl.minimum(start + rows_per_group, rows)
    if slices.width_index is not None:
        stop = tl.where(tl.load(slices.width_index + group) == index, stop, start)
    return start, stop


@triton.jit(do_not_specialize=["rows", "groups", "groups_per_split", "rows_per_group", "tokens", "column_tiles"])
def _weight_gradient_kernel(
    grad, x, partial, grad_stride, x_stride, partial_rows, partial_columns, slices,
    rows, groups, groups_per_split, rows_per_group, tokens, column_tiles,
    branch_scale, patches,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K_STEP: tl.constexpr,
):  # fmt: skip
    """Compute one tile ``[ROWS, COLUMNS]`` of one split of ``grad.T @ x``, in steps of ``K_STEP`` activation rows.

    Grid: (row tiles * column tiles of the gradient, splits, slices)

    grad: (rows, outputs)
    x: (rows, inputs), or the images of ``patches``
    partial: (slices, splits, partial_rows, partial_columns) float32, the result
    branch_scale: (images,) or None, multiplies ``grad``
    """
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    split, index = tl.program_id(1), tl.program_id(2)
    s = slice_at(slices, index, ALIGN)
    if (row_tile * ROWS >= s.rows) | (column_tile * COLUMNS >= s.columns):
        return
    n = row_tile * ROWS + tl.arange(0, ROWS)
    k = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < s.rows
    k_here = k < s.columns

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_group = split * groups_per_split
    for group in range(first_group, tl.minimum(first_group + groups_per_split, groups)):
        row_start, row_stop = _group_rows(group, index, slices, rows_per_group, rows)
        for start in range(row_start, row_stop, K_STEP):
            row = start + tl.arange(0, K_STEP)
            here = row < row_stop
            g_mask = here[:, None] & n_here[None, :]
            g_place = row.to(tl.int64)[:, None] * grad_stride + n[None, :]
            g = tl.load(grad + g_place, mask=g_mask, other=0.0)  # [K_STEP, ROWS]
            if branch_scale is not None:
                image_scale = tl.load(branch_scale + row // tokens, mask=here, other=0.0).to(tl.float32)
                g = (g.to(tl.float32) * image_scale[:, None]).to(g.dtype)
            mask = here[:, None] & k_here[None, :]
            if patches is not None:
                a = patch_values(x, row, k, mask, patches, PATCH_HEIGHT, PATCH_WIDTH)  # [K_STEP, COLUMNS]
            else:
                a = tl.load(x + row.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
            total = dot(tl.trans(g), a, total, PRECISION)
    partial_row = (index * tl.num_programs(1) + split).to(tl.int64) * partial_rows
    place = (partial_row + n)[:, None] * partial_columns + k[None, :]
    tl.store(partial + place, total, mask=n_here[:, None] & k_here[None, :])


@triton.jit(do_not_specialize=["n_start", "n_stop", "splits"])
def _add_weight_gradient_kernel(
    partial, buffer, scale, partial_rows, partial_columns, buffer_stride, encoded_slice, n_start, n_stop, splits,
    QKV: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one slice, rows ``[n_start, n_stop)``, to one tile ``[ROWS, COLUMNS]`` of the buffer.

    Grid: (row tiles of the range, column tiles)

    partial: (splits, partial_rows, partial_columns) float32
    buffer: the full matrix
    scale: full vector of the outputs or None, multiplies the sum
    """
    s = decode(encoded_slice, ALIGN)
    n = n_start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < n_stop
    mask = n_here[:, None] & (k < s.columns)[None, :]
    place = (n[:, None] * partial_columns + k[None, :])[None, :, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # SPLITS partial sums are loaded at once, because one at a time would wait for memory again and again.
    for start in range(0, splits, SPLITS):
        split = (start + tl.arange(0, SPLITS))[:, None, None]
        piece = partial + split.to(tl.int64) * partial_rows * partial_columns
        total += tl.sum(tl.load(piece + place, mask=mask[None, :, :] & (split < splits), other=0.0), 0)
    full_n = weight_row(n, s, QKV, SPREAD)
    if scale is not None:
        total *= tl.load(scale + full_n, mask=n_here, other=0.0).to(tl.float32)[:, None]
    place = buffer + full_n[:, None] * buffer_stride + weight_column(k, s, QKV, SPREAD)[None, :]
    total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(buffer.dtype.element_ty), mask=mask)


def add_weight_gradient(
    batch: Batch,
    grad: Tensor,
    x: Tensor,
    buffer: Tensor | None,
    slices: ProductSlices,
    *,
    branch_scale: Tensor | None = None,
    scale: Tensor | None = None,
    patches: Patches | None = None,
    patch_size: tuple[int, int] = (1, 1),
) -> None:
    """Add the gradient of a product's weight to ``buffer``. A buffer of None means that it is not wanted.

    Args:
        grad: ``(rows, outputs)``, the gradient of the product's result.
        x: ``(rows, inputs)``, what the product multiplied, or the images whose ``patches`` it multiplied.
        buffer: as large as the full weight.
        branch_scale: ``(B,)``, the factor of an image's rows in the product's epilogue.
        scale: full vector of the outputs, the factor per channel in the epilogue.
    """
    if buffer is None:
        return
    t, count = tiles("gradient", x, slices.align), len(slices.each)
    column_tiles = triton.cdiv(slices.columns, t.columns)
    tile_count = triton.cdiv(slices.rows, t.rows) * column_tiles
    splits = split_rows(batch, tile_count * count, t.k_step, 2, x.device)
    partial = grad.new_empty(count, splits.number, slices.rows, slices.columns, dtype=torch.float32)
    launch(
        _weight_gradient_kernel, (tile_count, splits.number, count), x,
        grad, x, partial, grad.stride(0), x.stride(0), slices.rows, slices.columns, slices.argument(batch.width_index),
        batch.rows, splits.groups, splits.groups_per_split, splits.rows_per_group, batch.tokens, column_tiles,
        branch_scale, patches,
        ALIGN=slices.align, PRECISION=precision(), PATCH_HEIGHT=patch_size[0], PATCH_WIDTH=patch_size[1],
        ROWS=t.rows, COLUMNS=t.columns, K_STEP=t.k_step, tiles=t,
    )  # fmt: skip
    for sums, s, encoded in zip(partial, slices.each, slices.encoded, strict=True):
        for start, stop in slices.distinct_rows(s):
            launch(
                _add_weight_gradient_kernel, (triton.cdiv(stop - start, 8), triton.cdiv(s.columns, CHUNK)), x,
                sums, buffer, scale, slices.rows, slices.columns, buffer.stride(0), encoded, start, stop, splits.number,
                QKV=slices.qkv, SPREAD=slices.spread, ALIGN=slices.align, SPLITS=8, ROWS=8, COLUMNS=CHUNK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "groups", "groups_per_split", "rows_per_group", "tokens"])
def _column_sums_kernel(
    grad, x, partial, grad_stride, x_stride, partial_columns, slices,
    rows, groups, groups_per_split, rows_per_group, tokens, mean, rstd, branch_scale,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum ``COLUMNS`` columns of ``grad`` and ``grad * x`` over one split of the rows, ``[ROWS, COLUMNS]`` at a time.

    Grid: (column chunks, splits, slices)

    grad: (rows, columns)
    x: (rows, columns), or None: only ``grad`` is summed
    mean, rstd: (rows,) float32 of the norm of ``x``; None: ``x`` is not normalised
    partial: (slices, splits, 2, partial_columns) float32, the result: the plain sums, then those with ``x``
    branch_scale: (images,) or None, multiplies ``grad``
    """
    split, index = tl.program_id(1), tl.program_id(2)
    s = slice_at(slices, index, ALIGN)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < s.rows
    if tl.program_id(0) * COLUMNS >= s.rows:
        return
    plain = tl.zeros((ROWS, COLUMNS), tl.float32)
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_group = split * groups_per_split
    for group in range(first_group, tl.minimum(first_group + groups_per_split, groups)):
        row_start, row_stop = _group_rows(group, index, slices, rows_per_group, rows)
        for start in range(row_start, row_stop, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            here = row < row_stop
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


@triton.jit(do_not_specialize=["n_start", "n_stop", "splits"])
def _add_column_sums_kernel(
    partial, plain, weighted, scale, partial_columns, encoded_slice, n_start, n_stop, splits,
    QKV: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one slice, columns ``[n_start, n_stop)``, to ``COLUMNS`` elements of the buffers.

    Grid: (column chunks of the range,)

    partial: (splits, 2, partial_columns) float32, as ``_column_sums_kernel`` stores them
    plain, weighted: buffers, full vectors or None
    scale: full vector or None, multiplies the plain sums
    """
    s = decode(encoded_slice, ALIGN)
    n = n_start + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = n < n_stop
    plain_total = tl.zeros((COLUMNS,), tl.float32)
    weighted_total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, splits, SPLITS):
        split = (start + tl.arange(0, SPLITS))[:, None]
        place = partial + split * 2 * partial_columns + n[None, :]
        mask = here[None, :] & (split < splits)
        if plain is not None:
            plain_total += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        if weighted is not None:
            weighted_total += tl.sum(tl.load(place + partial_columns, mask=mask, other=0.0), 0)
    full_n = weight_row(n, s, QKV, SPREAD)
    if plain is not None:
        if scale is not None:
            plain_total *= tl.load(scale + full_n, mask=here, other=0.0).to(tl.float32)
        plain_total += tl.load(plain + full_n, mask=here, other=0.0).to(tl.float32)
        tl.store(plain + full_n, plain_total.to(plain.dtype.element_ty), mask=here)
    if weighted is not None:
        weighted_total += tl.load(weighted + full_n, mask=here, other=0.0).to(tl.float32)
        tl.store(weighted + full_n, weighted_total.to(weighted.dtype.element_ty), mask=here)


def add_column_sums(
    batch: Batch,
    grad: Tensor,
    plain: Tensor | None,
    weighted: Tensor | None,
    slices: ProductSlices,
    *,
    x: Tensor | None = None,
    norm: Norm | None = None,
    branch_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Sum over the rows: add ``scale * sum(grad)`` to ``plain`` and ``sum(grad * x)`` to ``weighted``.

    The first is the gradient of a bias, the second that of a scale or of a norm's weight.

    Args:
        grad: ``(rows, columns)``, whose columns are the rows of the slices.
        plain, weighted: full vectors. None means that the gradient is not wanted.
        x: ``(rows, columns)``.
        norm: normalises ``x`` with its mean and rstd first.
        branch_scale: ``(B,)``, multiplies an image's rows of ``grad``.
        scale: full vector.
    """
    if plain is None and weighted is None:
        return
    x = None if weighted is None else x
    chunks, count = triton.cdiv(slices.rows, CHUNK), len(slices.each)
    splits = split_rows(batch, chunks * count, ROWS, 4, grad.device)
    partial = grad.new_empty(count, splits.number, 2, slices.rows, dtype=torch.float32)
    mean, rstd = (None, None) if norm is None or x is None else (norm.mean, norm.rstd)
    launch(
        _column_sums_kernel, (chunks, splits.number, count), grad,
        grad, x, partial, grad.stride(0), 0 if x is None else x.stride(0), slices.rows,
        slices.argument(batch.width_index), batch.rows, splits.groups, splits.groups_per_split, splits.rows_per_group,
        batch.tokens, mean, rstd, branch_scale,
        ALIGN=slices.align, ROWS=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    for sums, s, encoded in zip(partial, slices.each, slices.encoded, strict=True):
        # A branch without columns is skipped: its biases and its norm have no gradient.
        for start, stop in slices.distinct_rows(s) if s.columns else ():
            launch(
                _add_column_sums_kernel, (triton.cdiv(stop - start, CHUNK),), grad,
                sums, plain, weighted, scale, slices.rows, encoded, start, stop, splits.number,
                QKV=slices.qkv, SPREAD=slices.spread, ALIGN=slices.align, SPLITS=32, COLUMNS=CHUNK,
            )  # fmt: skip
