"""Finds out whether a packed copy is stale, older than the parameters it was made of.

``Structure`` notices replaced modules, ``Fingerprint`` replaced or changed parameters. Neither notices writes that
torch cannot see, through ``.data`` or a NumPy view: ``HydraViT.weights_changed`` tells of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from hydravit.inference.packable import Packable
from hydravit.layers import Block, hooks_of


class Structure:
    """The modules of a model, kept so that a call can look at all parameters without walking through them."""

    def __init__(self, model: Packable):
        modules = list(model.modules())
        self._parameters = [module._parameters for module in modules]
        self._children = [(module._modules, list(module._modules.values())) for module in modules]
        # A network calls no module, so it cannot serve a block of another class or with a patched forward.
        self._foreign = any(type(block) is not Block for block in model.blocks)
        self._attributes = [block.__dict__ for block in model.blocks]
        tables = {id(hooks): hooks for block in model.blocks for hooks in hooks_of(block)}
        self._hooks = list(tables.values())

    def holds(self) -> bool:
        """Whether the model still has the same modules."""
        return all(list(now.values()) == then for now, then in self._children)

    def needs_modules_to_run(self) -> bool:
        """Whether a hook or a foreign block would miss its call."""
        return self._foreign or any(self._hooks) or any("forward" in attributes for attributes in self._attributes)

    def parameters(self) -> list[Tensor | None]:
        return [parameter for of_module in self._parameters for parameter in of_module.values()]


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
