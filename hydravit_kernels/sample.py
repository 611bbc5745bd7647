"""A sample of the contents of tensors, which shows writes that torch cannot see."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# How many sets of elements there are. A comparison with one costs four memory accesses per tensor.
ROTATIONS = 16


class ContentSample:
    """The bits of some elements of every tensor, in ``ROTATIONS`` sets.

    Each set has an element of every contiguous quarter of every tensor, and all elements of tensors of up to 16. So a
    comparison with one set shows any write of new values to a contiguous quarter of a tensor. A smaller write is seen
    when its elements' set has its turn; elements that are in no set are never looked at.

    Args:
        tensors: on the CPU, of any dtypes and strides.
    Raises:
        RuntimeError: a tensor is elsewhere, or its storage is too small for it.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        with torch.no_grad():
            self._sample = torch.ops.hydravit.sample_native(tensors, ROTATIONS)
        self._turns = itertools.count()  # threads that share it skip none
        self._changed = False

    def holds(self) -> bool:
        """Whether the elements of the next set have the same bits, and those of every set before had.

        It reads memory at the addresses that the tensors had. The caller checks first that they live and still have
        these addresses.
        """
        turn = next(self._turns) % ROTATIONS
        if not self._changed and not torch.ops.hydravit.sample_holds_native.default(self._sample, turn):
            self._changed = True  # the next set may not show it
        return not self._changed
