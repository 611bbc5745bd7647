"""The ops of every compiled backend: a schema and a fake kernel for each, whether or not a library was built.

An op takes **full tensors and slices**, never sliced weights. With ``B`` images, ``N`` tokens, ``D`` channels in the
full model and ``Dk`` in the widest slice of the call:

    ``x, y``            ``(B, N, Dk)``; ``y`` is zero beyond an image's own channels
    ``queries``         ``Nq``: only the first ``Nq`` tokens are queries, and ``y`` is ``(B, Nq, Dk)``
    parameters          as in ``parameters.py``, in the order of its tuples
    ``branch_scale``    ``(B,)``, multiplies an image's branch (drop-path)
    ``slices``          the integers of one or more slices, see ``flatten``; ``scales``: their attention scales
    ``width_index``     ``(B,)`` int64, the index of each image's slice; None if there is one slice

A block includes its residual connection. With ``save=True`` it also returns activations for backward, which are empty
tensors otherwise. They have the size of the largest slice, and an image fills the front of its own row:

    ``qkv``             ``(B, N, heads * (2 * head_dim + value_dim))``, laid out Q | K | V; Q for the queries only
    ``attended``        ``(B, Nq, heads * value_dim)``
    ``logsumexp``       ``(B, heads * N)``, for the scaled scores. Only ``heads * Nq`` are used; with an axis of that
                        size, ``torch.compile`` would make another graph for one head and one query
    ``hidden``          ``(B, N, hidden)``, before GELU

A ``*_backward`` returns the gradient of the activations (empty unless ``x_grad``) and **adds** the gradients of the
parameters to the slice of the full-size buffers ``grad_*``. It touches no buffer outside the slice, and a buffer of
None costs nothing. Activations have the dtype of ``images`` or ``x``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hydravit_kernels.parameters import ATTENTION, HEAD, MLP, STEM, BlockParameters
from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, unflatten

LIBRARY = torch.library.Library("hydravit", "DEF")

# The parameters that an op takes. Its backward takes as many gradient buffers, as its last arguments.
PARAMETERS: dict[str, BlockParameters] = {"stem": STEM, "attention_block": ATTENTION, "mlp_block": MLP, "head": HEAD}


def _tensors(specs: BlockParameters) -> str:
    """The schema of a block's parameters."""
    return ", ".join(f"Tensor{'?' * spec.optional} {name}" for name, spec in zip(specs._fields, specs, strict=True))


def _buffers(specs: BlockParameters) -> str:
    """The schema of a block's gradient buffers: optional, mutated, each in an alias set of its own."""
    return ", ".join(f"Tensor({chr(ord('a') + i)}!)? grad_{name}" for i, name in enumerate(specs._fields))


_STEM = f"Tensor images, {_tensors(STEM)}, SymInt[] slices, Tensor? width_index"
_ATTENTION = (
    f"{_tensors(ATTENTION)}, Tensor? branch_scale, SymInt[] slices, float[] scales, float eps, Tensor? width_index, "
    "SymInt queries"
)
_MLP = f"{_tensors(MLP)}, Tensor? branch_scale, SymInt[] slices, float eps, Tensor? width_index"
_HEAD = (
    f"Tensor x, {_tensors(HEAD)}, SymInt pool_start, SymInt pool_stop, SymInt[] slices, float eps, Tensor? width_index"
)
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

# AdamW and the average of the weights, in place on rectangles of full-size parameters; adamw.py documents the
# arguments. `averages` may be empty.
ADAMW = (
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] averages, "
    "Tensor rectangles, Tensor steps) -> ()"
)

# The whole network without gradients, on the CPU. `packed` has all parameters in the kernels' layout. A plan is one
# subnetwork's slices, resolved to addresses in `packed` once per width. `columns` counts those of the widest result.
NETWORK = {
    "pack_network_native": "(Tensor?[] parameters, int[] sizes) -> (Tensor, int[], int)",
    "plan_network_native": "(Tensor packed, int[] offsets, int panel, int[] sizes, int[] subnetwork, float[] scales, "
    "float eps) -> Tensor",
    "network_native": "(Tensor images, Tensor packed, Tensor[] plans, SymInt columns, Tensor? width_index, "
    "bool pooled_only) -> Tensor",
}

# Whether something wrote to tensors on the CPU that torch did not see; sample.py documents the arguments.
SAMPLE = {
    "sample_native": "(Tensor[] tensors, int rotations) -> Tensor",
    "sample_holds_native": "(Tensor sample, int rotation) -> bool",
}


def argument_names(name: str) -> list[str]:
    """The names of an op's arguments, in order."""
    schema = SCHEMAS[name]
    return [argument.split()[-1] for argument in schema[1 : schema.index(") -> ")].split(", ")]


def grouped(name: str, function: Callable) -> Callable:
    """Make an implementation of the op ``name`` from a function that takes parameters and buffers as one tuple each."""
    specs = PARAMETERS[name.removesuffix("_backward")]
    kind, start, count = type(specs), argument_names(name).index(specs._fields[0]), len(specs)

    def implementation(*arguments):
        before, parameters, after = arguments[:start], arguments[start : start + count], arguments[start + count :]
        if name.endswith("_backward"):
            after = (*after[:-count], kind(*after[-count:]))
        return function(*before, kind(*parameters), *after)

    return implementation


def _stem(images, p, slices, width_index):
    batch, _, height, width = images.shape
    tokens = (height // p.weight.shape[2]) * (width // p.weight.shape[3])
    for prefix in (p.cls_token, p.reg_token):
        tokens = tokens + (0 if prefix is None else prefix.shape[1])
    return images.new_empty((batch, tokens, max(s.embed for s in unflatten(EmbedSlice, slices))))


def _attention_block(x, p, branch_scale, slices, scales, eps, width_index, queries, save):
    batch, tokens, embed = x.shape
    y = x.new_empty((batch, queries, embed))
    if not save:
        return y, x.new_empty((0,)), x.new_empty((0,)), x.new_empty((0,))
    each = unflatten(AttentionSlice, slices)
    return (
        y,
        x.new_empty((batch, tokens, max(s.heads * (2 * s.head_dim + s.value_dim) for s in each))),
        x.new_empty((batch, queries, max(s.heads * s.value_dim for s in each))),
        x.new_empty((batch, max(s.heads for s in each) * tokens), dtype=torch.float32),
    )


def _mlp_block(x, p, branch_scale, slices, eps, width_index, save):
    batch, tokens, _ = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, x.new_empty((0,))
    return y, x.new_empty((batch, tokens, max(s.hidden for s in unflatten(MlpSlice, slices))))


def _head(x, p, pool_start, pool_stop, slices, eps, width_index):
    each = unflatten(HeadSlice, slices)
    return x.new_empty((x.shape[0], max(s.embed if p.weight is None else s.classes for s in each)))


def _fake_backward(name: str):
    """The fake kernel of a backward: it returns the gradient of the activations, or an empty tensor."""
    names = argument_names(name)
    x, x_grad = names.index("images" if "images" in names else "x"), names.index("x_grad")

    def fake(*arguments):
        like = arguments[x]
        if arguments[x_grad]:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        return like.new_empty((0,))

    return fake


FAKES = {
    "stem": grouped("stem", _stem),
    "attention_block": grouped("attention_block", _attention_block),
    "mlp_block": grouped("mlp_block", _mlp_block),
    "head": grouped("head", _head),
    **{f"{name}_backward": _fake_backward(f"{name}_backward") for name in PARAMETERS},
}


def define(backend: str) -> None:
    """Define the ops of a compiled backend, ``hydravit::<op>_<backend>``, with their fake kernels."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(f"{name}_{backend}{schema}")
        torch.library.register_fake(f"hydravit::{name}_{backend}", FAKES[name], lib=LIBRARY)
    LIBRARY.define(f"adamw_{backend}{ADAMW}")
    torch.library.register_fake(f"hydravit::adamw_{backend}", lambda *arguments: None, lib=LIBRARY)


def _network(images, packed, plans, columns, width_index, pooled_only):
    return images.new_empty((images.shape[0], columns))


define("native")
# Packing, planning and sampling read memory, so they have no fake kernels.
for _name, _schema in {**NETWORK, **SAMPLE}.items():
    LIBRARY.define(_name + _schema)
torch.library.register_fake("hydravit::network_native", _network, lib=LIBRARY)
# The instruction set of the native CPU kernels: "avx512", "avx2" or "portable". Tests set others than the best one.
LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("set_cpu_isa(str isa) -> ()")
