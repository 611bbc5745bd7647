"""Head: mean of the pooled tokens, norm and classifier, each if given; arguments as in ``ops.py``.

The mean is PyTorch's, as it reads every token once anyway; a single token needs none and is a view. After it the batch
has one row per image, which is little work.
"""

from __future__ import annotations

import torch

from hydravit_kernels.parameters import HeadParameters
from hydravit_kernels.triton.checks import batch_of, check_buffers, check_vectors, check_weight, rows_like
from hydravit_kernels.triton.gradients import add_column_sums, add_weight_gradient
from hydravit_kernels.triton.norm import norm_backward, norm_forward
from hydravit_kernels.triton.product import product
from hydravit_kernels.triton.slices import ProductSlices, head_products, slice_table


def _pooled(x, pool_start, pool_stop):
    """The mean of the tokens ``[pool_start, pool_stop)``: ``(B, 1, Dk)``."""
    if not 0 <= pool_start < pool_stop <= x.shape[1]:
        raise RuntimeError(f"pool: a range in [0, {x.shape[1]}) expected, [{pool_start}, {pool_stop}) given")
    tokens = x[:, pool_start:pool_stop]
    return tokens if pool_stop - pool_start == 1 else tokens.mean(dim=1, keepdim=True)


def _own_channels(rows, features: ProductSlices, width_index):
    """A copy of ``rows (B, Dk)`` that is zero beyond each image's own channels."""
    if width_index is None:
        return rows.clone()
    own = slice_table(features.each, rows.device)[width_index, 1]  # the field ``columns``
    return torch.where(torch.arange(rows.shape[1], dtype=torch.int64, device=rows.device) < own[:, None], rows, 0.0)


def _check(x, p: HeadParameters, pool_start, pool_stop, slices, width_index):
    """Check the arguments of forward and backward; return both products, the batch, and the pooled tokens as rows."""
    classifier, features = head_products(tuple(slices))
    batch, rows = batch_of(_pooled(x, pool_start, pool_stop), features.columns, width_index, len(features.each))
    if p.norm_weight is not None:
        check_vectors(x, p.norm_weight.shape[0], p, "norm_weight", "norm_bias")
        reached = features.reach()[1]
        if reached > p.norm_weight.shape[0]:
            raise RuntimeError(f"norm_weight: {reached} channels expected, {p.norm_weight.shape[0]} given")
    if p.weight is not None:
        check_weight("weight", p.weight, x, classifier, (None, None))
        check_vectors(x, p.weight.shape[0], p, "bias")
    return classifier, features, batch, rows


def head(x, p: HeadParameters, pool_start, pool_stop, slices, eps, width_index):
    classifier, features, batch, rows = _check(x, p, pool_start, pool_stop, slices, width_index)
    if p.norm_weight is not None:
        rows = norm_forward(batch, rows, p.norm_weight, p.norm_bias, features, eps).y
    elif p.weight is None:
        rows = _own_channels(rows, features, width_index)
    return rows if p.weight is None else product(batch, rows, p.weight, classifier, bias=p.bias)


def head_backward(
    grad, x, p: HeadParameters, pool_start, pool_stop, slices, eps, width_index, x_grad, buffers: HeadParameters
):
    classifier, features, batch, rows = _check(x, p, pool_start, pool_stop, slices, width_index)
    check_buffers(x, p, buffers)
    grad = rows_like(x, "grad", grad, batch.images, features.columns if p.weight is None else classifier.rows)
    norm = None if p.norm_weight is None else norm_forward(batch, rows, p.norm_weight, p.norm_bias, features, eps)
    if p.weight is not None:
        add_weight_gradient(batch, grad, rows if norm is None else norm.y, buffers.weight, classifier)
        add_column_sums(batch, grad, buffers.bias, None, classifier)
        grad = product(batch, grad, p.weight, classifier, transposed=True)
    if norm is not None:
        add_column_sums(batch, grad, buffers.norm_bias, buffers.norm_weight, features, x=rows, norm=norm)
    if not x_grad:
        return x.new_empty(0)
    if norm is not None:
        grad = norm_backward(batch, grad, rows, norm, p.norm_weight, features)
    elif p.weight is None:
        grad = _own_channels(grad, features, width_index)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dx[:, pool_start:pool_stop] = (grad / (pool_stop - pool_start))[:, None]
    return dx
