"""Ordered heads and channels: the function stays, and first ones matter most."""

import copy

import pytest
import torch
from compressible import VARIANTS, random_batches
from small import SMALL, images, make, same

from hydravit.compression import order_heads
from hydravit.config import resolve_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_full_width_computes_the_same(variant):
    model = make(**VARIANTS[variant]).double()
    before = copy.deepcopy(model)
    ordered = order_heads(model, random_batches(model.config))
    assert same(model, before)
    assert ordered.config == resolve_config(model.config, geometry="hydravit")
    x = images(model.config, 3).double()
    torch.testing.assert_close(ordered(x), model(x), rtol=0, atol=1e-11)
    for name, parameter in ordered.state_dict().items():  # nothing is computed, only moved
        assert torch.equal(parameter.flatten().sort().values, model.state_dict()[name].flatten().sort().values)


def test_half_of_the_heads_beat_the_raw_first_half_without_training(trained, digits):
    """It was so with each of the seeds 0 to 9 of the training, by at least four points at half of the heads."""
    ordered = order_heads(trained, digits.batches)
    with torch.inference_mode():
        torch.testing.assert_close(ordered(digits.test_images), trained(digits.test_images), rtol=1e-5, atol=1e-5)
    for heads in (4, 5, 6):
        assert digits.top1(ordered, heads) > digits.top1(trained, heads)


def test_what_nobody_reads_comes_last():
    """A head without values, a hidden channel without a reader, and a residual channel that no norm lets through."""
    model = make()
    dim, embed = SMALL.head_dim, SMALL.embed
    with torch.no_grad():
        for block, head in zip(model.blocks, (0, 2), strict=True):
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                parameter[2 * embed + head * dim : 2 * embed + (head + 1) * dim] = 0
            block.mlp.fc2.weight[:, head] = 0
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]:
            norm.weight[5] = norm.bias[5] = 0
    ordered = order_heads(model, random_batches(SMALL))
    for block in ordered.blocks:
        values = block.attn.qkv.weight[2 * embed :].view(SMALL.max_heads, dim, embed)
        assert [bool(head.any()) for head in values] == [True, True, True, False]
        assert not block.mlp.fc2.weight[:, -1].any() and block.mlp.fc2.weight[:, :-1].any(0).all()
    assert ordered.norm.weight[-1] == 0 and ordered.norm.weight[:-1].all()
    x = images(SMALL)
    torch.testing.assert_close(ordered(x), model(x))


def test_every_width_needs_the_images_again():
    with pytest.raises(ValueError, match="several passes need a list, a DataLoader or CalibrationImages"):
        order_heads(make(), iter(random_batches(SMALL)))
    order_heads(make(max_heads=1), [])  # there is nothing to order


def test_models_that_cannot_be_compressed():
    with pytest.raises(ValueError, match="it has no classifier"):
        order_heads(make(num_classes=0), [])
