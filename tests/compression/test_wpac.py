"""WPAC: the function stays, first channels matter most, and what cannot be compressed is refused in one line."""

import copy
import itertools

import pytest
import torch
from compressible import VARIANTS, random_batches
from small import SMALL, images, make, same

from bench.compression import CRITERIA, without_channels
from hydravit.checkpoint import read_checkpoint, save_checkpoint
from hydravit.compression import wpac
from hydravit.config import resolve_config
from hydravit.factory import fused_model
from hydravit.geometry import skd

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [dict(zip(("fold_mean", "balanced"), on, strict=True)) for on in itertools.product((False, True), repeat=2)]


def narrow(model, channels, hidden=None):
    """Every head cut to its first channels, by default with all hidden channels."""
    return skd(model.config, [(channels, model.config.hidden if hidden is None else hidden)] * model.config.depth)


def possible(variant, options):
    return not options["fold_mean"] or {"qkv_bias", "proj_bias"}.isdisjoint(VARIANTS[variant])


@pytest.mark.parametrize(
    ("variant", "options"), [case for case in itertools.product(VARIANTS, OPTIONS) if possible(*case)], ids=str
)
def test_the_full_width_computes_the_same(variant, options):
    model = make(**VARIANTS[variant]).double()
    config, before = model.config, copy.deepcopy(model)
    compressed = wpac(model, random_batches(config), **options)
    assert same(model, before) and not any(module._forward_hooks for module in model.modules())
    assert compressed.config == resolve_config(config, geometry="skd")
    x = images(config, 3).double()
    torch.testing.assert_close(compressed(x), model(x), rtol=0, atol=1e-11)
    assert not torch.allclose(compressed.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trained_vit_keeps_its_logits(trained, digits, options):
    compressed = wpac(trained, digits.batches, **options)
    with torch.inference_mode():
        torch.testing.assert_close(compressed(digits.test_images), trained(digits.test_images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first_channels_beat_other_criteria_without_training(trained, digits, options):
    """It was so with each of the seeds 0 to 9 of the training, by at least a point at half of the channels."""
    compressed = wpac(trained, digits.batches, **options)
    assert digits.top1(compressed, narrow(compressed, 2)) > digits.top1(trained) - 2
    for channels in (2, 1):
        kept = digits.top1(compressed, narrow(compressed, channels))
        for criterion in CRITERIA:
            assert kept > digits.top1(without_channels(trained, digits.batches, criterion, channels)), criterion


def test_more_channels_are_never_worse(trained, digits):
    compressed = wpac(trained, digits.batches)
    with torch.inference_mode():
        logits = [compressed(digits.images, heads=narrow(compressed, channels)) for channels in (1, 2, 3, 4)]
    errors = [float((found - logits[-1]).square().mean()) for found in logits]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_hidden_channels_are_in_the_order_of_their_importance(trained, digits):
    """The first half of them is better than the last one, which `fc2` reads as if it were the first."""
    compressed = wpac(trained, digits.batches)
    half, hidden = compressed.config.hidden // 2, compressed.config.hidden
    reversed_ = copy.deepcopy(compressed)
    for block in reversed_.blocks:
        for parameter, axis in ((block.mlp.fc1.weight, 0), (block.mlp.fc1.bias, 0), (block.mlp.fc2.weight, 1)):
            parameter.data = parameter.data.flip(axis)
    width = narrow(compressed, compressed.config.head_dim, half)
    assert hidden == 2 * half and digits.top1(compressed, width) > digits.top1(reversed_, width)


def test_the_size_of_batches_does_not_matter(trained, digits):
    width, logits = narrow(trained, 2, 16), []
    model = copy.deepcopy(trained).double()
    for size in (100, 1000):
        batches = zip(digits.images.split(size), digits.labels.split(size), strict=True)
        logits.append(wpac(model, batches)(digits.test_images.double(), heads=width))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)


def test_folded_values_have_no_mean(trained, digits):
    """Then a narrow width drops none: what it keeps of the mean is in the bias of proj."""
    compressed = wpac(trained, digits.batches, fold_mean=True)
    means = []
    hook = compressed.blocks[0].attn.qkv.register_forward_hook(
        lambda module, inputs, output: means.append(output.unflatten(-1, (3, -1))[:, :, 2].mean((0, 1)))
    )
    with torch.inference_mode():
        compressed(digits.images)
    hook.remove()
    assert means[0].abs().max() < 1e-5


def test_balanced_channels_do_not_depend_on_the_scales_of_queries_and_keys(trained, digits):
    """Queries ten times as long, and keys a tenth, are the same function, and the same channels of products."""
    model = copy.deepcopy(trained).double()
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        for block in rescaled.blocks:
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                queries, keys, _ = parameter.chunk(3)
                queries.mul_(10)
                keys.div_(10)
    x, width = digits.test_images.double(), narrow(model, 2)
    for balanced in (True, False):
        logits = [wpac(m, digits.batches, balanced=balanced)(x, heads=width) for m in (model, rescaled)]
        assert torch.allclose(*logits, rtol=0, atol=1e-6) == balanced


def test_frozen_models_and_other_modes_and_dtypes_stay_what_they_are():
    model = make().train().requires_grad_(False).to(torch.bfloat16)
    compressed = wpac(model, random_batches(SMALL))
    assert compressed.training and compressed.pos_embed.dtype == torch.bfloat16
    model, compressed = model.eval(), compressed.eval()
    x = images(SMALL).bfloat16()
    torch.testing.assert_close(compressed(x), model(x), rtol=0.05, atol=0.05)


def test_the_checkpoint_needs_nothing_else(tmp_path):
    compressed = wpac(make(), random_batches(SMALL))
    save_checkpoint(tmp_path / "wpac.safetensors", compressed, method="wpac")
    assert read_checkpoint(tmp_path / "wpac.safetensors").method == "wpac"
    loaded = fused_model(checkpoint=tmp_path / "wpac.safetensors", backend="reference").eval()
    x = images(SMALL)
    for heads in (1, 2, 3, 4, narrow(loaded, 5, 60)):
        assert torch.equal(loaded(x, heads=heads), compressed(x, heads=heads))


WRONG_MODELS = {
    "it has no classifier": {"num_classes": 0},
    "its widths have classifiers of their own": {"separate_classifiers": (2, 4)},
    "it does not pool": {"pool": ""},
}


@pytest.mark.parametrize("message", WRONG_MODELS)
def test_models_that_cannot_be_compressed(message):
    with pytest.raises(ValueError, match=message):
        wpac(make(**WRONG_MODELS[message]), [])


def test_wrong_arguments():
    good = random_batches(SMALL)
    with pytest.raises(TypeError, match="model must be a HydraViT, not Linear"):
        wpac(torch.nn.Linear(2, 2), good)
    for missing in ("qkv_bias", "proj_bias"):
        with pytest.raises(ValueError, match=f"fold_mean needs biases .* the model has {missing}=False"):
            wpac(make(**{missing: False}), good, fold_mean=True)
    with pytest.raises(ValueError, match="batches: there are none"):
        wpac(make(), [])
    for label in (-1, 10):
        with pytest.raises(ValueError, match=rf"labels must be in 0\.\.9, but one is {label}"):
            wpac(make(), [(images(SMALL), torch.tensor([3, label]))])
    with pytest.raises(RuntimeError, match="logits are not finite"):
        wpac(make(), [(images(SMALL) * float("nan"), torch.tensor([3, 4]))])
