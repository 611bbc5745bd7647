"""The error budget: faults are over it, and correct kernels that add in another order are within it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from budget import DRAWS, Draws, assert_within_budget

SIZES = {"few rows": (3, 33, 77), "many rows": (200, 64, 256), "long sums": (8, 64, 768)}  # rows, embed, hidden
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(size, seed):
    torch.manual_seed(seed)
    rows, embed, hidden = SIZES[size]
    fc1, fc2 = torch.randn(hidden, embed) * embed**-0.5, torch.randn(embed, hidden) * hidden**-0.5
    return torch.randn(rows, embed), 1 + 0.3 * torch.randn(embed), fc1, fc2, 0.3 * torch.randn(embed)


def plain(x, norm, fc1, fc2, scale):
    """The branch of an MLP block, and its gradient by the layer scale, which adds over rows."""
    y = F.gelu(F.linear(F.layer_norm(x, norm.shape, norm, eps=1e-6), fc1)) @ fc2.T
    return y * scale, (x * y).sum(0)


def gelu(hidden, constant=0.5**0.5):
    return 0.5 * hidden * (1 + torch.erf(constant * hidden))


def kernel(x, norm, fc1, fc2, scale, eps=1e-6, product=torch.matmul, gelu=gelu, rounded=lambda t: t):
    """The same as kernels compute it: in float32 up to the result, whatever the dtype."""
    dtype = x.dtype
    x, norm, fc1, fc2, scale = (t.float() for t in (x, norm, fc1, fc2, scale))
    normed = rounded(F.layer_norm(x, norm.shape, norm, eps=eps))
    y = product(rounded(gelu(product(normed, fc1.T))), fc2.T)
    return (y * scale).to(dtype), (x * y).sum(0).to(dtype)


def in_parts(a, b, size=None, add=torch.add):
    """A product that adds over parts of K, one after the other."""
    return functools.reduce(add, [p @ q for p, q in zip(a.split(size or 1, 1), b.split(size or 1), strict=True)])


@functools.cache
def case(size, seed, dtype):
    tensors = [t.to(dtype) for t in operands(size, seed)]
    return tensors, Draws(lambda near: (plain(*near(tensors)), plain(*(t.double() for t in near(tensors)))), dtype)


def check(size, seed, dtype, **how):
    tensors, draws = case(size, seed, dtype)
    for i, actual in enumerate(kernel(*tensors, **how)):
        assert_within_budget(actual, draws[i])


PRODUCTS = {
    "in one piece": torch.matmul,
    "from the end": lambda a, b: a.flip(1) @ b.flip(0),
    "one term after the other": in_parts,
    "in parts": functools.partial(in_parts, size=16),
    "two halves": lambda a, b: a[:, ::2] @ b[::2] + a[:, 1::2] @ b[1::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["few rows", "many rows"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_any_order_of_the_terms_is_within_the_budget(product, size, dtype):
    for seed in range(8):
        check(size, seed, dtype, product=PRODUCTS[product])


def forgets_the_last_term(a, b):
    return a[:, :-1] @ b[:-1]


def accumulates_in(dtype):
    """Every sum of some terms of K is rounded to ``dtype``."""
    return functools.partial(in_parts, add=lambda a, b: (a + b).to(dtype).float())


FAULTS = {
    "bf16 intermediates": {"rounded": lambda t: t.bfloat16().float()},
    "fp16 intermediates": {"rounded": lambda t: t.half().float()},
    "intermediates of 16 bits of mantissa": {"rounded": lambda t: t + 96 * t - 96 * t},
    "a term of K is missing": {"product": forgets_the_last_term},
    "sums in bf16": {"product": accumulates_in(torch.bfloat16)},
    "sums in fp16": {"product": accumulates_in(torch.float16)},
    "GELU's constant is wrong by 1e-5": {"gelu": lambda h: gelu(h, 0.5**0.5 * (1 + 1e-5))},
    "GELU by tanh": {"gelu": lambda h: F.gelu(h, approximate="tanh")},
    "another eps": {"eps": 1e-5},
}
CASES = [(fault, torch.float32, size) for fault in FAULTS for size in ("few rows", "many rows")]
CASES += [(fault, torch.bfloat16, "long sums") for fault in ("a term of K is missing", "sums in bf16")]


@pytest.mark.parametrize("fault, dtype, size", CASES, ids=str)
def test_faults_are_over_the_budget(fault, dtype, size):
    for seed in range(3):
        with pytest.raises(AssertionError, match="allowed"):
            check(size, seed, dtype, **FAULTS[fault])


def test_the_factors_are_the_contracts():
    """In the largest error four times eager's, in the root mean square twice; of eager's largest errors."""
    exact, error = torch.ones(100, dtype=torch.float64), torch.full((100,), 1e-4)
    one, ulp = error * (torch.arange(100) == 7), torch.finfo(torch.float32).eps
    for eager in (error, one):
        assert_within_budget(1 + 1.9 * eager, [(1 + eager, exact)])
        assert_within_budget(1 + 2.1 * eager, [(1 + eager, exact), (1 - 2 * eager, exact)])
        with pytest.raises(AssertionError, match="allowed"):
            assert_within_budget(1 + 2.1 * eager, [(1 + eager, exact)])
    assert_within_budget(1 + error + 2.9 * one, [(1 + error, exact)])
    with pytest.raises(AssertionError, match="largest 4.1"):
        assert_within_budget(1 + error + 3.1 * one, [(1 + error, exact)])
    assert_within_budget(exact.float() + 2 * ulp, [(exact.float(), exact)])
    with pytest.raises(AssertionError, match="allowed"):
        assert_within_budget(exact.float() + 3 * ulp, [(exact.float(), exact)])
    with pytest.raises(AssertionError, match="finite"):
        assert_within_budget(1 + 0 * one / 0, [(1 + one, exact)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_are_made_when_needed_and_alike_but_not_the_same(dtype):
    tensors, made = [t.to(dtype) for t in operands("few rows", 0)], []

    def compute(near):
        made.append(near(tensors))
        assert all(torch.equal(a, b) for a, b in zip(made[-1], near(tensors), strict=True))
        return plain(*made[-1]), plain(*(t.double() for t in made[-1]))

    draws, state = Draws(compute, dtype), torch.get_rng_state()
    assert_within_budget(kernel(*tensors)[0], draws[0])
    assert len(made) < DRAWS and all(torch.equal(a, b) for a, b in zip(made[0], tensors, strict=True))
    errors = torch.stack([(eager.double() - exact).flatten() for eager, exact in draws[0]])
    assert len(made) == DRAWS and all(a is b for a, b in zip(*[next(draws[1]) for _ in range(2)], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for near in made[1:]:
        for a, b in zip(near, tensors, strict=True):
            assert not torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=9 * torch.finfo(dtype).eps, atol=0)
    size = errors.square().mean(0).sqrt()
    assert (errors.square().mean(1).sqrt() < 3 * size.square().mean().sqrt()).all()
    correlation = (errors / size) @ (errors / size).T / len(size)
    assert correlation.triu(1).sum() / correlation.triu(1).count_nonzero() < 0.5  # GELU's approximation stays the same
