"""The product that everything else is made of: rows of activations times a part of a weight.

``y[row, n] = after(sum over k of before(x)[row, k] * weight[n, k])``, or with ``weight[k, n]`` for the gradient of the
activations. Fused before: a scale per channel. Fused after, in this order: bias, GELU or its derivative, scale per
channel, scale per image, residual.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import Batch, dot, launch, precision, tiles
from hydravit_kernels.triton.parts import Parts, column_of, part_of, row_of


@triton.jit
def gelu(x):
    """By the error function, in float32 (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


# Grid: (groups * tiles of rows * tiles of columns,). Tiles of one range of rows follow each other: they share x.
@triton.jit(do_not_specialize=["rows_per_group", "tokens", "column_tiles"])
def _product_kernel(
    x, weight, y, x_stride, weight_stride, y_stride, slices, rows_per_group, tokens, column_tiles,
    input_scale, bias, hidden, activated, output_scale, branch_scale, residual, residual_stride,
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

    # Only the tile's first row is far away: offsets within it fit 32 bits, and so half the registers.
    first = row_tile % tiles_per_group * ROWS
    i = tl.arange(0, ROWS)
    row_here = first + i < rows_per_group
    first += group * rows_per_group
    x += tl.cast(first, tl.int64) * x_stride
    first_out = tl.cast(first, tl.int64) * y_stride
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < outputs
    if TRANSPOSED:
        n_place = column_of(n, part, QKV, SPREAD)
    else:
        n_place = row_of(n, part, QKV, SPREAD)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inputs, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_here = k < inputs
        a_mask = row_here[:, None] & k_here[None, :]
        a = tl.load(x + i[:, None] * x_stride + k[None, :], mask=a_mask, other=0.0)  # [ROWS, DEPTH]
        if TRANSPOSED:
            k_place = row_of(k, part, QKV, SPREAD)
            place = k_place[:, None] * weight_stride + n_place[None, :]
        else:
            k_place = column_of(k, part, QKV, SPREAD)
            place = k_place[:, None] + n_place[None, :] * weight_stride
        b = tl.load(weight + place, mask=k_here[:, None] & n_here[None, :], other=0.0)  # [DEPTH, COLUMNS]
        if input_scale is not None:
            channel_scale = tl.load(input_scale + k_place, mask=k_here, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * channel_scale[None, :]).to(a.dtype)
        # A weight of another dtype is cast here, tile by tile: no cast copy of it exists.
        total = dot(a, b.to(a.dtype), total, PRECISION)

    mask = row_here[:, None] & n_here[None, :]
    out = i[:, None] * y_stride + n[None, :]
    if bias is not None:
        total += tl.load(bias + n_place, mask=n_here, other=0.0).to(tl.float32)[None, :]
    if GELU == "forward":
        if hidden is not None:
            tl.store(hidden + first_out + out, total.to(hidden.dtype.element_ty), mask=mask)
        total = gelu(total)
    if GELU == "backward":
        before = tl.load(hidden + first_out + out, mask=mask, other=0.0).to(tl.float32)
        if activated is not None:
            tl.store(activated + first_out + out, gelu(before).to(activated.dtype.element_ty), mask=mask)
        total *= gelu_derivative(before)
    if output_scale is not None:
        total *= tl.load(output_scale + n_place, mask=n_here, other=0.0).to(tl.float32)[None, :]
    if branch_scale is not None:
        total *= tl.load(branch_scale + (first + i) // tokens, mask=row_here, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        # A branch without inputs is skipped, its bias too.
        total = tl.where(inputs > 0, total, 0.0)
        residual += tl.cast(first, tl.int64) * residual_stride
        total += tl.load(residual + i[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + first_out + out, total.to(y.dtype.element_ty), mask=mask)


def product(
    batch: Batch,
    x: Tensor,
    weight: Tensor,
    parts: Parts,
    *,
    transposed: bool = False,
    y: Tensor | None = None,
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
    t = tiles("gelu_backward" if gelu == "backward" else "product", x, parts.align, weight)
    column_tiles = triton.cdiv(outputs, t.columns)
    launch(
        _product_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, t.rows) * column_tiles,), x,
        x, weight, y, x.stride(0), weight.stride(0), y.stride(0),
        parts.slices(batch.subnet), batch.rows_per_group, batch.tokens, column_tiles,
        input_scale, bias, hidden, activated, output_scale, branch_scale,
        residual, 0 if residual is None else residual.stride(0),
        TRANSPOSED=transposed, QKV=parts.qkv, SPREAD=parts.spread, ALIGN=parts.align, GELU=gelu,
        PRECISION=precision(), ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, tiles=t,
    )  # fmt: skip
    return y
