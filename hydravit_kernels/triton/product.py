"""The product that everything else is made of: rows of activations times a part of a weight.

``y[row, n] = after(sum over k of before(x)[row, k] * weight[n, k])``, or with ``weight[k, n]`` for the gradient of the
activations. Fused before: the norm, or a scale per channel. Fused after, in this order: bias, GELU or its derivative,
scale per channel, scale per image, residual. The norm's statistics are computed apart, once per row: every tile of
columns needs them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import Batch, launch, precision, tiles
from hydravit_kernels.triton.parts import Parts, column_of, part_of, row_of


class Norm(NamedTuple):
    """A norm to apply while its input is read: ``mean`` and ``rstd (rows,)`` of the rows, parameters ``(D,)``."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor


NO_NORM = (None, None, None, None)


@triton.jit
def gelu(x):
    """By the error function, in float32 (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def normalised(x, mean, rstd, weight, bias):  # [ROWS, COLUMNS], [ROWS], [ROWS], [COLUMNS], [COLUMNS]
    """In the dtype of ``x``, as a product takes it."""
    centred = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return (centred * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]).to(x.dtype)


# Grid: (groups * tiles of rows * tiles of columns,). Tiles of one range of rows follow each other: they share x.
@triton.jit(do_not_specialize=["rows_per_group", "tokens", "column_tiles"])
def _product_kernel(
    x, weight, y, x_stride, weight_stride, y_stride, slices, rows_per_group, tokens, column_tiles,
    mean, rstd, norm_weight, norm_bias, input_scale,
    bias, hidden, activated, output_scale, branch_scale, residual, residual_stride,
    TRANSPOSED: tl.constexpr, QKV: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = row_tile // tiles_per_group
    part = part_of(slices, group, ALIGN)
    if TRANSPOSED:
        inputs, outputs = part.rows, part.columns
    else:
        inputs, outputs = part.columns, part.rows
    if column_tile * COLUMNS >= outputs:
        return

    i = row_tile % tiles_per_group * ROWS + tl.arange(0, ROWS)
    row = (group * rows_per_group + i).to(tl.int64)
    row_here = i < rows_per_group
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < outputs
    if TRANSPOSED:
        n_place = column_of(n, part, QKV, SPREAD)
    else:
        n_place = row_of(n, part, QKV, SPREAD)
    if mean is not None:
        row_mean = tl.load(mean + row, mask=row_here, other=0.0)
        row_rstd = tl.load(rstd + row, mask=row_here, other=0.0)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inputs, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_here = k < inputs
        a_mask = row_here[:, None] & k_here[None, :]
        a = tl.load(x + row[:, None] * x_stride + k[None, :], mask=a_mask, other=0.0)  # [ROWS, DEPTH]
        if TRANSPOSED:
            k_place = row_of(k, part, QKV, SPREAD)
            place = k_place[:, None] * weight_stride + n_place[None, :]
        else:
            k_place = column_of(k, part, QKV, SPREAD)
            place = k_place[:, None] + n_place[None, :] * weight_stride
        b = tl.load(weight + place, mask=k_here[:, None] & n_here[None, :], other=0.0)  # [DEPTH, COLUMNS]
        if mean is not None:
            gain = tl.load(norm_weight + k_place, mask=k_here, other=0.0)
            offset = tl.load(norm_bias + k_place, mask=k_here, other=0.0)
            a = normalised(a, row_mean, row_rstd, gain, offset)
        if input_scale is not None:
            channel_scale = tl.load(input_scale + k_place, mask=k_here, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * channel_scale[None, :]).to(a.dtype)
        # A weight of another dtype is cast here, tile by tile: no cast copy of it exists.
        total = tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)

    mask = row_here[:, None] & n_here[None, :]
    out = row[:, None] * y_stride + n[None, :]
    if bias is not None:
        total += tl.load(bias + n_place, mask=n_here, other=0.0).to(tl.float32)[None, :]
    if GELU == "forward":
        if hidden is not None:
            tl.store(hidden + out, total.to(hidden.dtype.element_ty), mask=mask)
        total = gelu(total)
    if GELU == "backward":
        before = tl.load(hidden + out, mask=mask, other=0.0).to(tl.float32)
        if activated is not None:
            tl.store(activated + out, gelu(before).to(activated.dtype.element_ty), mask=mask)
        total *= gelu_derivative(before)
    if output_scale is not None:
        total *= tl.load(output_scale + n_place, mask=n_here, other=0.0).to(tl.float32)[None, :]
    if branch_scale is not None:
        total *= tl.load(branch_scale + row // tokens, mask=row_here, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        # A branch without inputs is skipped, its bias too.
        total = tl.where(inputs > 0, total, 0.0)
        total += tl.load(residual + row[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + out, total.to(y.dtype.element_ty), mask=mask)


def product(
    batch: Batch,
    x: Tensor,
    weight: Tensor,
    parts: Parts,
    *,
    transposed: bool = False,
    y: Tensor | None = None,
    norm: Norm | None = None,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: str = "",
    hidden: Tensor | None = None,
    activated: Tensor | None = None,
    output_scale: Tensor | None = None,
    branch_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``x (rows, inputs)`` to ``(rows, outputs)`` in the same dtype; written to ``y`` where that is given.

    ``weight`` is the full one; ``bias``, ``input_scale`` and ``output_scale`` are full vectors of its axes. ``gelu``:
    ``"forward"`` applies it, and writes what it is applied to into ``hidden`` if given; ``"backward"`` multiplies with
    its derivative at ``hidden``, and writes its value there into ``activated`` if given. A row of ``branch_scale (B,)``
    is an image's; ``residual (rows, outputs)`` is added last, and is all that a skipped branch leaves.
    """
    outputs = parts.columns if transposed else parts.rows
    if y is None:
        y = batch.new(x, outputs)
    t = tiles("gelu_backward" if gelu == "backward" else "product", x, parts.align)
    column_tiles = triton.cdiv(outputs, t.columns)
    launch(
        _product_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, t.rows) * column_tiles,), x,
        x, weight, y, x.stride(0), weight.stride(0), y.stride(0),
        parts.slices(batch.subnet), batch.rows_per_group, batch.tokens, column_tiles,
        *(norm or NO_NORM), input_scale,
        bias, hidden, activated, output_scale, branch_scale, residual, 0 if residual is None else residual.stride(0),
        TRANSPOSED=transposed, QKV=parts.qkv, SPREAD=parts.spread, ALIGN=parts.align, GELU=gelu,
        PRECISION=precision(), ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, tiles=t,
    )  # fmt: skip
    return y
