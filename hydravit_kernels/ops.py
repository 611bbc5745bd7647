"""The ops of every compiled backend: one schema and one fake kernel each, defined whether or not a library was built.

An op takes **full tensors plus slices**, never sliced weights. With ``B`` images, ``N`` tokens, ``D`` channels of the
full model and ``Dk`` of the (widest) active subnetwork:

    ``x, y``            ``(B, N, Dk)``; beyond an image's own width, ``y`` is zero
    ``queries``         ``Nq``: attention is computed for the first ``Nq`` tokens only, ``y`` is then ``(B, Nq, Dk)``
    ``norm_*``          ``(D,)``, like ``layer_scale``
    ``qkv_weight``      ``(rows, D)``
    ``proj_weight``     ``(D, columns)``
    ``fc1_weight``      ``(hidden, D)``, ``fc2_weight (D, hidden)``
    ``weight``          of the head ``(rows, D)``, of the stem ``(D, channels, patch, patch)``
    ``branch_scale``    ``(B,)``, multiplies an image's branch (drop-path)
    ``subnet``          ``(B,)`` int64, which of the slices an image uses; None: all use the only one

Blocks own their residual. ``save=True`` also returns what backward needs (empty tensors otherwise), in the size of the
largest slice, each image filling the front of its own part:

    ``qkv``             ``(B, N, heads * (2 * head_dim + value_dim))``, laid out Q | K | V; Q of the queries only
    ``attended``        ``(B, Nq, heads * value_dim)``
    ``logsumexp``       ``(B, heads * N)``, of the scaled scores, ``heads * Nq`` of them (in a dimension of that size
                        one head and one query would be another graph)
    ``hidden``          ``(B, N, hidden)``, before GELU

A ``*_backward`` returns the gradient of the activations (empty unless ``x_grad``) and **adds** the gradients of the
parameters into the slice of the full-size buffers it is given. A buffer that is None costs nothing; none is touched
outside the slice. Activations have the dtype of ``images`` or ``x``.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("hydravit", "DEF")

_STEM = "Tensor images, Tensor weight, Tensor? bias, Tensor? cls_token, Tensor? reg_token, Tensor? pos_embed"
_ATTENTION = (
    "Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, "
    "Tensor? layer_scale, Tensor? branch_scale, SymInt[] slices, float[] scales, float eps, Tensor? subnet, "
    "SymInt queries"
)
_MLP = (
    "Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? layer_scale, Tensor? branch_scale, SymInt[] slices, float eps, Tensor? subnet"
)
_HEAD = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? weight, Tensor? bias, SymInt pool_start, "
    "SymInt pool_stop, SymInt[] slices, float eps, Tensor? subnet"
)


def _buffers(*names: str) -> str:
    """Schema of the gradient buffers: optional, mutated, each its own alias set."""
    return ", ".join(f"Tensor({chr(ord('a') + i)}!)? grad_{name}" for i, name in enumerate(names))


SCHEMAS = {
    "stem": f"({_STEM}, SymInt[] slices, Tensor? subnet) -> Tensor",
    "stem_backward": f"(Tensor grad, {_STEM}, SymInt[] slices, Tensor? subnet, bool x_grad, "
    + _buffers("weight", "bias", "cls_token", "reg_token", "pos_embed")
    + ") -> Tensor",
    "attention_block": f"(Tensor x, {_ATTENTION}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_block_backward": f"(Tensor grad, Tensor x, Tensor qkv, Tensor attended, Tensor logsumexp, {_ATTENTION}, "
    "bool x_grad, "
    + _buffers("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "layer_scale")
    + ") -> Tensor",
    "mlp_block": f"(Tensor x, {_MLP}, bool save) -> (Tensor, Tensor)",
    "mlp_block_backward": f"(Tensor grad, Tensor x, Tensor hidden, {_MLP}, bool x_grad, "
    + _buffers("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale")
    + ") -> Tensor",
    "head": f"({_HEAD}) -> Tensor",
    "head_backward": f"(Tensor grad, {_HEAD}, bool x_grad, "
    + _buffers("norm_weight", "norm_bias", "weight", "bias")
    + ") -> Tensor",
}

# The whole network without gradients. `pack_network_native` copies all parameters into one tensor, `packed`, and tells
# where each of them begins there. `plan_network_native` resolves one subnetwork's slices to addresses in `packed`, once
# per width. `network_native` runs images through one plan, or every image through the plan that `subnet` names;
# `columns` are those of the widest result. `pooled_only`: the last layer computes only the tokens that the head pools.
PACK_NETWORK = "(Tensor?[] parameters, int[] sizes) -> (Tensor, int[])"
PLAN_NETWORK = "(Tensor packed, int[] offsets, int[] sizes, int[] subnetwork, float[] scales, float eps) -> Tensor"
NETWORK = "(Tensor images, Tensor packed, Tensor[] plans, SymInt columns, Tensor? subnet, bool pooled_only) -> Tensor"

# AdamW and the average of the weights, in place on rectangles of full-size parameters; adamw.py says what the arguments
# hold. `gradients` and `averages` may be empty.
ADAMW = (
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] averages, "
    "Tensor rectangles, int[] bounds, Tensor steps) -> ()"
)

# Integers per slice in `slices`, in the order of the fields in `slices.py`.
EMBED_INTS, ATTENTION_INTS, MLP_INTS, HEAD_INTS = 2, 10, 4, 4


def _column(slices, ints, field):
    return [slices[start + field] for start in range(0, len(slices), ints)]


def _largest(values):
    result = values[0]
    for value in values[1:]:
        result = max(result, value)
    return result


def _stem(images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet):
    batch, _, height, width = images.shape
    tokens = (height // weight.shape[2]) * (width // weight.shape[3])
    for prefix in (cls_token, reg_token):
        tokens = tokens + (0 if prefix is None else prefix.shape[1])
    return images.new_empty((batch, tokens, _largest(_column(slices, EMBED_INTS, 1))))


def _attention_block(x, *arguments):
    slices, queries, save = arguments[8], arguments[12], arguments[13]
    batch, tokens, width = x.shape
    y = x.new_empty((batch, queries, width))
    if not save:
        return y, x.new_empty((0,)), x.new_empty((0,)), x.new_empty((0,))
    heads, head_dim, value_dim = (_column(slices, ATTENTION_INTS, field) for field in (6, 7, 8))
    qkv = _largest([h * (2 * d + v) for h, d, v in zip(heads, head_dim, value_dim, strict=True)])
    attended = _largest([h * v for h, v in zip(heads, value_dim, strict=True)])
    return (
        y,
        x.new_empty((batch, tokens, qkv)),
        x.new_empty((batch, queries, attended)),
        x.new_empty((batch, _largest(heads) * tokens), dtype=torch.float32),
    )


def _mlp_block(x, *arguments):
    slices, save = arguments[8], arguments[11]
    batch, tokens, _ = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, x.new_empty((0,))
    return y, x.new_empty((batch, tokens, _largest(_column(slices, MLP_INTS, 3))))


def _head(x, norm_weight, norm_bias, weight, bias, pool_start, pool_stop, slices, eps, subnet):
    return x.new_empty((x.shape[0], _largest(_column(slices, HEAD_INTS, 1 if weight is None else 3))))


def _backward(x, x_grad):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else x.new_empty((0,))


FAKES = {
    "stem": _stem,
    "stem_backward": lambda grad, images, *arguments: _backward(images, arguments[7]),
    "attention_block": _attention_block,
    "attention_block_backward": lambda grad, x, *arguments: _backward(x, arguments[16]),
    "mlp_block": _mlp_block,
    "mlp_block_backward": lambda grad, x, *arguments: _backward(x, arguments[12]),
    "head": _head,
    "head_backward": lambda grad, x, *arguments: _backward(x, arguments[9]),
}


def define(backend: str) -> None:
    """Define every op of one compiled backend, ``hydravit::<op>_<backend>``, with its fake kernel."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(f"{name}_{backend}{schema}")
        torch.library.register_fake(f"hydravit::{name}_{backend}", FAKES[name], lib=LIBRARY)
    LIBRARY.define(f"adamw_{backend}{ADAMW}")
    torch.library.register_fake(f"hydravit::adamw_{backend}", lambda *arguments: None, lib=LIBRARY)


define("native")
# Packing and planning look at memory: only the forward has a fake kernel.
LIBRARY.define(f"pack_network_native{PACK_NETWORK}")
LIBRARY.define(f"plan_network_native{PLAN_NETWORK}")
LIBRARY.define(f"network_native{NETWORK}")
torch.library.register_fake(
    "hydravit::network_native",
    lambda images, packed, plans, columns, *_: images.new_empty((images.shape[0], columns)),
    lib=LIBRARY,
)
# What the native CPU kernels run on: "avx512", "avx2" or "portable". Setting another than the best one is for tests.
LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("set_cpu_isa(str isa) -> ()")
