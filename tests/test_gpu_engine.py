"""The CUDA engine on a CUDA device: what tests/test_engine.py asks of the emulator, and what only a device can show."""

import functools
import random

import pytest
import torch
from budget import assert_within_budget
from small import draws_of_logits, images, shake

from hydravit import HydraViT, HydraViTConfig
from hydravit.engine import DTYPES, with_e4m3_weights

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.needs("cuda_network")]

TINY = HydraViTConfig(image_size=16, patch_size=4, depth=2, max_heads=3, num_classes=10)
BASE = HydraViTConfig()
WAYS = [{"strategy": s, "loader": loader} for s in ("chain", "persistent") for loader in ("best", "async")]


@functools.cache
def make(config):
    """Once for all tests, which do not change it: making it takes longer than what is tested."""
    return shake(HydraViT(config, backend="reference").eval()).to(DEVICE)


@functools.cache
def expected_of(config, dtype):
    """Images, the activations' dtype, and by width what the budget for the logits of two images is made from."""
    model, x = make(config), images(config, 8).to(DEVICE)
    if dtype == torch.float8_e4m3fn:  # the same weights, and activations of the engine's
        model, dtype = with_e4m3_weights(model), torch.float16
    widths = {1, config.max_heads // 2, config.max_heads}
    return x, dtype, {heads: draws_of_logits(model, x[:2], dtype, DEVICE, heads=heads) for heads in widths}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
@pytest.mark.parametrize("dtype", DTYPES["cuda"], ids=str)
@pytest.mark.parametrize("config", [TINY, BASE], ids=["tiny", "base"])
@torch.no_grad()
def test_within_the_error_budget(config, dtype, way):
    engine = make(config).engine(dtype=dtype, **way)
    x, activations, expected = expected_of(config, dtype)
    for heads, draws in expected.items():
        assert_within_budget(engine(x, heads=heads)[:2].to(activations), draws[0])


@pytest.mark.parametrize("heads", [3, 6, 12])
@torch.no_grad()
def test_products_by_warpgroups(heads):
    """On compute capability 9.0 a chain multiplies by wgmma what has many rows: here at batch 8, and more at batch 64.

    The bits are those of an image alone if mma and wgmma add 16 products alike, see kDepthGroups in csrc/cuda/phase.h.
    """
    model, x = make(BASE), images(BASE, 64).to(DEVICE)
    engine = model.engine(max_batch=64)
    logits = engine(x, heads=heads)
    some = [0, 31, 63]
    draws = draws_of_logits(model, x[some], torch.bfloat16, DEVICE, heads=heads)
    assert_within_budget(logits[some].to(torch.bfloat16), draws[0])
    for batch in (8, 2, 1):
        assert torch.equal(engine(x[-batch:], heads=heads), logits[-batch:])


@torch.no_grad()
def test_calls_that_make_a_graph_and_calls_inside_of_one():
    """More than 8 images have none before their first call; inside of another graph kernels are launched one by one."""
    model, x = make(BASE), images(BASE, 9).to(DEVICE)
    engine = model.engine(max_batch=9)
    expected = {heads: torch.cat([engine(part, heads=heads) for part in x.split(3)]) for heads in (3, 12)}
    for heads in (3, 12, 3):
        assert torch.equal(engine(x, heads=heads), expected[heads])
    for batch in (9, 3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = engine(x[:batch], heads=3)
        logits.zero_()
        graph.replay()
        assert torch.equal(logits, expected[3][:batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@torch.no_grad()
def test_every_way_and_batch_has_the_same_bits(dtype):
    model, x = make(BASE), images(BASE, 8).to(DEVICE)
    engine = model.engine(dtype=dtype)
    expected = {heads: engine(x, heads=heads) for heads in range(1, 13)}
    for way in WAYS:
        engine = model.engine(dtype=dtype, **way)
        for heads, logits in expected.items():
            assert torch.equal(engine(x, heads=heads), logits)
            for i in (0, 7):
                assert torch.equal(engine(x[i : i + 1], heads=heads)[0], logits[i])


@pytest.mark.parametrize("strategy", ["chain", "persistent"])
def test_ten_thousand_calls(strategy):
    """Random widths and batches, one after the other without waiting: the bits of the first time, always."""
    engine, x = make(BASE).engine(strategy=strategy), images(BASE, 8).to(DEVICE)
    first, wrong = {}, torch.zeros((), dtype=torch.int64, device=DEVICE)
    draw = random.Random(0)
    for _ in range(10_000):
        key = draw.randint(1, 12), draw.randint(1, 8)
        logits = engine(x[: key[1]], heads=key[0])
        wrong += (logits != first.setdefault(key, logits)).sum()
    assert wrong.item() == 0 and len(first) == 96


def test_on_the_current_stream():
    engine, x = make(BASE).engine(), images(BASE, 1).to(DEVICE)
    expected, stream = engine(x, heads=3), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = torch.zeros_like(x).copy_(x)  # not there yet for any other stream
        logits = engine(later, heads=3)
    stream.synchronize()
    assert torch.equal(logits, expected)


def test_a_steady_call_allocates_its_logits_only():
    engine, x = make(BASE).engine(), images(BASE, 1).to(DEVICE)
    engine(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    for heads in range(1, 13):
        engine(x, heads=heads)
    allocated = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    assert allocated <= 12 * 4096


@torch.no_grad()
def test_e4m3_weights_are_rounded_as_on_a_cpu():
    on_cpu = HydraViT(TINY, backend="reference")
    on_device = HydraViT(TINY, backend="reference")
    on_device.load_state_dict(on_cpu.state_dict())
    rounded = with_e4m3_weights(on_device.to(DEVICE)).state_dict()
    for name, expected in with_e4m3_weights(on_cpu).state_dict().items():
        assert torch.equal(rounded[name].cpu(), expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_engine_under_the_sanitizer(way, dtype):
    engine = make(TINY).engine(max_batch=3, dtype=dtype, **way)
    for heads in (1, 2, 3):
        assert engine(images(TINY, heads).to(DEVICE), heads=heads).isfinite().all()
