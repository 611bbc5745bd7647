"""Finds out whether a packed copy is stale, older than the parameters it was made of.

``Fingerprint`` notices replaced or changed parameters, ``hydravit/structure.py`` replaced modules. Neither notices
writes that torch cannot see, through ``.data`` or a NumPy view: ``HydraViT.weights_changed`` tells of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook


class Fingerprint:
    """The identity and the versions of the parameters that a packed copy was made of."""

    def __init__(self, parameters: Sequence[Tensor | None]):
        self._optimizer_steps = _optimizer_steps
        # An address would not do: a new tensor may get the memory of one that was freed.
        self._tensors = [_nothing if p is None else weakref.ref(p) for p in parameters]
        self._states = _states(parameters)

    @classmethod
    def take(cls, parameters: Sequence[Tensor | None]) -> Fingerprint | None:
        """Return the parameters' fingerprint; None where torch does not track changes.

        It does not for tensors made under ``torch.inference_mode``, for fake tensors and inside ``torch.func.vmap``.
        """
        if any(p is not None and type(p) not in (Tensor, Parameter) for p in parameters):
            return None
        try:
            return cls(parameters)
        except RuntimeError:
            return None

    def holds(self, parameters: Sequence[Tensor | None]) -> bool:
        """Whether these are the same parameters, and unchanged as far as torch can see."""
        same = self._optimizer_steps == _optimizer_steps and len(self._tensors) == len(parameters)
        same = same and all(tensor() is p for tensor, p in zip(self._tensors, parameters, strict=True))
        return same and self._states == _states(parameters)


def _nothing() -> None:
    return None


def _states(parameters: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    present = [p for p in parameters if p is not None]
    return [p.data_ptr() for p in present], [p._version for p in present]


_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change parameters, but not their versions.
register_optimizer_step_post_hook(_count_step)
