"""The error budget: real faults are over it, and correct kernels that add in another order are within it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from budget import ORDERS, AnotherOrder, Eager, OverBudget, assert_within_budget

SIZES = {"few rows": (3, 33, 77), "many rows": (200, 64, 256), "long sums": (16, 256, 768)}  # rows, embed, hidden
SEEDS = 8
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


def check(size, seed, dtype=torch.float32, compute=kernel):
    tensors = [t.to(dtype) for t in operands(size, seed)]
    exact, eager = plain(*(t.double() for t in tensors)), Eager(lambda: plain(*tensors))
    for i, actual in enumerate(compute(*tensors)):
        assert_within_budget(actual, (results[i] for results in eager), exact[i])


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
    for seed in range(SEEDS):
        check(size, seed, dtype, functools.partial(kernel, product=PRODUCTS[product]))


def test_eager_in_another_order_is_within_the_budget():
    for seed in range(SEEDS):
        with AnotherOrder(seed=1000 + seed):
            results = plain(*operands("few rows", seed))
        check("few rows", seed, compute=lambda *tensors, results=results: results)


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
    for seed in range(SEEDS):
        with pytest.raises(OverBudget):
            check(size, seed, dtype, functools.partial(kernel, **FAULTS[fault]))


def test_the_factors_are_the_contracts():
    """In the largest error four times eager's, in the root mean square twice; in every order so far."""
    exact, error = torch.ones(100, dtype=torch.float64), torch.full((100,), 1e-4)
    one, ulp = error * (torch.arange(100) == 7), torch.finfo(torch.float32).eps
    for eager, within, beyond in ((error, 1.9 * error, 2.1 * error), (one, 1.9 * one, 2.1 * one)):
        assert_within_budget(1 + within, 1 + eager, exact)
        assert_within_budget(1 + beyond, (1 + e for e in (eager, 2 * eager)), exact)
        with pytest.raises(OverBudget):
            assert_within_budget(1 + beyond, 1 + eager, exact)
    assert_within_budget(1 + error + 2.9 * one, 1 + error, exact)
    with pytest.raises(OverBudget, match="largest 4.1"):
        assert_within_budget(1 + error + 3.1 * one, 1 + error, exact)
    assert_within_budget(exact.float() + ulp, exact.float(), exact)
    with pytest.raises(OverBudget) as over:
        assert_within_budget(exact.float() + 4 * ulp, exact.float(), exact)
    assert over.value.excess == 2


def test_orders_are_computed_when_asked_for_and_once():
    tensors, calls = operands("few rows", 0), []
    eager = Eager(lambda: calls.append(0) or plain(*tensors))
    exact = plain(*(t.double() for t in tensors))
    assert_within_budget(kernel(*tensors)[0], (results[0] for results in eager), exact[0])
    first = len(calls)
    state = torch.get_rng_state()
    orders = [results for _ in range(2) for results in eager]
    assert first < len(calls) == ORDERS and torch.equal(torch.get_rng_state(), state)
    assert len({results[0].sum().item() for results in orders}) == ORDERS
    assert all(a is b for a, b in zip(orders[:ORDERS], orders[ORDERS:], strict=True))
