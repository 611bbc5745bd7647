"""The ops of every compiled backend: one schema and one fake kernel each, defined whether or not a library was built.

An op takes **full tensors plus slices**, never sliced weights. With ``B`` images, ``N`` tokens, ``D`` channels of the
full model and ``Dk`` of the (widest) active subnetwork:

    ``x, y``            ``(B, N, Dk)``; beyond an image's own width, ``y`` is zero
    ``queries``         ``Nq``: attention is computed for the first ``Nq`` tokens only, ``y`` is then ``(B, Nq, Dk)``
    parameters          as in ``parameters.py``, in the order of its tuples
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

from hydravit_kernels.parameters import ATTENTION, HEAD, MLP, STEM, ParameterSpec
from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, unflatten

LIBRARY = torch.library.Library("hydravit", "DEF")


def _tensors(specs: tuple[ParameterSpec, ...]) -> str:
    """Schema of a block's parameters."""
    return ", ".join(f"Tensor{'?' * spec.optional} {name}" for name, spec in zip(specs._fields, specs, strict=True))


def _buffers(specs: tuple[ParameterSpec, ...]) -> str:
    """Schema of a block's gradient buffers: optional, mutated, each its own alias set."""
    return ", ".join(f"Tensor({chr(ord('a') + i)}!)? grad_{name}" for i, name in enumerate(specs._fields))


_STEM = f"Tensor images, {_tensors(STEM)}, SymInt[] slices, Tensor? subnet"
_ATTENTION = (
    f"{_tensors(ATTENTION)}, Tensor? branch_scale, SymInt[] slices, float[] scales, float eps, Tensor? subnet, "
    "SymInt queries"
)
_MLP = f"{_tensors(MLP)}, Tensor? branch_scale, SymInt[] slices, float eps, Tensor? subnet"
_HEAD = f"Tensor x, {_tensors(HEAD)}, SymInt pool_start, SymInt pool_stop, SymInt[] slices, float eps, Tensor? subnet"
_SAVED = "Tensor grad, Tensor x, Tensor qkv, Tensor attended, Tensor logsumexp"

SCHEMAS = {
    "stem": f"({_STEM}) -> Tensor",
    "stem_backward": f"(Tensor grad, {_STEM}, bool x_grad, {_buffers(STEM)}) -> Tensor",
    "attention_block": f"(Tensor x, {_ATTENTION}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_block_backward": f"({_SAVED}, {_ATTENTION}, bool x_grad, {_buffers(ATTENTION)}) -> Tensor",
    "mlp_block": f"(Tensor x, {_MLP}, bool save) -> (Tensor, Tensor)",
    "mlp_block_backward": f"(Tensor grad, Tensor x, Tensor hidden, {_MLP}, bool x_grad, {_buffers(MLP)}) -> Tensor",
    "head": f"({_HEAD}) -> Tensor",
    "head_backward": f"(Tensor grad, {_HEAD}, bool x_grad, {_buffers(HEAD)}) -> Tensor",
}

# AdamW and the average of the weights, in place on rectangles of full-size parameters; adamw.py says what the arguments
# hold. `averages` may be empty.
ADAMW = (
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] averages, "
    "Tensor rectangles, Tensor steps) -> ()"
)

# The whole network without gradients, on the CPU, from `packed`, which holds all parameters. A plan is one subnetwork's
# slices, resolved to addresses in `packed` once per width; `columns` are those of the widest result.
NETWORK = {
    "pack_network_native": "(Tensor?[] parameters, int[] sizes) -> (Tensor, int[])",
    "plan_network_native": "(Tensor packed, int[] offsets, int[] sizes, int[] subnetwork, float[] scales, float eps) "
    "-> Tensor",
    "network_native": "(Tensor images, Tensor packed, Tensor[] plans, SymInt columns, Tensor? subnet, bool pooled_only)"
    " -> Tensor",
}


def _stem(images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet):
    batch, _, height, width = images.shape
    tokens = (height // weight.shape[2]) * (width // weight.shape[3])
    for prefix in (cls_token, reg_token):
        tokens = tokens + (0 if prefix is None else prefix.shape[1])
    return images.new_empty((batch, tokens, max(s.embed for s in unflatten(EmbedSlice, slices))))


def _attention_block(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, branch_scale,
    slices, scales, eps, subnet, queries, save,
):  # fmt: skip
    batch, tokens, width = x.shape
    y = x.new_empty((batch, queries, width))
    if not save:
        return y, x.new_empty((0,)), x.new_empty((0,)), x.new_empty((0,))
    each = unflatten(AttentionSlice, slices)
    return (
        y,
        x.new_empty((batch, tokens, max(s.heads * (2 * s.head_dim + s.value_dim) for s in each))),
        x.new_empty((batch, queries, max(s.heads * s.value_dim for s in each))),
        x.new_empty((batch, max(s.heads for s in each) * tokens), dtype=torch.float32),
    )


def _mlp_block(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, branch_scale,
    slices, eps, subnet, save,
):  # fmt: skip
    batch, tokens, _ = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, x.new_empty((0,))
    return y, x.new_empty((batch, tokens, max(s.hidden for s in unflatten(MlpSlice, slices))))


def _head(x, norm_weight, norm_bias, weight, bias, pool_start, pool_stop, slices, eps, subnet):
    each = unflatten(HeadSlice, slices)
    return x.new_empty((x.shape[0], max(s.embed if weight is None else s.classes for s in each)))


def _fake_backward(schema: str, activation: str):
    """A backward's fake kernel: the gradient of one argument, or nothing."""
    names = [argument.split()[-1] for argument in schema[1 : schema.index(") -> ")].split(", ")]
    x, x_grad = names.index(activation), names.index("x_grad")

    def fake(*arguments):
        like = arguments[x]
        if arguments[x_grad]:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        return like.new_empty((0,))

    return fake


FAKES = {
    "stem": _stem,
    "attention_block": _attention_block,
    "mlp_block": _mlp_block,
    "head": _head,
    "stem_backward": _fake_backward(SCHEMAS["stem_backward"], "images"),
    **{
        name: _fake_backward(SCHEMAS[name], "x")
        for name in ("attention_block_backward", "mlp_block_backward", "head_backward")
    },
}


def define(backend: str) -> None:
    """Define every op of one compiled backend, ``hydravit::<op>_<backend>``, with its fake kernel."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(f"{name}_{backend}{schema}")
        torch.library.register_fake(f"hydravit::{name}_{backend}", FAKES[name], lib=LIBRARY)
    LIBRARY.define(f"adamw_{backend}{ADAMW}")
    torch.library.register_fake(f"hydravit::adamw_{backend}", lambda *arguments: None, lib=LIBRARY)


def _network(images, packed, plans, columns, subnet, pooled_only):
    return images.new_empty((images.shape[0], columns))


define("native")
for _name, _schema in NETWORK.items():  # packing and planning look at memory, so they have no fake kernels
    LIBRARY.define(_name + _schema)
torch.library.register_fake("hydravit::network_native", _network, lib=LIBRARY)
# What the native CPU kernels run on: "avx512", "avx2" or "portable". Tests set others than the best one.
LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("set_cpu_isa(str isa) -> ()")
