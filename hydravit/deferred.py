"""A module whose parameters an optimizer may owe steps, and which asks for them before anybody looks."""

from __future__ import annotations

from torch import nn


class DeferredSteps(nn.Module):
    """``slice_optimizer`` is a ``hydravit.training.SliceAdamW``, which may owe steps and makes up for them, or None.

    It does so before ``eval()``, ``state_dict()``, ``load_state_dict()``, ``to()`` and its like, copying and pickling;
    the copy has no optimizer. What a forward pass needs, the module's own ``forward`` asks for.
    """

    def __init__(self):
        super().__init__()
        self.slice_optimizer = None
        self.register_state_dict_pre_hook(DeferredSteps._settle)
        self.register_load_state_dict_pre_hook(DeferredSteps._settle)

    def _settle(self, *_) -> None:
        if self.slice_optimizer is not None:
            self.slice_optimizer.flush()

    def train(self, mode: bool = True):
        if not mode:
            self._settle()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._settle()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        self._settle()
        return {**self.__dict__, "slice_optimizer": None}
