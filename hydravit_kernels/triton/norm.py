"""Layer norm over a slice's channels (arXiv 1607.06450), and its backward.

It is a pass of its own, once per row. Fused into the product behind it, every column tile of that product would
normalise the same rows again, which takes about as long as multiplying them. The variance is the mean square of the
centred values, so nothing cancels; the loops after the first find the row in cache. Every loop takes ``CHUNK`` columns
at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import CHUNK, ROWS, Batch, launch
from hydravit_kernels.triton.slices import ProductSlices, slice_of


class Norm(NamedTuple):
    """``y (rows, columns)`` in the input's dtype, and for backward ``mean`` and ``rstd (rows,)`` in float32."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


@triton.jit(do_not_specialize=["rows_per_group"])
def _norm_kernel(
    x, y, mean, rstd, norm_weight, norm_bias, x_stride, y_stride, slices, rows_per_group, eps,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalise ``ROWS`` rows of one group, with tiles ``[ROWS, COLUMNS]``.

    Grid: (groups * row tiles of a group,)

    x, y: (rows, columns)
    mean, rstd: (rows,) float32, results
    norm_weight, norm_bias: vectors of the full model's channels
    """
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = tl.program_id(0) // tiles_per_group
    s = slice_of(slices, group, ALIGN)
    i = tl.program_id(0) % tiles_per_group * ROWS + tl.arange(0, ROWS)
    here = i < rows_per_group
    row = (group * rows_per_group + i).to(tl.int64)

    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, s.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = here[:, None] & (k < s.columns)[None, :]
        total += tl.sum(tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32), 1)
    row_mean = total / s.columns
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, s.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = here[:, None] & (k < s.columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, value - row_mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    row_rstd = tl.rsqrt(squares / s.columns + eps)
    tl.store(mean + row, row_mean, mask=here)
    tl.store(rstd + row, row_rstd, mask=here)
    for start in range(0, s.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        k_here = k < s.columns
        mask = here[:, None] & k_here[None, :]
        gain = tl.load(norm_weight + s.first_column + k, mask=k_here, other=0.0).to(tl.float32)
        offset = tl.load(norm_bias + s.first_column + k, mask=k_here, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        value = (value - row_mean[:, None]) * row_rstd[:, None] * gain[None, :] + offset[None, :]
        tl.store(y + row[:, None] * y_stride + k[None, :], value.to(y.dtype.element_ty), mask=mask)


def norm_forward(batch: Batch, x: Tensor, weight: Tensor, bias: Tensor, slices: ProductSlices, eps: float) -> Norm:
    """Normalise the rows of ``x (rows, columns)``; ``weight`` and ``bias`` are the full vectors.

    ``slices`` are those of the product behind the norm, whose columns are the channels.
    """
    y = batch.new(x, slices.columns)
    mean, rstd = (x.new_empty(batch.rows, dtype=torch.float32) for _ in range(2))
    launch(
        _norm_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, ROWS),), x,
        x, y, mean, rstd, weight, bias, x.stride(0), y.stride(0),
        slices.argument(batch.width_index), batch.rows_per_group, eps,
        ALIGN=slices.align, ROWS=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    return Norm(y, mean, rstd)


@triton.jit
def _scaled_and_centred(
    grad, x, grad_stride, x_stride, norm_weight, s, row, here, k, row_mean, row_rstd,
):  # fmt: skip
    """Columns ``k`` of ``grad`` times the gain, of the normalised rows without the gain, and where they exist."""
    k_here = k < s.columns
    mask = here[:, None] & k_here[None, :]
    # A branch without outputs is skipped, so its norm has no gradient: the gain counts as zero.
    gain = tl.load(norm_weight + s.first_column + k, mask=k_here & (s.rows > 0), other=0.0).to(tl.float32)
    scaled = tl.load(grad + row[:, None] * grad_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    return scaled * gain[None, :], (value - row_mean[:, None]) * row_rstd[:, None], mask


@triton.jit(do_not_specialize=["rows_per_group"])
def _backward_kernel(
    grad, x, residual, dx, grad_stride, x_stride, residual_stride, dx_stride, slices, rows_per_group,
    mean, rstd, norm_weight,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the norm's input for ``ROWS`` rows of one group, with tiles ``[ROWS, COLUMNS]``.

    Grid: (groups * row tiles of a group,)

    grad: (rows, columns), the gradient of the norm's output
    x, residual, dx: (rows, columns); dx is the result, a residual of None is zero
    mean, rstd: (rows,) float32, from forward
    norm_weight: vector of the full model's channels
    """
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = tl.program_id(0) // tiles_per_group
    s = slice_of(slices, group, ALIGN)
    i = tl.program_id(0) % tiles_per_group * ROWS + tl.arange(0, ROWS)
    here = i < rows_per_group
    row = (group * rows_per_group + i).to(tl.int64)
    row_mean = tl.load(mean + row, mask=here, other=0.0)
    row_rstd = tl.load(rstd + row, mask=here, other=0.0)

    scaled_sum = tl.zeros((ROWS,), tl.float32)
    product_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(0, s.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        scaled, centred, _ = _scaled_and_centred(
            grad, x, grad_stride, x_stride, norm_weight, s, row, here, k, row_mean, row_rstd
        )
        scaled_sum += tl.sum(scaled, 1)
        product_sum += tl.sum(scaled * centred, 1)
    scaled_mean = scaled_sum / s.columns
    product_mean = product_sum / s.columns
    for start in range(0, s.columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        scaled, centred, mask = _scaled_and_centred(
            grad, x, grad_stride, x_stride, norm_weight, s, row, here, k, row_mean, row_rstd
        )
        result = (scaled - scaled_mean[:, None] - centred * product_mean[:, None]) * row_rstd[:, None]
        if residual is not None:
            place = row[:, None] * residual_stride + k[None, :]
            result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * dx_stride + k[None, :], result.to(dx.dtype.element_ty), mask=mask)


def norm_backward(
    batch: Batch,
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    slices: ProductSlices,
    residual: Tensor | None = None,
) -> Tensor:
    """The gradient of ``x`` from ``grad (rows, columns)``, that of the norm's output; ``residual`` is added to it."""
    dx = batch.new(x, slices.columns)
    launch(
        _backward_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, ROWS),), x,
        grad, x, residual, dx,
        grad.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), dx.stride(0),
        slices.argument(batch.width_index), batch.rows_per_group,
        norm.mean, norm.rstd, weight,
        ALIGN=slices.align, ROWS=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    return dx
