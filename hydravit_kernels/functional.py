"""The blocks as functions, on any backend, with gradients.

A compiled backend has separate ops for forward and backward, behind one ``autograd.Function`` that is entered only if a
gradient is needed. Gradients of parameters are full-size tensors with exact zeros outside the slice, as PyTorch users
expect. With ``grads``, a tuple like ``parameters``, backward adds them to the slice of those tensors in place
instead, and autograd sees none. An entry of None means that this gradient is not wanted. ``reference`` needs no
such tensors: autograd itself adds its gradients to ``.grad``.

``slices`` has one slice for all images, or several and ``width_index (B,)``, int64: each image's index into them.

Under ``torch.autocast`` the triton backend has activations in autocast's dtype and leaves parameters in theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydravit_kernels import ops, reference
from hydravit_kernels.parameters import AttentionParameters, HeadParameters, MlpParameters, StemParameters
from hydravit_kernels.ranges import annotate
from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, flatten

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
    if backend == "reference":
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
    if backend == "reference":
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
    if backend == "reference":
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
    if backend == "reference":
        return reference.head(x, parameters, *pool, slices, eps, width_index)
    return _run("head", backend, x, parameters, (*pool, flatten(slices), eps, width_index), grads)


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
    @torch.autograd.function.once_differentiable
    @annotate(lambda ctx, _: f"{ctx.op_name}_backward")
    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        saved, parameters = rest[: ctx.saved_count], rest[ctx.saved_count :]
        x_wanted, *wanted = ctx.needs_input_grad[4:]
        in_place = ctx.grads is not None
        if in_place:
            compiling = torch.compiler.is_compiling()
            reached = wanted if compiling else _reached(ctx.next_functions[1:], parameters)
            sums = [b if want and run else None for b, want, run in zip(ctx.grads, wanted, reached, strict=True)]
        else:
            sums = [torch.zeros_like(p) if want else None for p, want in zip(parameters, wanted, strict=True)]
        grad_x = _op(f"{ctx.op_name}_backward", ctx.backend)(
            grad.contiguous(), x, *saved, *parameters, *ctx.constants, x_wanted, *sums
        )
        visible = [None] * len(sums) if in_place else sums
        return None, None, None, None, grad_x if x_wanted else None, *visible
