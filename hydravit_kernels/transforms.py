"""Finds out whether a call is differentiated or vectorised by other means than autograd's graph.

The ops know autograd's graph only. Transforms of ``torch.func`` (``grad``, ``jvp``, ``vmap``, ``jacrev``, ...) wrap
tensors, and forward-mode differentiation (``torch.autograd.forward_ad``) gives them tangents, which an op would drop
without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*tensors: Tensor | None) -> bool:
    """Return whether a transform of ``torch.func`` is active, or one of the tensors carries a tangent.

    ``torch.compile``, which cannot see tangents, makes a graph of its own for calls inside a ``dual_level``.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(t is not None and _has_tangent(t) for t in tensors)


def transformed_backward(grad: Tensor, *tensors: Tensor | None) -> bool:
    """Return the same of a backward pass that gets ``grad``, which ``is_grads_batched=True`` also vectorises."""
    return transformed(grad, *tensors) or torch._C._functorch.is_legacy_batchedtensor(grad)


def refuse_transforms(what: str, *tensors: Tensor | None) -> None:
    """Raise ``RuntimeError`` if ``transformed``; ``what`` names the call that cannot serve it."""
    if transformed(*tensors):
        raise RuntimeError(
            f"{what} computes no derivatives and no vmap: call the model itself, on any backend, such as "
            'backend="reference"'
        )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None
