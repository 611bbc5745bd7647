"""Layer norm over a part's channels (arXiv 1607.06450): statistics, the norm alone, and its backward.

Products apply the norm while they read; only the statistics are computed here, in two passes over a row that is in
cache for the second one, so that nothing cancels. Every loop goes over chunks of 64 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import CHUNK, Batch, launch, row_tiles
from hydravit_kernels.triton.parts import Parts, part_of
from hydravit_kernels.triton.product import Norm, normalised


# Grid: (groups * tiles of rows,).
@triton.jit(do_not_specialize=["rows_per_group"])
def _statistics_kernel(
    x, mean, rstd, y, norm_weight, norm_bias, x_stride, y_stride, slices, rows_per_group, eps,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = tl.program_id(0) // tiles_per_group
    part = part_of(slices, group, ALIGN)
    i = tl.program_id(0) % tiles_per_group * ROWS + tl.arange(0, ROWS)
    here = i < rows_per_group
    row = (group * rows_per_group + i).to(tl.int64)

    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, part.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = here[:, None] & (k < part.columns)[None, :]
        total += tl.sum(tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32), 1)
    row_mean = total / part.columns
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, part.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = here[:, None] & (k < part.columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, value - row_mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    row_rstd = tl.rsqrt(squares / part.columns + eps)
    tl.store(mean + row, row_mean, mask=here)
    tl.store(rstd + row, row_rstd, mask=here)
    if y is not None:
        for start in range(0, part.columns, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            k_here = k < part.columns
            mask = here[:, None] & k_here[None, :]
            value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
            gain = tl.load(norm_weight + part.column + k, mask=k_here, other=0.0)
            offset = tl.load(norm_bias + part.column + k, mask=k_here, other=0.0)
            value = normalised(value, row_mean, row_rstd, gain, offset)
            tl.store(y + row[:, None] * y_stride + k[None, :], value, mask=mask)


def norm_of(
    batch: Batch, x: Tensor, weight: Tensor, bias: Tensor, parts: Parts, eps: float, y: Tensor | None = None
) -> Norm:
    """Statistics of ``x (rows, columns)``; with ``y``, of the same shape, also the normalised rows themselves."""
    mean, rstd = (x.new_empty(batch.rows, dtype=torch.float32) for _ in range(2))
    rows = row_tiles(x)
    launch(
        _statistics_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, rows),), x,
        x, mean, rstd, y, weight, bias, x.stride(0), 0 if y is None else y.stride(0),
        parts.slices(batch.subnet), batch.rows_per_group, eps,
        ALIGN=parts.align, ROWS=rows, COLUMNS=CHUNK,
    )  # fmt: skip
    return Norm(mean, rstd, weight, bias)


# Grid: (groups * tiles of rows,).
@triton.jit(do_not_specialize=["rows_per_group"])
def _backward_kernel(
    grad, x, residual, dx, grad_stride, x_stride, residual_stride, dx_stride, slices, rows_per_group,
    mean, rstd, norm_weight, norm_bias,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = tl.program_id(0) // tiles_per_group
    part = part_of(slices, group, ALIGN)
    i = tl.program_id(0) % tiles_per_group * ROWS + tl.arange(0, ROWS)
    here = i < rows_per_group
    row = (group * rows_per_group + i).to(tl.int64)
    row_mean = tl.load(mean + row, mask=here, other=0.0)
    row_rstd = tl.load(rstd + row, mask=here, other=0.0)

    scaled_sum = tl.zeros((ROWS,), tl.float32)
    product_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(0, part.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        k_here = k < part.columns
        mask = here[:, None] & k_here[None, :]
        # A branch without outputs is skipped: its norm has no say.
        gain = tl.load(norm_weight + part.column + k, mask=k_here & (part.rows > 0), other=0.0).to(tl.float32)
        scaled = tl.load(grad + row[:, None] * grad_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        scaled *= gain[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        scaled_sum += tl.sum(scaled, 1)
        product_sum += tl.sum(scaled * (value - row_mean[:, None]) * row_rstd[:, None], 1)
    scaled_mean = scaled_sum / part.columns
    product_mean = product_sum / part.columns
    for start in range(0, part.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        k_here = k < part.columns
        mask = here[:, None] & k_here[None, :]
        gain = tl.load(norm_weight + part.column + k, mask=k_here & (part.rows > 0), other=0.0).to(tl.float32)
        scaled = tl.load(grad + row[:, None] * grad_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        scaled *= gain[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        centred = (value - row_mean[:, None]) * row_rstd[:, None]
        result = (scaled - scaled_mean[:, None] - centred * product_mean[:, None]) * row_rstd[:, None]
        if residual is not None:
            place = row[:, None] * residual_stride + k[None, :]
            result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * dx_stride + k[None, :], result.to(dx.dtype.element_ty), mask=mask)


def norm_backward(
    batch: Batch, grad: Tensor, x: Tensor, norm: Norm, parts: Parts, residual: Tensor | None = None
) -> Tensor:
    """Gradient of the norm's input from the gradient ``grad (rows, columns)`` of its output, plus ``residual``."""
    dx = batch.new(x, parts.columns)
    rows = row_tiles(x)
    launch(
        _backward_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, rows),), x,
        grad, x, residual, dx,
        grad.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), dx.stride(0),
        parts.slices(batch.subnet), batch.rows_per_group, *norm,
        ALIGN=parts.align, ROWS=rows, COLUMNS=CHUNK,
    )  # fmt: skip
    return dx
