"""torch's FlopCounterMode counts the slice that an op reads, as it counts the products of the reference."""

import subprocess
import sys

import pytest
import small
import torch
from cases import OPS, Case
from op_calls import calls
from packing import is_packed
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hydravit.evaluation import cost
from hydravit.training import SliceGradients
from hydravit_kernels import AttentionSlice, CpuNetwork, functional, ops
from hydravit_kernels.subnetwork import unflatten

native = pytest.mark.needs("native")
WIDTHS = [1, 3, torch.tensor([4, 2])]


@pytest.fixture(autouse=True)
def one(one_thread):
    pass


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@native
@pytest.mark.parametrize("heads", WIDTHS, ids=str)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_training_step_counts_what_the_reference_does(heads, pool):
    model = small.make(backend="native", pool=pool, register_tokens=1).train()
    reference = small.make(backend="reference", pool=pool, register_tokens=1).train()
    images = small.images(model.config)
    each = heads.tolist() if isinstance(heads, torch.Tensor) else [heads] * len(images)
    subnetworks, beyond = [model.subnetwork(k) for k in each], 0
    expected = sum(2 * cost(model.config, s, pooled_only=pool == "token").macs for s in subnetworks)
    if pool == "token":  # the reference makes queries of all tokens, which flops.py says
        last = [s.attention[-1] for s in subnetworks]
        beyond = 2 * (model.config.tokens - 1) * sum(s.embed * s.heads * s.head_dim for s in last)
    assert counted(lambda: model(images, heads=heads)) == expected
    assert counted(lambda: reference(images, heads=heads)) == expected + beyond
    with torch.no_grad():
        assert counted(lambda: model(images, heads=heads)) == expected
    step = counted(lambda: model(images, heads=heads).sum().backward())
    assert step == counted(lambda: reference(images, heads=heads).sum().backward()) - 3 * beyond
    gradients = SliceGradients(model)
    assert counted(lambda: model(images, heads=heads).sum().backward()) == step
    gradients.close()


@native
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("trainable", ["head", "blocks.1.norm2", "blocks.0.attn.qkv.bias", "blocks.1.mlp.fc2.weight"])
def test_frozen_weights_count_nothing(heads, trainable):
    """As in the reference, whose autograd skips what nobody wants."""
    steps = []
    for backend in ("native", "reference"):
        model = small.make(backend=backend, pool="avg").train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trainable))
        images = small.images(model.config)
        steps.append(counted(lambda m=model, x=images: m(x, heads=heads).sum().backward()))
    assert steps[0] == steps[1]


@native
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", range(8))
def test_ops_of_any_slices(name, seed):
    torch.manual_seed(seed)
    block, beyond = OPS[name](Case(seed, tokens=6)), 0
    if name == "attention_block":  # the reference makes queries of all tokens: see flops.py
        _, slices, _, _, width_index, queries = block.constants
        each = unflatten(AttentionSlice, slices)
        which = [0] * len(block.x) if width_index is None else width_index.tolist()
        products = sum(each[i].embed * each[i].heads * each[i].head_dim for i in which)
        beyond = 3 * 2 * (block.x.shape[1] - queries) * products  # forward, and two gradients

    def step(call):
        inputs = [None if t is None else t.detach().requires_grad_() for t in (block.x, *block.parameters)]
        y = call(inputs[0], inputs[1:])
        if y.requires_grad:
            y.sum().backward()

    ours = counted(lambda: step(lambda x, p: functional._run(name, "native", x, p, block.constants, None)))
    assert ours == counted(lambda: step(block.reference)) - beyond


@native
@pytest.mark.parametrize("config", [{}, {"pool": "avg", "register_tokens": 2}, {"num_classes": 0}])
def test_an_engine_counts_what_cost_says(config):
    """The whole network is one op, which computes only the pooled tokens of the last block."""
    model = small.make(backend="native", **config)
    images = small.images(model.config, 3)
    alone = {heads: 2 * cost(model.config, model.subnetwork(heads), pooled_only=True).macs for heads in range(1, 5)}
    engine = model.engine()
    for heads in (2, 4):
        assert counted(lambda k=heads: engine(images, heads=k)) == 3 * alone[heads]
    subnetworks, width_index = [model.subnetwork(2), model.subnetwork(4)], torch.tensor([0, 1, 0])
    network = CpuNetwork(model.network_parameters(), model.config.sizes)
    mixed = counted(lambda: network.run(images, subnetworks, width_index))
    assert mixed == 2 * alone[2] + alone[4]
    with torch.no_grad():
        for _ in range(3):  # block by block, then packed
            logits = counted(lambda: model(images, heads=4))
        assert logits == 3 * alone[4] and is_packed(model)


@native
def test_the_counter_names_the_blocks():
    model = small.make(backend="native")
    with FlopCounterMode(display=False) as counter:
        model.train()(small.images(model.config), heads=3).sum().backward()
    counts = counter.get_flop_counts()
    assert {str(op) for op in counts["Global"]} == {f"hydravit.{name}_native" for name in ops.SCHEMAS}
    assert sum(counts["HydraViT.blocks.0"].values()) > sum(counts["HydraViT.blocks.1"].values()) > 0


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_op_has_a_formula(backend):
    names = [f"{name}_{backend}" for name in ops.SCHEMAS]
    assert all(getattr(torch.ops.hydravit, name) in flop_registry for name in (*names, "network_native"))


@native
def test_fake_tensors_count_the_widest():
    """A fake tensor hides which widths the images have; the count is then an upper bound."""
    arguments = calls()["mlp_block"]
    real = counted(lambda: torch.ops.hydravit.mlp_block_native(*arguments))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert counted(lambda: torch.ops.hydravit.mlp_block_native(*fake)) == real > 0


@pytest.mark.parametrize("first", ["hydravit.api", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter(first):
    """The counter imports Triton, so importing hydravit does not import the counter."""
    other = {"hydravit.api", "torch.utils.flop_counter"} - {first}
    code = f"""
import importlib, sys, torch
importlib.import_module({first!r})
assert {first!r} != "hydravit.api" or "torch.utils.flop_counter" not in sys.modules
importlib.import_module({other.pop()!r})
import torch.utils.flop_counter as counter
assert counter.__spec__.name == "torch.utils.flop_counter" and torch.utils.flop_counter is counter
assert torch.ops.hydravit.mlp_block_backward_native in counter.flop_registry
importlib.reload(counter)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
