"""Finds out whether a packed copy is stale, older than the parameters it was made of.

``Fingerprint`` notices replaced or changed parameters, ``hydravit/structure.py`` replaced modules. torch does not see
writes through ``.data`` or a NumPy view; a sample of the contents shows those of a quarter of a tensor or more at once,
smaller ones later or never. ``HydraViT.weights_changed`` tells of any.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

import hydravit_kernels as kernels


class Fingerprint:
    """The tensors that a packed copy is made of, their addresses and versions, and a sample of their contents.

    It is taken before they are packed. So what is written meanwhile is noticed later, at worst without need. It keeps
    the tensors, as identities are unique only while they live; weak references would keep torch from swapping them.
    Contents are sampled if all tensors are on the CPU. CUDA would have to be waited for.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._tensors = list(tensors)
        self._present = [t for t in tensors if t is not None]
        self._optimizer_steps = _optimizer_steps
        self._versions = self._addresses = self._sample = None
        if _are_plain(self._present):  # else `weights_changed` and replaced tensors are all that is noticed
            self._addresses = _addresses_of(self._present)
            if not _any_inference(self._present):
                self._versions = _versions_of(self._present)
            if all(t.is_cpu for t in self._present):
                self._sample = kernels.ContentSample(self._present)

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the same tensors, unchanged as far as torch and the sample's next set can tell."""
        return (
            self._optimizer_steps == _optimizer_steps
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and (self._addresses is None or self._addresses == _addresses_of(self._present))
            and (self._versions is None or self._versions == _versions_of(self._present))
            and (self._sample is None or self._sample.holds())  # last: it reads memory at these addresses
        )


def glance(tensors: Sequence[Tensor | None]) -> tuple | None:
    """Return what tells whether two calls probably have the same tensors, unchanged; it keeps none of them.

    It is None where torch does not track changes: for tensors made under ``torch.inference_mode``, fake tensors and
    inside ``torch.func.vmap``; and for subclasses, which may have no memory of their own.
    """
    present = [t for t in tensors if t is not None]
    if not _are_plain(present) or _any_inference(present):
        return None
    return _optimizer_steps, list(map(id, tensors)), _addresses_of(present), _versions_of(present)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    if any(type(t) not in (Tensor, Parameter) for t in tensors):
        return False
    try:
        _addresses_of(tensors)
    except RuntimeError:  # inside a transform of torch.func
        return False
    return True


def _any_inference(tensors: Sequence[Tensor]) -> bool:
    return any(t.is_inference() for t in tensors)


def _addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


_version_of = operator.attrgetter("_version")


def _versions_of(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_version_of, tensors))


def in_shared_memory(tensors: Sequence[Tensor | None]) -> bool:
    """Whether another process may write to one of the tensors; said of tensors on the CPU only."""
    return any(t is not None and t.is_cpu and t.untyped_storage().is_shared() for t in tensors)


_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change parameters, but not their versions.
register_optimizer_step_post_hook(_count_step)
