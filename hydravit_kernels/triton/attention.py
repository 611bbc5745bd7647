"""Attention block: ``x + branch_scale * layer_scale * proj(attention(qkv(norm(x))))``; arguments as in ``ops.py``.

Forward is four launches: the norm; Q, K and V in one product; the heads; the projection with bias, scales and residual
in its epilogue. Backward computes the normalised x again, so that forward need not save it. A slice without heads has
products without rows or columns, which leave x as it is.
"""

from __future__ import annotations

import torch

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


def _check(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, branch_scale,
    slices, scales, subnet, query_count,
):  # fmt: skip
    """Check the arguments of forward and backward.

    Return the products, the batch and x as rows, and the same two for the queries, which are the first tokens.
    """
    products = attention_products(tuple(slices))
    count = len(products.qkv.each)
    batch, rows = batch_of(x, products.proj.rows, subnet, count)
    if len(scales) != count:
        raise RuntimeError(f"scales: one for each of {count} slices expected, {len(scales)} given")
    full = norm_weight.shape[0]
    check_weight("qkv_weight", qkv_weight, x, products.qkv, (None, full))
    check_weight("proj_weight", proj_weight, x, products.proj, (full, None))
    check_vectors(x, qkv_weight.shape[0], qkv_bias=qkv_bias)
    check_vectors(x, full, norm_weight=norm_weight, norm_bias=norm_bias, proj_bias=proj_bias, layer_scale=layer_scale)
    check_vectors(x, batch.images, branch_scale=branch_scale)
    if not 1 <= query_count <= batch.tokens:
        raise RuntimeError(f"queries: 1 to {batch.tokens} expected, {query_count} given")
    queries = Batch(batch.images, query_count, subnet)
    return products, batch, rows, queries, as_rows(x[:, :query_count])


def attention_block(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, branch_scale,
    slices, scales, eps, subnet, query_count, save,
):  # fmt: skip
    products, batch, rows, queries, query_rows = _check(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, branch_scale,
        slices, scales, subnet, query_count,
    )  # fmt: skip
    normalised = norm_forward(batch, rows, norm_weight, norm_bias, products.qkv, eps).y
    qkv = product(batch, normalised, qkv_weight, products.qkv, bias=qkv_bias)
    logsumexp = x.new_empty(batch.images, products.heads * batch.tokens, dtype=torch.float32) if save else None
    attended = attention_heads(batch, queries, qkv, products, scales, logsumexp)
    y = product(
        queries, attended, proj_weight, products.proj,
        bias=proj_bias, output_scale=layer_scale, branch_scale=branch_scale, residual=query_rows,
    ).view(batch.images, query_count, x.shape[2])  # fmt: skip
    if not save:
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    qkv, attended = (t.view(b.images, b.tokens, t.shape[1]) for b, t in ((batch, qkv), (queries, attended)))
    return y, qkv, attended, logsumexp


def attention_block_backward(
    grad, x, qkv, attended, logsumexp,
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, branch_scale,
    slices, scales, eps, subnet, query_count, x_grad,
    grad_norm_weight, grad_norm_bias, grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias,
    grad_layer_scale,
):  # fmt: skip
    products, batch, rows, queries, query_rows = _check(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, branch_scale,
        slices, scales, subnet, query_count,
    )  # fmt: skip
    check_buffers(
        x, norm_weight=(norm_weight, grad_norm_weight), norm_bias=(norm_bias, grad_norm_bias),
        qkv_weight=(qkv_weight, grad_qkv_weight), qkv_bias=(qkv_bias, grad_qkv_bias),
        proj_weight=(proj_weight, grad_proj_weight), proj_bias=(proj_bias, grad_proj_bias),
        layer_scale=(layer_scale, grad_layer_scale),
    )  # fmt: skip
    grad = rows_like(x, "grad", grad, batch.images, query_count, x.shape[2])
    # The kernels write the gradient of qkv and delta in the layout of qkv and logsumexp.
    qkv = rows_like(x, "qkv", qkv, batch.images, batch.tokens, products.qkv.rows).contiguous()
    attended = rows_like(x, "attended", attended, batch.images, query_count, products.proj.columns)
    check_tensor("logsumexp", logsumexp, x, (batch.images, products.heads * batch.tokens))
    logsumexp = logsumexp.contiguous()

    add_weight_gradient(
        queries, grad, attended, grad_proj_weight, products.proj, branch_scale=branch_scale, scale=layer_scale
    )
    add_column_sums(queries, grad, grad_proj_bias, None, products.proj, branch_scale=branch_scale, scale=layer_scale)
    if grad_layer_scale is not None:
        branch = product(queries, attended, proj_weight, products.proj, bias=proj_bias)
        add_column_sums(queries, grad, None, grad_layer_scale, products.proj, x=branch, branch_scale=branch_scale)
    norm_wanted = x_grad or grad_norm_weight is not None or grad_norm_bias is not None
    if not norm_wanted and grad_qkv_weight is None and grad_qkv_bias is None:
        return x.new_empty(0)

    d_attended = product(
        queries, grad, proj_weight, products.proj, transposed=True, input_scale=layer_scale, branch_scale=branch_scale
    )
    d_qkv = attention_heads_backward(batch, queries, d_attended, qkv, attended, logsumexp, products, scales)
    norm = norm_forward(batch, rows, norm_weight, norm_bias, products.qkv, eps)
    add_weight_gradient(batch, d_qkv, norm.y, grad_qkv_weight, products.qkv)
    add_column_sums(batch, d_qkv, grad_qkv_bias, None, products.qkv)
    if not norm_wanted:
        return x.new_empty(0)

    d_normalised = product(batch, d_qkv, qkv_weight, products.qkv, transposed=True)
    add_column_sums(batch, d_normalised, grad_norm_bias, grad_norm_weight, products.proj, x=rows, norm=norm)
    if not x_grad:
        return x.new_empty(0)
    if query_count < batch.tokens:
        residual = x.new_zeros(x.shape)
        residual[:, :query_count] = grad.view(batch.images, query_count, x.shape[2])
        grad = residual.view(rows.shape)
    return norm_backward(batch, d_normalised, rows, norm, norm_weight, products.qkv, residual=grad).view(x.shape)
