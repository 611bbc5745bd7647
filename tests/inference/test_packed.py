"""Inference through one packed copy of the weights: the bits of the blocks, and only where nothing else can be seen."""

import copy
import pickle

import pytest
import torch
from budget import assert_within_budget
from packing import VARIANTS, WIDE, block_by_block, check, is_packed, make, tensors_held_by, warm
from small import SMALL, draws_of_logits, images, poison
from torch import nn

from hydravit import HydraViT, HydraViTConfig, geometry, layers
from hydravit.config import resolve_config
from hydravit_kernels import CpuNetwork

pytestmark = [
    pytest.mark.needs("native"),
    pytest.mark.usefixtures("one_thread"),
]


# ---- The same bits ----


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_width_has_the_bits_of_its_blocks(isa, variant, batch):
    config = resolve_config(WIDE, **VARIANTS[variant])
    model, x = make(config), images(config, batch)
    for heads in model.allowed_heads:
        check(model, x, heads)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(isa, threads, count, batch):
    threads(count)
    for config in (WIDE, resolve_config(WIDE, pool="avg", image_size=(96, 88), depth=2)):
        model, x = make(config), images(config, batch)
        for heads in model.allowed_heads:
            check(model, x, heads)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("variant", ["plain", "average pooling", "no classifier", "separate classifiers", "dynabert"])
def test_every_image_at_its_own_width(isa, threads, variant, count):
    threads(count)
    config = resolve_config(WIDE, **VARIANTS[variant])
    model, x = make(config), images(config, 8)
    for widths in ([4, 1, 2, 2, 4, 1, 1, 4], [2] * 8, [1, 1, 1, 1, 4, 4, 4, 4]):
        check(model, x, torch.tensor(widths))
        with torch.no_grad():
            mixed = model(x, heads=torch.tensor(widths))
            for i, heads in enumerate(widths):
                alone = model(x[i : i + 1], heads=heads)[0]
                assert torch.equal(mixed[i, : len(alone)], alone) and not mixed[i, len(alone) :].any()


def check_subnetwork(config, subnetwork, served):
    assert (not CpuNetwork.why_not(subnetwork)) == served
    check(poison(make(config), [subnetwork]), images(config, 3), subnetwork, served)


@pytest.mark.parametrize(
    "width, suffix, served",
    [
        (32, False, True),
        (96, False, True),
        (8, False, False),  # the key rows follow the query rows: less than a panel of them
        (32, True, True),
        (64, True, True),
        (96, True, True),
        (48, True, False),
        (4, True, False),
    ],
)
@pytest.mark.parametrize("head_dim", [24, 32])
def test_scala(isa, width, suffix, served, head_dim):
    config = resolve_config(WIDE, head_dim=head_dim)
    check_subnetwork(config, geometry.scala(config, width, suffix=suffix), served)


@pytest.mark.parametrize(
    "table, served",
    [
        ([(24, 96), (0, 40), (24, 0)], True),
        ([(0, 0), (24, 1), (0, 0)], True),
        ([(24, 384), (24, 7), (0, 384)], True),
        ([(0, 0)] * 3, True),
        ([(24, 96), (23, 96), (24, 96)], False),  # the heads' rows lie apart
    ],
)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_skipped_branches(isa, table, served, pool):
    config = resolve_config(WIDE, pool=pool)
    check_subnetwork(config, geometry.skd(config, table), served)


def test_widths_that_begin_off_a_panel_are_served_by_the_blocks():
    """SMALL's second classifier begins in row 10; 80 channels put the keys in row 80."""
    config = resolve_config(SMALL, separate_classifiers=(1, 3, 4))
    model, x = make(config), images(config)
    check(model, x, 3, served=False)
    check(model, x, 1)
    check(make(max_heads=5, head_dim=16), images(WIDE), 2, served=False)
    mixture = torch.tensor([1, 3])
    check(make(config), x, mixture, served=False)


def test_values_of_any_strides():
    """Weights whose rows lie apart and images of any strides are read as the blocks read them."""
    model, x = make(), images(WIDE, 3)
    qkv = model.blocks[0].attn.qkv
    room = torch.full((qkv.weight.shape[0], 2 * qkv.weight.shape[1]), float("nan"))
    room[:, : qkv.weight.shape[1]] = qkv.weight.detach()
    qkv.weight = nn.Parameter(room[:, : qkv.weight.shape[1]])
    assert not qkv.weight.is_contiguous()
    for view in (x, x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2], x.flip(0)[::2]):
        check(model, view, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_and_autocast(mode):
    model, x = make(separate_classifiers=(1, 2, 4)), images(WIDE)
    for current in (mode, torch.no_grad):  # what was packed under inference_mode serves outside
        with current():
            logits = [model(x, heads=2) for _ in range(3)]
            assert is_packed(model)
            expected = block_by_block(model, x, heads=2)
            assert all(torch.equal(one, expected) for one in logits)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(x, heads=2), block_by_block(model, x, heads=2))


# ---- Where it would be seen, the blocks run one by one ----


def test_not_in_training():
    model, x = make(drop_path=0.5), images(WIDE)
    warm(model, x)
    with torch.no_grad():
        evaluated = model(x)
        model.train()
        assert any(not torch.equal(model(x), evaluated) for _ in range(5))


@pytest.mark.parametrize("frozen", [False, True])
def test_not_where_a_gradient_is_wanted(frozen):
    """Of parameters, or of the images of a frozen model."""
    model, x = make().requires_grad_(not frozen), images(WIDE)
    warm(model, x)
    gradients = []
    for call in (model, lambda *a, **k: block_by_block(model, *a, **k)):
        leaves = [x.clone().requires_grad_()] if frozen else [x, *model.parameters()]
        logits = call(leaves[0], heads=3)
        gradients.append(torch.autograd.grad(logits.square().sum(), leaves if frozen else leaves[1:]))
    assert all(map(torch.equal, *gradients))
    assert gradients[0][-1].any()


def test_frozen_but_for_one_parameter():
    model, x = make().requires_grad_(False), images(WIDE)
    warm(model, x)
    assert not model(x).requires_grad
    model.norm.weight.requires_grad_()
    model(x).sum().backward()
    assert model.norm.weight.grad.any()


def test_not_in_a_compiled_graph():
    model, x = make(), images(WIDE)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        warm(model, x)
        compiled = torch.compile(model, backend=keep, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x, heads=3), model(x, heads=3))
    assert graphs and not any("network_native" in graph for graph in graphs)


def test_hooks_on_blocks_fire():
    model, x, seen = make(), images(WIDE), []
    warm(model, x)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.blocks[1], register)(lambda *arguments: seen.append(arguments))
        with torch.no_grad():
            for count in (1, 2, 3):
                model(x)
                assert len(seen) == count
        handle.remove()
        seen.clear()
    with torch.no_grad():
        expected = model(x)
        assert not seen and is_packed(model)
        handle = model.blocks[1].register_forward_hook(lambda block, inputs, output: output * 0)
        assert not torch.equal(model(x), expected)  # a hook may change what the block returns
        handle.remove()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_all_modules_fire(register):
    model, x, seen = make(), images(WIDE), []
    warm(model, x)
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert all(block in seen for block in model.blocks)


def test_another_block_is_called():
    class Quiet(layers.Block):
        def forward(self, x):
            return x

    model, x = make(), images(WIDE)
    warm(model, x)
    quiet = Quiet(model.config, 0.0)
    quiet.load_state_dict(model.blocks[1].state_dict())
    own, model.blocks[1] = model.blocks[1], quiet
    with torch.no_grad():
        expected = block_by_block(model, x)
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        model.blocks[1] = own
        own.forward = quiet.forward  # as libraries do that wrap a module's forward
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        del own.forward
        model.packed_inference.drop()
        warm(model, x)
        assert not torch.equal(model(x), expected)


def test_tensors_without_memory():
    """Under a fake mode the blocks' own ops run, under ``torch.func.vmap`` the reference's formulas."""
    model, x = make(), images(WIDE)
    warm(model, x)
    with torch.no_grad():
        weights = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}
        for _ in range(3):
            both = torch.func.vmap(lambda w: torch.func.functional_call(model, w, (x,)))(weights)
        each = [{name: p[i] for name, p in weights.items()} for i in range(2)]
        for logits, state in zip(both, each, strict=True):
            alone = HydraViT(model.config, backend="reference").eval()
            alone.load_state_dict(state)
            assert_within_budget(logits, draws_of_logits(alone, x, torch.float32)[0])
        with torch._subclasses.fake_tensor.FakeTensorMode() as fake:
            weights = {name: fake.from_tensor(p) for name, p in model.named_parameters()}
            for _ in range(3):
                assert torch.func.functional_call(model, weights, (fake.from_tensor(x),)).shape == (2, 32)
        assert torch.equal(model(x), block_by_block(model, x))


# ---- The copy as a part of the model ----


def test_copies_start_without_the_packed_weights():
    model, x = make(), images(WIDE)
    warm(model, x)
    size = len(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.packed_inference)):
        packed_inference = getattr(other, "packed_inference", other)
        assert packed_inference is not model.packed_inference and packed_inference.network is None
    other = copy.deepcopy(model)
    model.packed_inference.drop()
    assert len(pickle.dumps(model)) == size
    with torch.no_grad():
        other.head.bias.add_(1.0)
        for _ in range(3):
            torch.testing.assert_close(other(x), model(x) + 1.0)


def test_switched_off():
    model, x = make(), images(WIDE)
    warm(model, x)
    model.packed_inference = None
    with torch.no_grad():
        expected = model(x)
        model.head.bias.add_(1.0)
        torch.testing.assert_close(model(x), expected + 1.0)
    model.weights_changed()
    assert copy.deepcopy(model.to(torch.float32)).packed_inference is None


def test_memory():
    """With all widths ready the copy takes a tenth more than the parameters at most, and a few addresses per width."""
    config = HydraViTConfig(image_size=32, patch_size=16, depth=2, max_heads=6, num_classes=100)
    model, x = make(config), images(config)
    for heads in (*model.allowed_heads, torch.tensor([1, 6])):
        warm(model, x, heads=heads)
    held = tensors_held_by(model.packed_inference.network)
    parameters = sum(p.nbytes for p in model.parameters())
    plans = [tensor for tensor in held if tensor.dtype == torch.uint8]
    assert len(held) == 1 + len(plans) and len(plans) == len(model.allowed_heads)
    assert all(tensor.nbytes < 3000 for tensor in plans)
    assert parameters < sum(t.untyped_storage().nbytes() for t in held) <= 1.1 * parameters
