"""Layer norm over a part's channels (arXiv 1607.06450), and its backward.

A pass of its own, once per row: every tile of columns of the product behind it would normalise the same rows again,
which takes about as long as multiplying them. Mean and variance are computed one after the other, so that nothing
cancels; the row is in cache from the first loop on. Every loop goes over chunks of 64 columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import CHUNK, ROWS, Batch, launch
from hydravit_kernels.triton.parts import Parts, part_of


class Norm(NamedTuple):
    """``y (rows, columns)`` in the input's dtype, and for backward ``mean`` and ``rstd (rows,)`` in float32."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


# Grid: (groups * tiles of rows,).
@triton.jit(do_not_specialize=["rows_per_group"])
def _norm_kernel(
    x, y, mean, rstd, norm_weight, norm_bias, x_stride, y_stride, slices, rows_per_group, eps,
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
    for start in range(0, part.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        k_here = k < part.columns
        mask = here[:, None] & k_here[None, :]
        gain = tl.load(norm_weight + part.column + k, mask=k_here, other=0.0).to(tl.float32)
        offset = tl.load(norm_bias + part.column + k, mask=k_here, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        value = (value - row_mean[:, None]) * row_rstd[:, None] * gain[None, :] + offset[None, :]
        tl.store(y + row[:, None] * y_stride + k[None, :], value.to(y.dtype.element_ty), mask=mask)


def norm_forward(batch: Batch, x: Tensor, weight: Tensor, bias: Tensor, parts: Parts, eps: float) -> Norm:
    """Of ``x (rows, columns)``, with the full vectors ``weight`` and ``bias``."""
    y = batch.new(x, parts.columns)
    mean, rstd = (x.new_empty(batch.rows, dtype=torch.float32) for _ in range(2))
    launch(
        _norm_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, ROWS),), x,
        x, y, mean, rstd, weight, bias, x.stride(0), y.stride(0),
        parts.slices(batch.subnet), batch.rows_per_group, eps,
        ALIGN=parts.align, ROWS=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    return Norm(y, mean, rstd)


@triton.jit
def _scaled_and_centred(
    grad, x, grad_stride, x_stride, norm_weight, part, row, here, k, row_mean, row_rstd,
):  # fmt: skip
    """Columns ``k`` of the gradient times the gain, and of the normalised rows."""
    k_here = k < part.columns
    mask = here[:, None] & k_here[None, :]
    # A branch without outputs is skipped: its norm has no say.
    gain = tl.load(norm_weight + part.column + k, mask=k_here & (part.rows > 0), other=0.0).to(tl.float32)
    scaled = tl.load(grad + row[:, None] * grad_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    return scaled * gain[None, :], (value - row_mean[:, None]) * row_rstd[:, None], mask


# Grid: (groups * tiles of rows,).
@triton.jit(do_not_specialize=["rows_per_group"])
def _backward_kernel(
    grad, x, residual, dx, grad_stride, x_stride, residual_stride, dx_stride, slices, rows_per_group,
    mean, rstd, norm_weight,
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
        scaled, centred, _ = _scaled_and_centred(
            grad, x, grad_stride, x_stride, norm_weight, part, row, here, k, row_mean, row_rstd
        )
        scaled_sum += tl.sum(scaled, 1)
        product_sum += tl.sum(scaled * centred, 1)
    scaled_mean = scaled_sum / part.columns
    product_mean = product_sum / part.columns
    for start in range(0, part.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        scaled, centred, mask = _scaled_and_centred(
            grad, x, grad_stride, x_stride, norm_weight, part, row, here, k, row_mean, row_rstd
        )
        result = (scaled - scaled_mean[:, None] - centred * product_mean[:, None]) * row_rstd[:, None]
        if residual is not None:
            place = row[:, None] * residual_stride + k[None, :]
            result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * dx_stride + k[None, :], result.to(dx.dtype.element_ty), mask=mask)


def norm_backward(
    batch: Batch, grad: Tensor, x: Tensor, norm: Norm, weight: Tensor, parts: Parts, residual: Tensor | None = None
) -> Tensor:
    """Gradient of the norm's input from the gradient ``grad (rows, columns)`` of its output, plus ``residual``."""
    dx = batch.new(x, parts.columns)
    launch(
        _backward_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, ROWS),), x,
        grad, x, residual, dx,
        grad.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), dx.stride(0),
        parts.slices(batch.subnet), batch.rows_per_group,
        norm.mean, norm.rstd, weight,
        ALIGN=parts.align, ROWS=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    return dx
