"""Against timm: the same names, the same numbers at every width, its registry and its transforms."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import SMALL, images, make, shake

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

import hydravit.timm_models  # noqa: F401, I001  before timm: it repairs torchvision's import
import timm
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from hydravit import HydraViTConfig, fused_model
from hydravit.checkpoint import extract_config, infer_config, load_weights, save_checkpoint
from hydravit.config import resolve_config
from hydravit.data import load_dataset
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import get_recipe, photos
from hydravit.training import make_mix
from hydravit.torchvision_operators import _DECLARATION

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
TINY = HydraViTConfig(max_heads=3, depth=2)  # the width of ViT-Ti at full image size


@pytest.mark.parametrize("config", [SMALL, TINY], ids=["small", "tiny"])
def test_timm_weights_load_strictly(config):
    """Their full width computes what timm does; checkpoint/test_extraction.py compares every width with timm's."""
    model = HydraViT(config, backend="reference").eval()
    vit = shake(VisionTransformer(**extract_config(model, config.max_heads)).eval())
    model.load_state_dict(vit.state_dict(), strict=True)
    assert infer_config(vit.state_dict(), head_dim=config.head_dim) == config
    x = images(config, batch=1)
    torch.testing.assert_close(model(x), vit(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.forward_features(x), vit.forward_features(x), rtol=1e-5, atol=1e-5)


def test_a_timm_checkpoint_file_is_a_model(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.pth")
    model = fused_model(checkpoint=tmp_path / "vit.pth", backend="reference").eval()
    assert model.config == HydraViTConfig(max_heads=3, depth=1)
    x = images(model.config)
    torch.testing.assert_close(model(x), vit(x), rtol=1e-5, atol=1e-5)


def test_a_distilled_timm_checkpoint_is_explained():
    deit = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    model = HydraViT(resolve_config("tiny", depth=1), backend="reference")
    with pytest.raises(ValueError, match="distilled DeiT"):
        load_weights(model, deit.state_dict())
    with pytest.warns(UserWarning, match="dropped dist_token"):
        load_weights(model, deit.state_dict(), strict=False)
    assert torch.equal(model.pos_embed[:, 1:], deit.pos_embed[:, 2:])


@pytest.mark.parametrize("size", [48, 24, (40, 16)], ids=str)
@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_resampled_as_timm_does(size, no_embed_class, dtype):
    source = make(no_embed_class=no_embed_class).to(dtype)
    model = make(no_embed_class=no_embed_class, image_size=size).to(dtype)
    with pytest.warns(UserWarning, match="pos_embed is resampled from 4 x 4"):
        load_weights(model, source.state_dict())
    prefix = 0 if no_embed_class else 1
    expected = resample_abs_pos_embed(source.pos_embed, list(model.config.grid), num_prefix_tokens=prefix)
    assert torch.equal(model.pos_embed, expected)


# The registry ---------------------------------------------------------------------------------------------------------


def test_registered_models():
    assert timm.list_models("hydravit*") == [
        f"hydravit_{size}_patch16_224" for size in ("base", "large", "small", "tiny")
    ]
    with torch.device("meta"):
        model = timm.create_model("hydravit_base_patch16_224", heads=6, backend="reference")
    assert model.heads == 6 and model.config == HydraViTConfig()


def test_timm_arguments():
    arguments = {
        "num_classes": 7,
        "img_size": 64,
        "in_chans": 1,
        "drop_path_rate": 0.1,
        "global_pool": "avg",
        "depth": 2,
    }
    model = timm.create_model("hydravit_tiny_patch16_224", heads=2, backend="reference", drop_rate=0.0, **arguments)
    assert model.config == HydraViTConfig(
        num_classes=7, image_size=64, in_channels=1, drop_path=0.1, pool="avg", depth=2, max_heads=3
    )
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    data = resolve_model_data_config(model)
    assert data["input_size"] == (1, 64, 64) and data["mean"] == (0.5,)
    assert model.default_cfg["classifier"] == "head" and isinstance(model.get_classifier(), type(model.head))
    model.reset_classifier(3)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    model.reset_classifier(4, "avg")
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    with pytest.raises(ValueError, match="pool must be 'token', 'avg', 'avgmax', 'max' or '', not 'map'"):
        model.reset_classifier(5, "map")
    assert model.num_classes == 4
    with pytest.raises(ValueError, match="drop_rate: this model has no dropout"):
        timm.create_model("hydravit_tiny_patch16_224", drop_rate=0.1)
    with pytest.raises(ValueError, match="unknown config field.*embed_dim"):
        timm.create_model("hydravit_tiny_patch16_224", embed_dim=128)
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("hydravit_tiny_patch16_224", pretrained=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_reads_our_checkpoints(tmp_path, suffix):
    config = resolve_config("tiny", depth=1, image_size=32)
    source, path = make(config), tmp_path / f"model{suffix}"
    save_checkpoint(path, source)
    for name in ("hydravit_tiny_patch16_224", "vit_tiny_patch16_224"):
        loaded = timm.create_model(name, depth=1, img_size=32, checkpoint_path=str(path)).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("size", [(300, 200), (180, 411), (224, 224), (37, 90)], ids=str)
def test_preprocessing_is_timms_evaluation_transform(size):
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transform = create_transform((3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=0.9)
    torch.testing.assert_close(Preprocessing()(image), transform(image), rtol=0, atol=1e-6)


@pytest.fixture
def photos_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_heavy_augmentation_is_timms_and_repeats_with_the_seed(photos_folder):
    recipe = dataclasses.replace(get_recipe("hydravit-imagenet"), random_erasing=0.9)
    dataset = load_dataset(str(photos_folder), split="train", image_size=32)
    photos.augment(dataset, recipe)

    def draw(seed):
        torch.manual_seed(seed)
        return torch.stack([dataset[i][0] for i in range(4)])

    assert draw(1).shape == (4, 3, 32, 32) and draw(1).dtype == torch.float32
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    with pytest.raises(ValueError, match="for a folder of photos"):
        photos.augment(load_dataset("digits", split="train"), recipe)


def test_mixing_labels():
    mix = photos.mix(get_recipe("hydravit-imagenet"), 10)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    torch.manual_seed(3)
    mixed, targets = mix(images.clone(), labels)
    torch.manual_seed(3)
    again, _ = mix(images.clone(), labels)
    assert torch.equal(mixed, again) and not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert make_mix(get_recipe("demo"), load_dataset("digits", split="train")) is None


@pytest.mark.long
def test_a_mended_torchvision_lets_timm_be_imported_first(tmp_path):
    """One whose library does not load, as that of the registry beside a torch for CPUs, in processes of its own."""
    source = Path(find_spec("torchvision").origin).parent
    copy = shutil.copytree(source, tmp_path / "torchvision", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    extension = copy / "extension.py"
    extension.write_text(extension.read_text().replace(_DECLARATION, ""))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def python(*arguments):
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    assert "torchvision::nms does not exist" in python("-c", "import timm").stderr
    for said in (True, False):  # mending twice is mending once
        mended = python("-m", "hydravit.torchvision_operators")
        assert mended.returncode == 0 and (str(extension) in mended.stdout) == said
    assert extension.read_text().count(_DECLARATION) == 1
    for first in ("timm", "hydravit.timm_models, timm"):
        done = python("-c", f"import {first}; import torchvision; print(torchvision.__file__)")
        assert done.stdout.strip() == str(copy / "__init__.py"), done.stderr
