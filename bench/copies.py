"""Weight bytes that one call copies, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WeightCopies(TorchDispatchMode):
    """Counts in ``bytes`` every new storage that an operator fills from weights and nothing else.

    Weights are ``parameters``, their views, and what such operators make of them: a gather of rows, a ``contiguous``, a
    cast. A product with activations is none. What one operator does inside itself is not seen, so neither are the
    tiles that a matrix product packs, nobody's.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.bytes = 0
        self._weights = {p.untyped_storage().data_ptr() for p in parameters}
        self._kept: list[Tensor] = []  # an address is not used again while what was counted there lives

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        floating = [tensor for tensor in inputs if tensor.is_floating_point()]
        if floating and all(tensor.untyped_storage().data_ptr() in self._weights for tensor in floating):
            for output in tree_leaves(result):
                if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in self._weights:
                    self.bytes += output.untyped_storage().nbytes()
                    self._weights.add(output.untyped_storage().data_ptr())
                    self._kept.append(output)
        return result


def copied_bytes(run, parameters: Iterable[Tensor]) -> int:
    """Of one call of ``run``, after one that does not count."""
    run()
    with WeightCopies(parameters) as counted:
        run()
    return counted.bytes
