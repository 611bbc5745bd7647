"""Attention block: ``x + branch_scale * layer_scale * proj(attention(qkv(norm(x))))``; arguments as in ``ops.py``.

Forward is four launches: the norm; Q, K and V in one product; the heads; the projection with bias, scales and residual
in its epilogue. Backward computes the normalised x again, so that forward need not save it. A slice without heads has
products without rows or columns, which leave x as it is.
"""

from __future__ import annotations

import torch

from hydravit_kernels.parameters import AttentionParameters
from hydravit_kernels.triton.attention_heads import attention_heads, attention_heads_backward
from hydravit_kernels.triton.checks import (
    as_rows,
    batch_of,
    check_buffers,
    check_tensor,
    check_vectors,
    check_weight,
    rows_like,
)
from hydravit_kernels.triton.gradients import add_column_sums, add_weight_gradient
from hydravit_kernels.triton.launch import Batch
from hydravit_kernels.triton.norm import norm_backward, norm_forward
from hydravit_kernels.triton.product import product
from hydravit_kernels.triton.slices import attention_products


def _check(x, p: AttentionParameters, branch_scale, slices, scales, width_index, query_count):
    """Check the arguments of forward and backward.

    Return the products, the batch and x as rows, and the same two for the queries, which are the first tokens.
    """
    products = attention_products(tuple(slices))
    count = len(products.qkv.each)
    batch, rows = batch_of(x, products.proj.rows, width_index, count)
    if len(scales) != count:
        raise RuntimeError(f"scales: one for each of {count} slices expected, {len(scales)} given")
    full = p.norm_weight.shape[0]
    check_weight("qkv_weight", p.qkv_weight, x, products.qkv, (None, full))
    check_weight("proj_weight", p.proj_weight, x, products.proj, (full, None))
    check_vectors(x, p.qkv_weight.shape[0], p, "qkv_bias")
    check_vectors(x, full, p, "norm_weight", "norm_bias", "proj_bias", "layer_scale")
    if branch_scale is not None:
        check_tensor("branch_scale", branch_scale, x, (batch.images,))
    if not 1 <= query_count <= batch.tokens:
        raise RuntimeError(f"queries: 1 to {batch.tokens} expected, {query_count} given")
    queries = Batch(batch.images, query_count, width_index)
    return products, batch, rows, queries, as_rows(x[:, :query_count])


def attention_block(x, p: AttentionParameters, branch_scale, slices, scales, eps, width_index, query_count, save):
    products, batch, rows, queries, query_rows = _check(x, p, branch_scale, slices, scales, width_index, query_count)
    normalised = norm_forward(batch, rows, p.norm_weight, p.norm_bias, products.qkv, eps).y
    qkv = product(batch, normalised, p.qkv_weight, products.qkv, bias=p.qkv_bias)
    logsumexp = x.new_empty(batch.images, products.heads * batch.tokens, dtype=torch.float32) if save else None
    attended = attention_heads(batch, queries, qkv, products, scales, logsumexp)
    y = product(
        queries, attended, p.proj_weight, products.proj,
        bias=p.proj_bias, output_scale=p.layer_scale, branch_scale=branch_scale, residual=query_rows,
    ).view(batch.images, query_count, x.shape[2])  # fmt: skip
    if not save:
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    qkv, attended = (t.view(b.images, b.tokens, t.shape[1]) for b, t in ((batch, qkv), (queries, attended)))
    return y, qkv, attended, logsumexp


def attention_block_backward(
    grad, x, qkv, attended, logsumexp, p: AttentionParameters, branch_scale, slices, scales, eps, width_index,
    query_count, x_grad, buffers: AttentionParameters,
):  # fmt: skip
    products, batch, rows, queries, query_rows = _check(x, p, branch_scale, slices, scales, width_index, query_count)
    check_buffers(x, p, buffers)
    grad = rows_like(x, "grad", grad, batch.images, query_count, x.shape[2])
    # The kernels write the gradient of qkv and delta in the layout of qkv and logsumexp.
    qkv = rows_like(x, "qkv", qkv, batch.images, batch.tokens, products.qkv.rows).contiguous()
    attended = rows_like(x, "attended", attended, batch.images, query_count, products.proj.columns)
    check_tensor("logsumexp", logsumexp, x, (batch.images, products.heads * batch.tokens))
    logsumexp = logsumexp.contiguous()

    add_weight_gradient(
        queries, grad, attended, buffers.proj_weight, products.proj, branch_scale=branch_scale, scale=p.layer_scale
    )
    add_column_sums(
        queries, grad, buffers.proj_bias, None, products.proj, branch_scale=branch_scale, scale=p.layer_scale
    )
    if buffers.layer_scale is not None:
        branch = product(queries, attended, p.proj_weight, products.proj, bias=p.proj_bias)
        add_column_sums(queries, grad, None, buffers.layer_scale, products.proj, x=branch, branch_scale=branch_scale)
    norm_wanted = x_grad or buffers.norm_weight is not None or buffers.norm_bias is not None
    if not norm_wanted and buffers.qkv_weight is None and buffers.qkv_bias is None:
        return x.new_empty(0)

    d_attended = product(
        queries, grad, p.proj_weight, products.proj, transposed=True,
        input_scale=p.layer_scale, branch_scale=branch_scale,
    )  # fmt: skip
    d_qkv = attention_heads_backward(batch, queries, d_attended, qkv, attended, logsumexp, products, scales)
    norm = norm_forward(batch, rows, p.norm_weight, p.norm_bias, products.qkv, eps)
    add_weight_gradient(batch, d_qkv, norm.y, buffers.qkv_weight, products.qkv)
    add_column_sums(batch, d_qkv, buffers.qkv_bias, None, products.qkv)
    if not norm_wanted:
        return x.new_empty(0)

    d_normalised = product(batch, d_qkv, p.qkv_weight, products.qkv, transposed=True)
    add_column_sums(batch, d_normalised, buffers.norm_bias, buffers.norm_weight, products.proj, x=rows, norm=norm)
    if not x_grad:
        return x.new_empty(0)
    if query_count < batch.tokens:
        residual = x.new_zeros(x.shape)
        residual[:, :query_count] = grad.view(batch.images, query_count, x.shape[2])
        grad = residual.view(rows.shape)
    return norm_backward(batch, d_normalised, rows, norm, p.norm_weight, products.qkv, residual=grad).view(x.shape)
