"""Wrong input: an error that names the argument, what came and what is expected; never a wrong answer."""

import pytest
import torch

import hydravit
from hydravit import HydraViTConfig

SMALL = HydraViTConfig(image_size=32, patch_size=8, depth=1, max_heads=4, head_dim=8, num_classes=10)


@pytest.fixture
def model(backend):
    return hydravit.fused_model(config=SMALL, backend=backend)


IMAGES = torch.zeros(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (0, ValueError, "heads must be in 1..4, not 0"),
        (-1, ValueError, "heads must be in 1..4, not -1"),
        (5, ValueError, "heads must be in 1..4, not 5"),
        (2.5, TypeError, "not float 2.5"),
        (2.0, TypeError, "not float 2.0"),
        (True, TypeError, "not bool True"),
        ("3", TypeError, "not str 3"),
        ([1, 2], TypeError, "not list"),
        (torch.tensor([1.0, 2.0]), TypeError, "integer tensor, not torch.float32"),
        (torch.tensor([True, False]), TypeError, "integer tensor, not torch.bool"),
        (torch.tensor([1, 2, 3]), ValueError, r"shape \(2,\), not \(3,\)"),
        (torch.tensor(2), ValueError, r"shape \(2,\), not \(\)"),
        (torch.tensor([1, 5]), ValueError, "heads must be in 1..4, not 5"),
        (torch.tensor([0, 1]), ValueError, "heads must be in 1..4, not 0"),
    ],
)
def test_heads(model, heads, error, message):
    with pytest.raises(error, match=message):
        model(IMAGES, heads=heads)
    if not isinstance(heads, torch.Tensor):
        with pytest.raises(error, match=message):
            model.heads = heads
        with pytest.raises(error, match=message):
            hydravit.fused_model(heads, config=SMALL)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 40), ValueError, r"images must be \(B, 3, 32, 32\).*\(2, 3, 32, 40\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"not \(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), ValueError, r"not \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), ValueError, "B > 0"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8, the model is torch.float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), TypeError, "torch.float64, the model is torch.float32"),
        (torch.zeros(2, 3, 32, 32, device="meta"), ValueError, "on meta, the model on cpu"),
        (IMAGES.numpy(), TypeError, "images must be a tensor, not ndarray"),
        (None, TypeError, "images must be a tensor, not NoneType"),
    ],
)
def test_images(model, images, error, message):
    with pytest.raises(error, match=message):
        model(images)
    with pytest.raises(error, match=message):
        model.forward_features(images, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": "huge"}, ValueError, "unknown config 'huge'; known: tiny, small, base, large"),
        ({"config": 12}, TypeError, "config must be a name or a HydraViTConfig, not int"),
        ({"width": 12}, ValueError, "unknown config field.* width; known: "),
        ({"backend": "cudnn"}, ValueError, "unknown backend 'cudnn'; known: auto, native, reference"),
        ({"depth": 0}, ValueError, "depth must be an integer of at least 1, not 0"),
        ({"max_heads": 2.0}, ValueError, "max_heads must be an integer"),
        ({"num_classes": -1}, ValueError, "num_classes must be an integer of at least 0"),
        ({"image_size": 30}, ValueError, "image_size 30 must be one or two multiples of patch_size 8"),
        ({"image_size": (32, 32, 32)}, ValueError, "image_size"),
        ({"image_size": "32"}, ValueError, "image_size"),
        ({"pool": "max"}, ValueError, "pool must be 'token' or 'avg', not 'max'"),
        ({"class_token": False}, ValueError, "pool='token' needs class_token=True"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\)"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be positive"),
        ({"mlp_ratio": 0.3}, ValueError, r"mlp_ratio \* head_dim"),
        ({"separate_classifiers": (1, 9)}, ValueError, "separate_classifiers: 9 is not a number of heads"),
        ({"geometry": "onion"}, ValueError, "geometry: unknown 'onion'"),
    ],
)
def test_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        hydravit.fused_model(**{"config": SMALL, **arguments})


def test_untrained_widths_are_refused_unless_asked_for(backend):
    model = hydravit.HydraViT(SMALL, trained_heads=(1, 3), backend=backend)
    assert model.heads == 3 and model.allowed_heads == (1, 3)
    for heads in (2, 4, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=r"was not trained \(model.allow_untrained = True allows it\).*\[1, 3\]"):
            model(IMAGES, heads=heads)
    with pytest.raises(ValueError, match="was not trained"):
        model.heads = 2
    model.allow_untrained = True
    assert model(IMAGES, heads=2).shape == (2, 10)
    model.allow_untrained = False
    with pytest.raises(ValueError, match="was not trained"):
        model(IMAGES, heads=2)


def test_features_of_another_width(model):
    features = model.forward_features(IMAGES, 3)
    with pytest.raises(ValueError, match="features have 24 channels, these heads have 16"):
        model.forward_head(features, 2)


def test_geometry_of_another_model(model):
    other = hydravit.geometry.hydravit(hydravit.CONFIGS["base"], 3)
    with pytest.raises(ValueError, match="geometry has 12 attention"):
        model(IMAGES, heads=other)


def test_attention_maps_of_mixed_widths(model):
    with pytest.raises(ValueError, match="one width for the batch"):
        model.attention_maps(IMAGES, heads=torch.tensor([1, 2]))


def test_a_weight_the_kernel_cannot_read_in_place(backend):
    """A parameter whose innermost stride is not one is never copied: the native backend refuses it."""
    model = hydravit.fused_model(config=SMALL, backend=backend)
    proj = model.blocks[0].attn.proj
    expected = model(IMAGES)
    proj.weight = torch.nn.Parameter(proj.weight.detach().t().contiguous().t())
    if backend == "reference":
        torch.testing.assert_close(model(IMAGES), expected)
    else:
        with pytest.raises(RuntimeError, match="proj_weight.*innermost stride"):
            model(IMAGES)


def test_a_named_backend_runs_or_raises(monkeypatch):
    with pytest.raises(RuntimeError, match="backend 'native'"):
        hydravit.fused_model(config=SMALL, backend="native", dtype=torch.float16)
    monkeypatch.setenv("HYDRAVIT_BACKEND", "reference")
    assert hydravit.fused_model(config=SMALL).backend == "reference"
    monkeypatch.setenv("HYDRAVIT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        hydravit.fused_model(config=SMALL)
