"""The error budget: a kernel may be at most a small factor worse than eager PyTorch in the same precision.

Both errors are against the same computation in float64, so nobody chooses a tolerance (the rule of flash-attention's
tests). In L2 norm the kernel's error is at most twice eager's plus two units in the last place of the result's root
mean square; in maximum norm at most four times eager's plus as much, because a plain twice fails correct kernels by
chance.

Where a result has few numbers, one evaluation is a poor measure of eager's error: in another order of its terms, the
same sum may be off five times as much. Yet no order is better than another. In any order the error of n terms is at
most (n - 1) u sum |term|, and typically about sqrt(n) u sqrt(sum term^2), with u the unit roundoff (Higham, Accuracy
and Stability of Numerical Algorithms, chapter 4; Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Evaluating eager in
several orders samples just that, with the lengths and magnitudes of the computation at hand. A kernel adds in an order
of its own, so its error is compared with the largest of eager's in ``ORDERS`` of them. (In 16 bits eager's error comes
from the rounding of results, which the order of the terms hardly changes.)
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ORDERS = 8
aten = torch.ops.aten


class AnotherOrder(TorchDispatchMode):
    """Inside of it matrix products, sums, means, convolutions and attention add their terms in random orders."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
            *bias, a, b = args
            args = (*bias, *self.shuffled((a, -1), (b, -2)))
        elif op in (aten.sum.dim_IntList, aten.mean.dim):
            x, dims, *rest = args
            for dim in dims:
                [x] = self.shuffled((x, dim))
            args = (x, dims, *rest)
        elif op is aten.convolution.default:
            images, weight, *rest = args
            args = (*self.shuffled((images, 1), (weight, 1)), *rest)
        elif op is aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, key, value, *rest = args
            args = (query, *self.shuffled((key, -2), (value, -2)), *rest)
        return op(*args, **(kwargs or {}))

    def shuffled(self, *operands):
        """The tensor of every ``(tensor, dim)``, with its elements along ``dim`` in one order common to all."""
        (first, dim), *_ = operands
        order = torch.randperm(first.shape[dim], generator=self.generator).to(first.device)
        return [tensor.index_select(dim, order) for tensor, dim in operands]


class Eager:
    """What ``compute()`` returns as it is, and then in other orders; each is computed when it is first asked for."""

    def __init__(self, compute):
        self.compute, self.results = compute, []

    def __iter__(self):
        for i in range(ORDERS):
            if i == len(self.results):
                self.results.append(self.in_order(i))
            yield self.results[i]

    def in_order(self, i):
        if i == 0:
            return self.compute()
        with AnotherOrder(seed=i):
            return self.compute()


class OverBudget(AssertionError):
    """``excess``: by which factor the error exceeds what is allowed."""

    def __init__(self, message, excess):
        super().__init__(message)
        self.excess = excess


def assert_within_budget(actual, eager, exact, name="result"):
    """``actual`` and ``eager`` in the same dtype, ``exact`` in float64; all of one shape.

    ``eager``: results in several orders, an ``Eager`` or a generator from one, read until ``actual`` is within the
    budget; or one tensor, of a computation that has no sums.
    """
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    exact = exact.detach().double()
    ours, theirs = errors(actual, exact, name), (0.0, 0.0)
    ulp = torch.finfo(actual.dtype).eps * exact.square().mean().sqrt().item()
    for result in [eager] if isinstance(eager, torch.Tensor) else eager:
        assert actual.dtype == result.dtype, f"{name}: {actual.dtype} is not {result.dtype}"
        theirs = [max(pair) for pair in zip(theirs, errors(result, exact, name), strict=True)]
        allowed = [factor * error + 2 * ulp for factor, error in zip((2, 4), theirs, strict=True)]
        if all(error <= limit for error, limit in zip(ours, allowed, strict=True)):
            return
    numbers = zip(("root mean square", "largest"), ours, theirs, allowed, strict=True)
    text = ", ".join(f"{norm} {a:.3e} (eager {b:.3e}, allowed {c:.3e})" for norm, a, b, c in numbers)
    excess = max(error / limit if limit else float(error > 0) for error, limit in zip(ours, allowed, strict=True))
    raise OverBudget(f"{name}: errors {text}", excess)


def errors(result, exact, name):
    """The error's L2 norm, as a root mean square, and its maximum norm."""
    assert result.shape == exact.shape, f"{name}: {tuple(result.shape)} is not {tuple(exact.shape)}"
    error = result.detach().double() - exact
    return error.square().mean().sqrt().item(), error.abs().max().item()
