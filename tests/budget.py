"""The error budget: a kernel may be at most a small factor worse than eager PyTorch in the same precision.

Both errors are against the same computation in float64, so nobody chooses a tolerance (the rule of flash-attention's
tests). In L2 norm the kernel's error is at most twice eager's plus two units in the last place of the result's root
mean square; in maximum norm at most four times eager's plus as much, because a plain twice fails correct kernels by
chance.

How large eager's error is, one evaluation does not say where few numbers decide it. The rounding errors of n terms are
at most (n - 1) u sum |term| together, but typically sqrt(n) u sqrt(sum term^2), as if they were drawn at random, and
any one sum may be exact (u: the unit roundoff; Higham, Accuracy and Stability of Numerical Algorithms, chapter 4;
Higham and Mary, SIAM J. Sci. Comput. 41, 2019). So eager is evaluated again on numbers that differ from the first ones
in their last places only: the sums have the same lengths and magnitudes, every rounding falls anew (Vignes, Math.
Comput. Simul. 35, 1993). The kernel's error counts as one more such draw, and is compared with the largest of eager's.
With many numbers all draws have nearly the same error, and the factors are as strict as they look.
"""

import torch

DRAWS = 64
ULPS = 8  # by which a number moves at most


class Draws:
    """Results of eager PyTorch and of float64, for the numbers as they are and for others close by, made when needed.

    ``compute(near)`` returns two sequences of tensors, eager's and float64's; ``near(tensors)`` are the inputs to take
    in both, ``dtype`` is what eager computes in.
    """

    def __init__(self, compute, dtype):
        self.compute, self.eps, self.drawn = compute, torch.finfo(dtype).eps, []

    def __getitem__(self, index):
        """Pairs of eager's and float64's result ``index``."""
        for draw in range(DRAWS):
            if draw == len(self.drawn):
                self.drawn.append(self.compute(lambda tensors, draw=draw: self.near(tensors, draw)))
            yield tuple(results[index] for results in self.drawn[draw])

    def near(self, tensors, draw):
        if draw == 0:
            return list(tensors)
        random = torch.Generator().manual_seed(draw)

        def moved(tensor):
            change = torch.rand(tensor.shape, generator=random, dtype=torch.float64).mul(2).sub(1).mul(ULPS * self.eps)
            return (tensor * (1 + change.to(tensor.device))).to(tensor.dtype)

        return [None if tensor is None else moved(tensor.detach()) for tensor in tensors]


def assert_within_budget(actual, draws, name="result"):
    """``draws``: pairs of eager's result, in the dtype of ``actual``, and float64's; the first is for the same numbers.

    They are read until ``actual`` is within the budget.
    """
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    theirs, ours = (0.0, 0.0), None
    for eager, exact in draws:
        exact = exact.detach().double()
        if ours is None:
            ours, unit = errors(actual, exact, name), 2 * torch.finfo(actual.dtype).eps * mean(exact, exact)
        assert eager.dtype == actual.dtype, f"{name}: {actual.dtype} is not {eager.dtype}"
        theirs = [max(pair) for pair in zip(theirs, errors(eager, exact, name), strict=True)]
        allowed = [2 * theirs[0] + unit, 4 * theirs[1] + unit]
        if ours[0] <= allowed[0] and ours[1] <= allowed[1]:
            return
    numbers = zip(("root mean square", "largest"), ours, theirs, allowed, strict=True)
    text = ", ".join(f"{norm} {a:.3e} (eager {b:.3e}, allowed {c:.3e})" for norm, a, b, c in numbers)
    raise AssertionError(f"{name}: errors {text}")


def errors(result, exact, name):
    """Root mean square and maximum."""
    assert result.shape == exact.shape, f"{name}: {tuple(result.shape)} is not {tuple(exact.shape)}"
    error = result.detach().to(exact) - exact
    return mean(error, exact), error.abs().max().item()


def mean(tensor, exact):
    """The root mean square where ``exact`` is not zero, as it is outside of a slice."""
    return torch.linalg.vector_norm(tensor).item() / max(1, exact.count_nonzero().item()) ** 0.5
