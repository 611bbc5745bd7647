"""MLP block: ``x + branch_scale * layer_scale * fc2(gelu(fc1(norm(x))))``; arguments as in ``ops.py``.

Forward is three launches: the norm; fc1 with bias and GELU in its epilogue; fc2 with bias, scales and residual in its
epilogue. Backward computes the normalised x again, so that forward need not save it, and the value of GELU beside its
derivative. A slice without hidden channels has products without rows or columns, which leave x as it is.
"""

from __future__ import annotations

from hydravit_kernels.parameters import MlpParameters
from hydravit_kernels.triton.checks import batch_of, check_buffers, check_tensor, check_vectors, check_weight, rows_like
from hydravit_kernels.triton.gradients import add_column_sums, add_weight_gradient
from hydravit_kernels.triton.norm import norm_backward, norm_forward
from hydravit_kernels.triton.product import product
from hydravit_kernels.triton.slices import mlp_products


def _check(x, p: MlpParameters, branch_scale, slices, width_index):
    """Check the arguments of forward and backward; return the products, the batch, and x as rows."""
    products = mlp_products(tuple(slices))
    batch, rows = batch_of(x, products.fc2.rows, width_index, len(products.fc1.each))
    full = p.norm_weight.shape[0]
    check_weight("fc1_weight", p.fc1_weight, x, products.fc1, (None, full))
    check_weight("fc2_weight", p.fc2_weight, x, products.fc2, (full, p.fc1_weight.shape[0]))
    check_vectors(x, p.fc1_weight.shape[0], p, "fc1_bias")
    check_vectors(x, full, p, "norm_weight", "norm_bias", "fc2_bias", "layer_scale")
    if branch_scale is not None:
        check_tensor("branch_scale", branch_scale, x, (batch.images,))
    return products, batch, rows


def mlp_block(x, p: MlpParameters, branch_scale, slices, eps, width_index, save):
    products, batch, rows = _check(x, p, branch_scale, slices, width_index)
    normalised = norm_forward(batch, rows, p.norm_weight, p.norm_bias, products.fc1, eps).y
    hidden = batch.new(rows, products.fc1.rows) if save else None
    activated = product(batch, normalised, p.fc1_weight, products.fc1, bias=p.fc1_bias, gelu="forward", hidden=hidden)
    y = product(
        batch, activated, p.fc2_weight, products.fc2,
        bias=p.fc2_bias, output_scale=p.layer_scale, branch_scale=branch_scale, residual=rows,
    )  # fmt: skip
    if hidden is None:
        return y.view(x.shape), x.new_empty(0)
    return y.view(x.shape), hidden.view(batch.images, batch.tokens, products.fc1.rows)


def mlp_block_backward(
    grad, x, hidden, p: MlpParameters, branch_scale, slices, eps, width_index, x_grad, buffers: MlpParameters
):
    products, batch, rows = _check(x, p, branch_scale, slices, width_index)
    check_buffers(x, p, buffers)
    grad = rows_like(x, "grad", grad, *x.shape)
    # The kernel reads hidden in the layout of its result.
    hidden = rows_like(x, "hidden", hidden, batch.images, batch.tokens, products.fc1.rows).contiguous()

    activated_wanted = buffers.fc2_weight is not None or buffers.layer_scale is not None
    norm_wanted = x_grad or buffers.norm_weight is not None or buffers.norm_bias is not None
    hidden_wanted = norm_wanted or buffers.fc1_weight is not None or buffers.fc1_bias is not None
    activated = batch.new(hidden, products.fc2.columns) if activated_wanted else None
    if activated_wanted or hidden_wanted:
        # GELU's value is computed with its derivative, because both need the same error function.
        d_hidden = product(
            batch, grad, p.fc2_weight, products.fc2, transposed=True,
            input_scale=p.layer_scale, branch_scale=branch_scale, gelu="backward", hidden=hidden, activated=activated,
        )  # fmt: skip
    if activated is not None:
        add_weight_gradient(
            batch, grad, activated, buffers.fc2_weight, products.fc2, branch_scale=branch_scale, scale=p.layer_scale
        )
        if buffers.layer_scale is not None:
            branch = product(batch, activated, p.fc2_weight, products.fc2, bias=p.fc2_bias)
            add_column_sums(batch, grad, None, buffers.layer_scale, products.fc2, x=branch, branch_scale=branch_scale)
    add_column_sums(batch, grad, buffers.fc2_bias, None, products.fc2, branch_scale=branch_scale, scale=p.layer_scale)
    if not hidden_wanted:
        return x.new_empty(0)

    norm = norm_forward(batch, rows, p.norm_weight, p.norm_bias, products.fc1, eps)
    add_weight_gradient(batch, d_hidden, norm.y, buffers.fc1_weight, products.fc1)
    add_column_sums(batch, d_hidden, buffers.fc1_bias, None, products.fc1)
    if not norm_wanted:
        return x.new_empty(0)

    d_normalised = product(batch, d_hidden, p.fc1_weight, products.fc1, transposed=True)
    add_column_sums(batch, d_normalised, buffers.norm_bias, buffers.norm_weight, products.fc2, x=rows, norm=norm)
    if not x_grad:
        return x.new_empty(0)
    return norm_backward(batch, d_normalised, rows, norm, p.norm_weight, products.fc1, residual=grad).view(x.shape)
