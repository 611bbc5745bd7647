"""The blocks as functions, on any backend, with gradients.

A compiled backend has separate ops for forward and backward, behind one ``autograd.Function`` that is entered only if a
gradient is needed. Gradients of parameters are full-size tensors with exact zeros outside the slice, as PyTorch users
expect. With ``grads``, a tuple like ``parameters``, backward adds them to the slice of those tensors in place
instead, and autograd sees none. An entry of None means that this gradient is not wanted. ``reference`` needs no
such tensors: autograd itself adds its gradients to ``.grad``.

``slices`` has one slice for all images, or several and ``width_index (B,)``, int64: each image's index into them.

The compiled ops have first derivatives only. Everything else is computed by the formulas of ``reference``, with the
same values up to rounding and at its cost: the backward pass where autograd builds a graph of it
(``create_graph=True``: gradient penalties, derivatives of any order) or vectorises it (``is_grads_batched``), and the
forward where a transform of ``torch.func`` is active, an input carries a tangent of forward-mode differentiation, or
``branch_scale`` requires a gradient. With ``grads`` such a backward pass raises, because its gradients would be lost.

Under ``torch.autocast`` the triton backend has activations in autocast's dtype and leaves parameters in theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydravit_kernels import ops, reference
from hydravit_kernels.parameters import AttentionParameters, HeadParameters, MlpParameters, StemParameters
from hydravit_kernels.ranges import annotate
from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, flatten, unflatten
from hydravit_kernels.transforms import transformed, transformed_backward

# The ops that can return activations for their backward, which it would otherwise compute again.
_SAVING = tuple(name for name, schema in ops.SCHEMAS.items() if "bool save" in schema)


@annotate("stem")
def stem(
    images: Tensor,
    parameters: StemParameters,
    slices: Sequence[EmbedSlice],
    width_index: Tensor | None = None,
    *,
    backend: str,
    grads: StemParameters | None = None,
) -> Tensor:
    """Patch embedding and tokens: images ``(B, C, height, width)`` to the residual ``(B, N, Dk)``.

    The tokens are the class token, the registers and the patches, in this order (ViT, arXiv 2010.11929; registers,
    arXiv 2309.16588).
    """
    if _takes_formulas(backend, images, parameters):
        return reference.stem(images, parameters, slices, width_index)
    return _run("stem", backend, images, parameters, (flatten(slices), width_index), grads)


@annotate("attention_block")
def attention_block(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    slices: Sequence[AttentionSlice],
    eps: float,
    width_index: Tensor | None = None,
    *,
    queries: int | None = None,
    backend: str,
    grads: AttentionParameters | None = None,
) -> Tensor:
    """Norm, attention, projection, scales and residual: ``x (B, N, Dk)`` to the same shape.

    Args:
        branch_scale: ``(B,)``, multiplies an image's branch (drop-path); None stands for ones.
        queries: the result has only the first ``queries`` tokens, which still attend to all. None stands for all.
    """
    queries = x.shape[1] if queries is None else queries
    if _takes_formulas(backend, x, parameters, branch_scale):
        return reference.attention_block(x, parameters, branch_scale, slices, eps, width_index, queries)
    constants = (branch_scale, flatten(slices), [s.scale for s in slices], eps, width_index, queries)
    return _run("attention_block", backend, x, parameters, constants, grads)


@annotate("mlp_block")
def mlp_block(
    x: Tensor,
    parameters: MlpParameters,
    branch_scale: Tensor | None,
    slices: Sequence[MlpSlice],
    eps: float,
    width_index: Tensor | None = None,
    *,
    backend: str,
    grads: MlpParameters | None = None,
) -> Tensor:
    """Norm, fc1, exact GELU, fc2, scales and residual: ``x (B, N, Dk)`` to the same shape."""
    if _takes_formulas(backend, x, parameters, branch_scale):
        return reference.mlp_block(x, parameters, branch_scale, slices, eps, width_index)
    return _run("mlp_block", backend, x, parameters, (branch_scale, flatten(slices), eps, width_index), grads)


@annotate("head")
def head(
    x: Tensor,
    parameters: HeadParameters,
    pool: tuple[int, int],
    slices: Sequence[HeadSlice],
    eps: float,
    width_index: Tensor | None = None,
    *,
    backend: str,
    grads: HeadParameters | None = None,
) -> Tensor:
    """Mean of the tokens ``[pool[0], pool[1])``, norm, classifier: ``x (B, N, Dk)`` to logits ``(B, classes)``.

    If the norm's parameters are None the norm is left out. Without a classifier the result is the features ``(B, Dk)``.
    """
    if _takes_formulas(backend, x, parameters):
        return reference.head(x, parameters, *pool, slices, eps, width_index)
    return _run("head", backend, x, parameters, (*pool, flatten(slices), eps, width_index), grads)


def _takes_formulas(backend, x, parameters, branch_scale=None):
    """Whether the formulas of ``reference`` compute a call, because its backend's ops cannot; see above."""
    if backend == "reference" or transformed(x, branch_scale, *parameters):
        return True
    return branch_scale is not None and branch_scale.requires_grad and torch.is_grad_enabled()


def _run(name, backend, x, parameters, constants, grads):
    """Run the op, inside the ``autograd.Function`` if a gradient is wanted."""
    if backend == "triton" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # the kernels cast weights themselves, tile by tile
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return _DifferentiableOp.apply(name, backend, constants, grads, x, *parameters)
    result = _op(name, backend)(x, *parameters, *constants, *((False,) if name in _SAVING else ()))
    return result[0] if name in _SAVING else result


def _op(name, backend):
    return getattr(torch.ops.hydravit, f"{name}_{backend}").default


def _reached(edges, parameters) -> list[bool]:
    """Say for each parameter whether this backward pass is to fill its ``.grad``.

    Autograd's own rule holds for gradients in place too: ``torch.autograd.grad`` and ``backward(inputs=...)`` fill
    nothing but what they ask for. Raises ``RuntimeError`` before anything is written if ``torch.autograd.grad`` asks
    for a parameter.
    """
    nodes, reached = iter(edges), []
    for parameter in parameters:
        node = None if parameter is None else next(nodes)[0]  # a parameter that is None has no edge
        while node is not None and not hasattr(node, "variable"):  # the parameter is given as a view of itself
            node = node.next_functions[0][0]
        try:
            reached.append(node is not None and torch._C._will_engine_execute_node(node))
        except RuntimeError as error:
            raise RuntimeError(
                "torch.autograd.grad for a parameter: autograd does not see gradients that are accumulated in place; "
                "use backward(), or close SliceGradients"
            ) from error
    return reached


class _DifferentiableOp(torch.autograd.Function):
    """The forward and backward ops of one block. ``parameters`` are in the order of the op's schema."""

    @staticmethod
    def forward(ctx, name, backend, constants, grads, x, *parameters):
        if name in _SAVING:
            y, *saved = _op(name, backend)(x, *parameters, *constants, True)
        else:
            y, saved = _op(name, backend)(x, *parameters, *constants), []
        ctx.save_for_backward(x, *saved, *parameters)
        ctx.saved_count = len(saved)
        ctx.op_name, ctx.backend, ctx.constants, ctx.grads = name, backend, constants, grads
        return y

    @staticmethod
    @annotate(lambda ctx, _: f"{ctx.op_name}_backward")
    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        saved, parameters = rest[: ctx.saved_count], rest[ctx.saved_count :]
        x_wanted, *wanted = ctx.needs_input_grad[4:]
        in_place = ctx.grads is not None
        compiling = torch.compiler.is_compiling()  # then PyTorch itself refuses to differentiate the backward pass
        if not compiling and (torch.is_grad_enabled() or transformed_backward(grad, x, *parameters)):
            if in_place:
                raise RuntimeError(
                    "gradients in place cannot be differentiated again (create_graph=True) or vectorised: close "
                    "SliceGradients"
                )
            return None, None, None, None, *_gradients_by_formulas(ctx, grad, (x, *parameters), (x_wanted, *wanted))
        if in_place:
            reached = wanted if compiling else _reached(ctx.next_functions[1:], parameters)
            sums = [b if want and run else None for b, want, run in zip(ctx.grads, wanted, reached, strict=True)]
        else:
            sums = [torch.zeros_like(p) if want else None for p, want in zip(parameters, wanted, strict=True)]
        grad_x = _op(f"{ctx.op_name}_backward", ctx.backend)(
            grad.contiguous(), x, *saved, *parameters, *ctx.constants, x_wanted, *sums
        )
        visible = [None] * len(sums) if in_place else sums
        return None, None, None, None, grad_x if x_wanted else None, *visible


def _gradients_by_formulas(ctx, grad, inputs, wanted):
    """Compute the gradients of the inputs ``(x, *parameters)`` by ``reference``; autograd can differentiate them."""
    again, x = torch.is_grad_enabled(), inputs[0]
    # Parameters of another dtype than the activations come from autocast, which may be off by now.
    mixed = any(p is not None and p.dtype != x.dtype for p in inputs[1:])
    with torch.enable_grad(), torch.autocast(x.device.type, x.dtype if mixed else None, enabled=mixed):
        # The derivative is taken by views: by themselves, x would also lead to the parameters of earlier blocks, which
        # may be the same.
        views = [t.view_as(t) if want else t for t, want in zip(inputs, wanted, strict=True)]
        y = _formulas(ctx.op_name, views[0], views[1:], ctx.constants)
    asked = [t for t, want in zip(views, wanted, strict=True) if want]
    if y.requires_grad:
        found = torch.autograd.grad(y, asked, grad.to(y.dtype), create_graph=again, materialize_grads=True)
    else:  # a skipped branch
        found = tuple(map(torch.zeros_like, asked))
    left = iter(found)
    return [next(left) if want else None for want in wanted]


def _formulas(name, x, parameters, constants):
    """Compute the op ``name`` by ``reference``, from the op's own arguments."""
    p: Any = type(ops.PARAMETERS[name])(*parameters)
    if name == "stem":
        slices, width_index = constants
        return reference.stem(x, p, unflatten(EmbedSlice, slices), width_index)
    if name == "attention_block":
        branch_scale, slices, scales, eps, width_index, queries = constants
        each = [s._replace(scale=n) for s, n in zip(unflatten(AttentionSlice, slices), scales, strict=True)]
        return reference.attention_block(x, p, branch_scale, each, eps, width_index, queries)
    if name == "mlp_block":
        branch_scale, slices, eps, width_index = constants
        return reference.mlp_block(x, p, branch_scale, unflatten(MlpSlice, slices), eps, width_index)
    pool_start, pool_stop, slices, eps, width_index = constants
    return reference.head(x, p, pool_start, pool_stop, unflatten(HeadSlice, slices), eps, width_index)
