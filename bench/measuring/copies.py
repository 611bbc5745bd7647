"""Weight bytes that one call copies, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WeightCopies(TorchDispatchMode):
    """Counts in ``bytes`` every new storage that an operator fills from weights and nothing else.

    Weights are ``parameters``, their views, and what such operators make of them: a gather of rows, a ``contiguous``, a
    cast, a copy into a buffer. A product with activations does not count. Copies inside an operator stay unseen: the
    tiles that a matrix product packs, PyTorch's or ours, are not counted.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.bytes = 0
        self._weights = {p.untyped_storage().data_ptr() for p in parameters}
        self._kept: list[Tensor] = []  # while a counted copy lives, nothing else gets its address

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        copying = operator is torch.ops.aten.copy_.default  # fills a tensor that exists: only the source counts
        inputs = [leaf for leaf in tree_leaves(args[1] if copying else (args, kwargs)) if isinstance(leaf, Tensor)]
        floating = [tensor for tensor in inputs if tensor.is_floating_point()]
        if floating and all(tensor.untyped_storage().data_ptr() in self._weights for tensor in floating):
            if copying:
                self.bytes += result.numel() * result.element_size()
            for output in () if copying else tree_leaves(result):
                if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in self._weights:
                    self.bytes += output.untyped_storage().nbytes()
                    self._weights.add(output.untyped_storage().data_ptr())
                    self._kept.append(output)
        return result


def copied_bytes(run, parameters: Iterable[Tensor]) -> int:
    """Weight bytes that one call of ``run`` copies, after a first call that does not count."""
    run()
    with WeightCopies(parameters) as counted:
        run()
    return counted.bytes
