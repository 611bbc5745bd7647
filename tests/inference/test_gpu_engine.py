"""The CUDA engine on a CUDA device: what test_engine.py asks of the emulator, and what only a device can show."""

import functools
import random

import pytest
import torch
from budget import assert_within_budget
from small import draws_of_logits, images, shake

from hydravit import HydraViT, HydraViTConfig
from hydravit.inference import DTYPES, make_network, with_e4m3_weights

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.needs("cuda_network")]

TINY = HydraViTConfig(image_size=16, patch_size=4, depth=2, max_heads=3, num_classes=10)
BASE = HydraViTConfig()
LOADERS = ("best", "async")


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


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", DTYPES["cuda"], ids=str)
@pytest.mark.parametrize("config", [TINY, BASE], ids=["tiny", "base"])
@torch.no_grad()
def test_within_the_error_budget(config, dtype, loader):
    engine = make(config).engine(dtype=dtype, loader=loader)
    x, activations, expected = expected_of(config, dtype)
    for heads, draws in expected.items():
        assert_within_budget(engine(x, heads=heads)[:2].to(activations), draws[0])


@pytest.mark.parametrize("heads", [3, 6, 12])
@torch.no_grad()
def test_products_by_warpgroups(heads):
    """On compute capability 9.0 wgmma multiplies what has many rows, as the products of 64 images have."""
    model, x = make(BASE), images(BASE, 64).to(DEVICE)
    engine = model.engine(max_batch=64)
    logits = engine(x, heads=heads)
    some = [0, 31, 63]
    draws = draws_of_logits(model, x[some], torch.bfloat16, DEVICE, heads=heads)
    assert_within_budget(logits[some].to(torch.bfloat16), draws[0])


@torch.no_grad()
def test_calls_that_make_a_graph_and_calls_inside_of_one():
    """More than 8 images have none before their first call; inside of another graph kernels are launched one by one."""
    model, x = make(BASE), images(BASE, 9).to(DEVICE)
    engine = model.engine(max_batch=9)
    for heads in (3, 12):
        for batch in (9, 3):
            expected = engine(x[:batch], heads=heads)
            assert torch.equal(engine(x[:batch], heads=heads), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = engine(x[:batch], heads=heads)
            logits.zero_()
            graph.replay()
            assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@torch.no_grad()
def test_mma_has_the_same_bits_at_any_batch(dtype):
    """With the loader of sm_80 there is no wgmma."""
    engine, x = make(BASE).engine(dtype=dtype, loader="async"), images(BASE, 8).to(DEVICE)
    for heads in range(1, 13):
        logits = engine(x, heads=heads)
        for i in (0, 7):
            assert torch.equal(engine(x[i : i + 1], heads=heads)[0], logits[i])


@torch.no_grad()
def test_products_of_one_family_have_the_same_bits_at_any_batch():
    """Where the plans of two batches multiply by mma and wgmma alike, an image has the same bits in both."""
    model, x = make(BASE), images(BASE, 64).to(DEVICE)
    network = make_network(model, torch.bfloat16, 64)
    for heads in (3, 12):
        subnetwork, logits = model.subnetwork(heads), {}
        for batch in (1, 2, 4, 8, 16, 32, 48, 64):
            phases = network.time_phases(x[:batch], subnetwork, repeats=1)
            by_wgmma = tuple((phase.name, phase.tile == "128x128") for phase in phases if phase.planned and phase.tile)
            found = network.run(x[:batch], (subnetwork,))
            expected = logits.setdefault(by_wgmma, found)
            assert torch.equal(found[: len(expected)], expected)


def test_ten_thousand_calls():
    """Random widths and batches, one after the other without waiting: the bits of the first time, always."""
    engine, x = make(BASE).engine(), images(BASE, 8).to(DEVICE)
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
@pytest.mark.parametrize("loader", LOADERS)
def test_engine_under_the_sanitizer(loader, dtype):
    engine = make(TINY).engine(max_batch=3, dtype=dtype, loader=loader)
    for heads in (1, 2, 3):
        assert engine(images(TINY, heads).to(DEVICE), heads=heads).isfinite().all()
