"""The matrix product of rows of activations with a slice of a weight, of which every block is made.

``y[row, n] = epilogue(sum over k of prologue(x)[row, k] * weight[n, k])``. The transposed product, for gradients of
activations, reads ``weight[k, n]``. The prologue is a scale per channel. The epilogue is, in this order: bias, GELU or
its derivative, scale per channel, scale per image, residual.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import Batch, dot, launch, precision, tiles
from hydravit_kernels.triton.slices import ProductSlices, slice_of, weight_column, weight_row


@triton.jit
def gelu(x):
    """GELU by the error function, in float32 (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit(do_not_specialize=["rows_per_group", "tokens", "column_tiles"])
def _product_kernel(
    x, weight, y, x_stride, weight_stride, y_stride, slices, rows_per_group, tokens, column_tiles,
    input_scale, bias, hidden, activated, output_scale, branch_scale, residual, residual_stride,
    TRANSPOSED: tl.constexpr, QKV: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K_STEP: tl.constexpr,
):  # fmt: skip
    """Compute one tile ``[ROWS, COLUMNS]`` of ``y``, in steps of ``K_STEP`` along the reduction axis K.

    Grid: (groups * row tiles of a group * column tiles,). Column tiles of the same rows follow each other, because they
    share rows of ``x``.

    x: (rows, inputs)
    y: (rows, outputs)
    weight: the full matrix
    input_scale, bias, output_scale: full vectors of the weight's inputs or outputs, or None
    hidden: (rows, outputs) in the layout of y: the input of GELU, which "forward" writes unless it is None
    activated: (rows, outputs) in the layout of y: GELU of hidden, which "backward" writes unless it is None
    branch_scale: (images,) or None
    residual: (rows, outputs) or None
    """
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = row_tile // tiles_per_group
    s = slice_of(slices, group, ALIGN)
    if TRANSPOSED:
        inputs, outputs = s.rows, s.columns
    else:
        inputs, outputs = s.columns, s.rows
    if column_tile * COLUMNS >= outputs:
        return

    # Pointers are moved to the tile's first row, so that offsets within the tile fit 32 bits and half the registers.
    origin = row_tile % tiles_per_group * ROWS
    i = tl.arange(0, ROWS)
    row_here = origin + i < rows_per_group
    origin += group * rows_per_group
    x += tl.cast(origin, tl.int64) * x_stride
    y_origin = tl.cast(origin, tl.int64) * y_stride
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < outputs
    # n and k count within the slice, full_n and full_k along the full weight.
    if TRANSPOSED:
        full_n = weight_column(n, s, QKV, SPREAD)
    else:
        full_n = weight_row(n, s, QKV, SPREAD)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inputs, K_STEP):
        k = start + tl.arange(0, K_STEP)
        k_here = k < inputs
        a_mask = row_here[:, None] & k_here[None, :]
        a = tl.load(x + i[:, None] * x_stride + k[None, :], mask=a_mask, other=0.0)  # [ROWS, K_STEP]
        if TRANSPOSED:
            full_k = weight_row(k, s, QKV, SPREAD)
            place = full_k[:, None] * weight_stride + full_n[None, :]
        else:
            full_k = weight_column(k, s, QKV, SPREAD)
            place = full_k[:, None] + full_n[None, :] * weight_stride
        b = tl.load(weight + place, mask=k_here[:, None] & n_here[None, :], other=0.0)  # [K_STEP, COLUMNS]
        if input_scale is not None:
            channel_scale = tl.load(input_scale + full_k, mask=k_here, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * channel_scale[None, :]).to(a.dtype)
        # A weight of another dtype is cast here, tile by tile, so that no cast copy of it exists.
        total = dot(a, b.to(a.dtype), total, PRECISION)

    mask = row_here[:, None] & n_here[None, :]
    out = i[:, None] * y_stride + n[None, :]
    if bias is not None:
        total += tl.load(bias + full_n, mask=n_here, other=0.0).to(tl.float32)[None, :]
    if GELU == "forward":
        if hidden is not None:
            tl.store(hidden + y_origin + out, total.to(hidden.dtype.element_ty), mask=mask)
        total = gelu(total)
    if GELU == "backward":
        before = tl.load(hidden + y_origin + out, mask=mask, other=0.0).to(tl.float32)
        if activated is not None:
            tl.store(activated + y_origin + out, gelu(before).to(activated.dtype.element_ty), mask=mask)
        total *= gelu_derivative(before)
    if output_scale is not None:
        total *= tl.load(output_scale + full_n, mask=n_here, other=0.0).to(tl.float32)[None, :]
    if branch_scale is not None:
        total *= tl.load(branch_scale + (origin + i) // tokens, mask=row_here, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        # A branch without inputs is skipped, its bias too.
        total = tl.where(inputs > 0, total, 0.0)
        residual += tl.cast(origin, tl.int64) * residual_stride
        total += tl.load(residual + i[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + y_origin + out, total.to(y.dtype.element_ty), mask=mask)


def product(
    batch: Batch,
    x: Tensor,
    weight: Tensor,
    slices: ProductSlices,
    *,
    transposed: bool = False,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: str = "",
    hidden: Tensor | None = None,
    activated: Tensor | None = None,
    output_scale: Tensor | None = None,
    branch_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply ``x (rows, inputs)`` with a slice of ``weight``; the result is ``(rows, outputs)`` in the same dtype.

    Args:
        weight: the full matrix.
        transposed: the slice's rows are the inputs and its columns the outputs.
        input_scale, bias, output_scale: full vectors of the weight's inputs or outputs.
        gelu: "forward" applies GELU and writes its input to ``hidden`` if given. "backward" multiplies with the
            derivative of GELU at ``hidden`` and writes GELU's value there to ``activated`` if given.
        branch_scale: ``(B,)``, multiplies an image's rows.
        residual: ``(rows, outputs)``, added last; where the slice has no inputs it is the whole result.
    """
    outputs = slices.columns if transposed else slices.rows
    y = batch.new(x, outputs)
    t = tiles("gelu_backward" if gelu == "backward" else "product", x, slices.align, weight)
    column_tiles = triton.cdiv(outputs, t.columns)
    launch(
        _product_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, t.rows) * column_tiles,), x,
        x, weight, y, x.stride(0), weight.stride(0), y.stride(0),
        slices.argument(batch.width_index), batch.rows_per_group, batch.tokens, column_tiles,
        input_scale, bias, hidden, activated, output_scale, branch_scale,
        residual, 0 if residual is None else residual.stride(0),
        TRANSPOSED=transposed, QKV=slices.qkv, SPREAD=slices.spread, ALIGN=slices.align, GELU=gelu,
        PRECISION=precision(), ROWS=t.rows, COLUMNS=t.columns, K_STEP=t.k_step, tiles=t,
    )  # fmt: skip
    return y
