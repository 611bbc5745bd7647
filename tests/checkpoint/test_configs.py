"""The config of a checkpoint: its own, a given one, or the one that its shapes tell."""

import pytest
import torch
from small import SMALL, images, make, quietly, same, without

from hydravit import fused_model
from hydravit.checkpoint import infer_config, load_weights, save_checkpoint
from hydravit.config import resolve_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"register_tokens": 2, "no_embed_class": True, "layer_scale": 1e-5},
        {"register_tokens": 2},
        {"pool": "avg", "class_token": False, "qkv_bias": False, "in_channels": 1},
        {"pool": "avg", "mlp_ratio": 2.5, "num_classes": 0},
    ],
    ids=str,
)
def test_config_from_shapes(variant):
    model = make(**variant)
    assert infer_config(model.state_dict(), head_dim=16) == model.config


def test_config_from_shapes_needs_help():
    state = make(image_size=(16, 40)).state_dict()
    with pytest.raises(ValueError, match="no square grid; pass the image_size"):
        infer_config(state, head_dim=16)
    assert infer_config(state, head_dim=16, image_size=(16, 40)).grid == (2, 5)
    for head_dim in (48, 0):
        with pytest.raises(ValueError, match=f"64 is not a multiple of head_dim {head_dim}"):
            infer_config(state, head_dim=head_dim)
    with pytest.raises(ValueError, match="pos_embed is missing"):
        infer_config(without("pos_embed")(state))
    with pytest.raises(ValueError, match="separate classifiers .* pass a config"):
        infer_config(make(separate_classifiers=(2,)).state_dict(), head_dim=16)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("patch_embed.proj.weight", (32, 3, 0, 0), r"damaged: patch_embed.proj.weight has shape \(32, 3, 0, 0\)"),
        ("patch_embed.proj.weight", (0, 3, 8, 8), r"damaged: patch_embed.proj.weight has shape \(0, 3, 8, 8\)"),
        ("patch_embed.proj.weight", (64, 3, 8, 4), "patches of 8 x 4 pixels; expected squares"),
        ("pos_embed", (1, 0, 64), "damaged: pos_embed has shape"),
        ("blocks.0.mlp.fc1.weight", (0, 64), "damaged: blocks.0.mlp.fc1.weight has shape"),
        ("head.weight", (640,), r"head.weight has shape \(640,\); expected \(classes, 64\)"),
    ],
)
def test_config_from_damaged_weights(name, shape, message):
    with pytest.raises(ValueError, match=message):
        infer_config(make().state_dict() | {name: torch.ones(shape)}, head_dim=16)
    model = make()
    with pytest.raises(ValueError):
        load_weights(model, make().state_dict() | {name: torch.ones(shape)})


@pytest.mark.parametrize("size", ["32", None, (32,), (32, 0), 30, True, 32.0], ids=str)
def test_config_from_shapes_refuses_a_wrong_image_size(size):
    with pytest.raises(ValueError, match=r"image_size .* must be one or two multiples of patch_size 8"):
        infer_config(make().state_dict(), head_dim=16, image_size=size)


def test_config_from_shapes_of_an_inexact_mlp_ratio():
    model = make(max_heads=1, head_dim=49, mlp_ratio=3 / 49)
    config = infer_config(model.state_dict(), head_dim=49)
    assert config == model.config and config.hidden == 3


def test_fused_model_and_the_config_of_a_checkpoint(tmp_path):
    model, path = make(), tmp_path / "model.safetensors"
    save_checkpoint(path, model, trained_heads=(1, 2, 4))
    assert same(fused_model(config=SMALL, checkpoint=path, backend="reference"), model)
    with pytest.raises(ValueError, match=r"model.safetensors: config 'base' is not that of the checkpoint: image_size"):
        fused_model(config="base", checkpoint=path)
    with pytest.raises(ValueError, match=r"depth 3 \(checkpoint: 2\)"):
        fused_model(config=resolve_config(SMALL, depth=3), checkpoint=path)
    with pytest.raises(ValueError, match="unknown config 'huge'"):
        fused_model(config="huge")
    with pytest.raises(ValueError, match="unknown config field.*colour"):
        fused_model(checkpoint=path, colour=True)
    with pytest.raises(ValueError, match="heads=3 was not trained"):
        fused_model(3, checkpoint=path)
    other = quietly(
        fused_model, 2, checkpoint=path, num_classes=3, image_size=48, dtype=torch.float64, backend="reference"
    )
    assert other.heads == 2 and other.trained_heads == (1, 2, 4) and other.config.depth == 2
    assert other(images(other.config).double()).shape == (2, 3)


def test_fused_model_of_plain_weights(tmp_path):
    model, path = make(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert same(fused_model(checkpoint=path, head_dim=16, backend="reference"), model)
    wider = quietly(fused_model, 4, config=resolve_config(SMALL, max_heads=6), checkpoint=path, backend="reference")
    x = images(model.config)
    torch.testing.assert_close(wider.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    resampled = quietly(fused_model, checkpoint=path, head_dim=16, image_size=(16, 40), backend="reference")
    assert resampled.config == resolve_config(SMALL, image_size=(16, 40))
    oblong = make(image_size=(16, 40))
    torch.save(oblong.state_dict(), path)
    with pytest.raises(ValueError, match="model.pt.*no square grid; pass the image_size"):
        fused_model(checkpoint=path, head_dim=16)
    assert same(fused_model(checkpoint=path, head_dim=16, image_size=(16, 40), backend="reference"), oblong)
    torch.save(without("pos_embed")(model.state_dict()), path)
    with pytest.raises(ValueError, match="model.pt.*pos_embed is missing"):
        fused_model(checkpoint=path)
