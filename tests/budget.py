"""The error budget: a kernel may be at most a small factor worse than eager PyTorch in the same precision.

Both errors are against the same computation in float64; so no tolerance is chosen by hand (the rule of
flash-attention's tests). In L2 norm at most twice eager's error plus two units in the last place of the result's root
mean square; in maximum norm at most four times, because a plain twice fails correct kernels by chance.
"""

import torch


def assert_within_budget(actual, eager, exact, name="result"):
    """``actual`` and ``eager`` in the same dtype, ``exact`` in float64; all of one shape."""
    assert actual.shape == exact.shape == eager.shape, f"{name}: {tuple(actual.shape)} is not {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype} is not {eager.dtype}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    exact = exact.detach().double()
    errors = (actual.detach().double() - exact).flatten(), (eager.detach().double() - exact).flatten()
    ulp = torch.finfo(actual.dtype).eps * exact.square().mean().sqrt()
    for norm, factor, unit in ((2, 2, exact.numel() ** 0.5), (float("inf"), 4, 1.0)):
        ours, theirs = (torch.linalg.vector_norm(error, norm) for error in errors)
        limit = factor * theirs + 2 * ulp * unit
        assert ours <= limit, f"{name}: error {ours:.3e} in norm {norm}, eager {theirs:.3e}, allowed {limit:.3e}"
