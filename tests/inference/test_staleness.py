"""When the packed copy is made, and that it is never older than the weights."""

import copy

import pytest
import torch
from packing import WIDE, block_by_block, is_packed, make, warm
from small import images, shake
from torch import nn

from hydravit import HydraViT
from hydravit.training import SliceAdamW, SliceGradients

pytestmark = [
    pytest.mark.needs("native"),
    pytest.mark.usefixtures("one_thread"),
]


# ---- When it is made ----


def test_made_by_the_second_call_that_finds_the_same_parameters():
    model, x = make(), images(WIDE)
    with torch.no_grad():
        model(x, heads=1)
        assert not is_packed(model)
        model.head.bias.add_(1.0)
        model(x, heads=2)
        assert not is_packed(model)
        model(x, heads=3)  # another width, the same parameters
        first = model.packed_inference.network
        assert first is not None
        for heads in (1, 2, 3, 4, torch.tensor([1, 4])):
            model(x, heads=heads)
            assert model.packed_inference.network is first


def test_training_in_turns_packs_nothing():
    model, x = make(), images(WIDE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        assert not is_packed(model)


def test_parameters_made_under_inference_mode_are_never_packed():
    """They count no changes."""
    with torch.inference_mode():
        model, x = make(), images(WIDE)
        for _ in range(3):
            assert torch.equal(model(x), block_by_block(model, x))
            model.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert not is_packed(model)


def test_parameters_of_wrong_shapes_raise_in_every_call():
    """The packed copy has no room for them: their neighbours would be read instead."""
    for name in ("blocks.1.attn.qkv.bias", "blocks.0.norm1.weight", "blocks.0.mlp.fc2.weight", "norm.bias"):
        model, x = make(), images(WIDE)
        layer, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(layer), leaf, nn.Parameter(model.get_parameter(name).detach()[:-1].clone()))
        for _ in range(3):
            with torch.no_grad(), pytest.raises(RuntimeError, match=": shape .* expected"):
                model(x)


# ---- When it is stale ----


def step(optimizer_of):
    def change(model, x):
        optimizer = optimizer_of(model.parameters())
        model(x).square().sum().backward()
        optimizer.step()

    return change


def slice_step(model, x):
    gradients, optimizer = SliceGradients(model), SliceAdamW(model.parameters(), model, lr=0.1)
    model(x, heads=2).square().sum().backward()
    optimizer.step()
    gradients.close()


@torch.no_grad()
def edit_in_place(model, x):
    model.blocks[1].mlp.fc1.weight.mul_(1.5)


def edit_data(model, x):
    model.blocks[1].mlp.fc1.weight.data.mul_(1.5)
    model.weights_changed()


def edit_numpy(model, x):
    model.norm.bias.detach().numpy()[:] += 1.0
    model.weights_changed()


def load(assign):
    def change(model, x):
        state = {name: p.clone() * 1.25 for name, p in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def replace_parameter(model, x):
    model.blocks[0].attn.proj.weight = nn.Parameter(model.blocks[0].attn.proj.weight.detach() * 2)


def replace_layer(model, x):
    model.blocks[0].mlp = shake(copy.deepcopy(model.blocks[0].mlp))


def replace_block(model, x):
    model.blocks[0] = shake(copy.deepcopy(model.blocks[1]))


def swap_blocks(model, x):
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def reset(classes):
    def change(model, x):
        model.reset_classifier(classes)
        shake(model.head)

    return change


def double_and_back(model, x):
    model.requested_backend = "auto"
    model.to(torch.float64)
    with torch.no_grad():
        model(x.double())
        model.head.weight.mul_(1.5)
    model.to(torch.float32)


def average(model, x):
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    average.update_parameters(shake(copy.deepcopy(model)))
    model.load_state_dict(average.module.state_dict())


CHANGES = {
    "SGD": step(lambda p: torch.optim.SGD(p, 0.1)),
    "AdamW": step(lambda p: torch.optim.AdamW(p, 0.1)),
    "fused AdamW": step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "fused SGD": step(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "foreach AdamW": step(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "AdamW of the slice": slice_step,
    "in place": edit_in_place,
    "data": edit_data,
    "numpy": edit_numpy,
    "load_state_dict": load(assign=False),
    "load_state_dict, assigned": load(assign=True),
    "replaced parameter": replace_parameter,
    "replaced layer": replace_layer,
    "replaced block": replace_block,
    "swapped blocks": swap_blocks,
    "more classes": reset(40),
    "no classes": reset(0),
    "float64 and back": double_and_back,
    "average": average,
}


@pytest.mark.filterwarnings("ignore:hydravit. using backend")  # float64
@pytest.mark.parametrize("name", CHANGES)
def test_changed_parameters_are_used_at_once(name):
    model, x = make(), images(WIDE)
    warm(model, x)
    with torch.no_grad():
        before = model(x)
    CHANGES[name](model, x)
    with torch.no_grad():
        fresh = HydraViT(model.config, backend="native").eval()
        fresh.load_state_dict(model.state_dict())
        expected = block_by_block(fresh, x)
        assert not torch.equal(before, expected)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert is_packed(model)


def test_another_parameter_in_the_same_memory():
    """Neither the address nor the count of changes tells the new one from the old."""
    model, x, memory = make(), images(WIDE), torch.randn(WIDE.embed).numpy()
    with torch.no_grad():
        for _ in range(3):
            memory += 1.0
            model.norm.bias = nn.Parameter(torch.from_numpy(memory))
            for _ in range(3):
                assert torch.equal(model(x), block_by_block(model, x))
            assert is_packed(model)


def test_functional_call_uses_the_weights_it_is_given():
    model, x = make(), images(WIDE)
    own = dict(model.named_parameters())

    def scaled(scale):  # its tensors are gone when it returns, so that the next call's may have their memory
        return torch.func.functional_call(model, {name: p.detach() * scale for name, p in own.items()}, (x,))

    scales = [1.0, 1.0, 1.0, 1.5, 0.5, 0.5, 1.0]
    expected = []
    with torch.no_grad():
        for scale in scales:
            other = copy.deepcopy(model)
            for parameter in other.parameters():
                parameter.mul_(scale)
            expected.append(block_by_block(other, x))
        warm(model, x)
        assert all(torch.equal(scaled(scale), logits) for scale, logits in zip(scales, expected, strict=True))
        assert torch.equal(model(x), expected[0])


def test_parametrized_weights():
    """Every call computes them anew, perhaps in the memory of the last."""
    model, x = make(), images(WIDE)
    proj = model.blocks[0].attn.proj

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(proj, "weight", Half())
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(x), block_by_block(model, x))
            proj.parametrizations.weight.original.mul_(1.5)
