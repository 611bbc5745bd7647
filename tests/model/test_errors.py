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
        (torch.tensor([[1, 2]]), ValueError, r"shape \(2,\), not \(1, 2\)"),
        (torch.tensor(5), ValueError, "heads must be in 1..4, not 5"),
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
        (torch.zeros(0, 3, 32, 40), ValueError, r"not \(0, 3, 32, 40\)"),
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
        ({"backend": "cudnn"}, ValueError, "unknown backend 'cudnn'; known: auto, native, reference, triton"),
        ({"depth": 0}, ValueError, "depth must be an integer of at least 1, not 0"),
        ({"max_heads": 2.0}, ValueError, "max_heads must be an integer"),
        ({"num_classes": -1}, ValueError, "num_classes must be an integer of at least 0"),
        ({"image_size": 30}, ValueError, "image_size 30 must be one or two multiples of patch_size 8"),
        ({"image_size": (32, 32, 32)}, ValueError, r"image_size \(32, 32, 32\) must be one or two"),
        ({"image_size": "32"}, ValueError, "image_size '32' must be one or two"),
        ({"image_size": None}, ValueError, "image_size None must be one or two multiples of patch_size 8"),
        ({"image_size": (32,)}, ValueError, r"image_size \(32,\) must be one or two"),
        ({"image_size": True}, ValueError, "image_size True must be"),
        ({"pool": "map"}, ValueError, "pool must be 'token', 'avg', 'avgmax', 'max' or '', not 'map'"),
        ({"class_token": False}, ValueError, "pool='token' needs class_token=True"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be a number in \[0, 1\), not 1.0"),
        ({"drop_path": "a"}, ValueError, "drop_path must be a number.*not 'a'"),
        ({"drop_path": float("nan")}, ValueError, "drop_path must be a number.*not nan"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be a positive, finite number, not 0.0"),
        ({"norm_eps": "a"}, ValueError, "norm_eps must be a positive, finite number, not 'a'"),
        ({"norm_eps": float("inf")}, ValueError, "norm_eps must be a positive, finite number, not inf"),
        ({"mlp_ratio": "4"}, ValueError, "mlp_ratio must be a positive, finite number, not '4'"),
        ({"mlp_ratio": float("inf")}, ValueError, "mlp_ratio must be a positive, finite number, not inf"),
        ({"mlp_ratio": float("nan")}, ValueError, "mlp_ratio must be a positive, finite number, not nan"),
        ({"layer_scale": "x"}, ValueError, "layer_scale must be None or a finite number, not 'x'"),
        ({"layer_scale": True}, ValueError, "layer_scale must be None or a finite number, not True"),
        ({"class_token": "no"}, ValueError, "class_token must be True or False, not 'no'"),
        ({"no_embed_class": 1}, ValueError, "no_embed_class must be True or False, not 1"),
        ({"qkv_bias": None}, ValueError, "qkv_bias must be True or False, not None"),
        ({"mlp_ratio": 0.3}, ValueError, "mlp_ratio times the residual.s channels must be an integer"),
        ({"separate_classifiers": (1, 9)}, ValueError, "separate_classifiers: 9 is not a width in 1..4"),
        ({"separate_classifiers": (True,)}, ValueError, "separate_classifiers: True is not a width in 1..4"),
        ({"separate_classifiers": (1, "2")}, ValueError, "separate_classifiers: '2' is not a width in 1..4"),
        ({"separate_classifiers": 3}, ValueError, "separate_classifiers must be a tuple of widths, not 3"),
        ({"geometry": ["scala"]}, ValueError, r"geometry must be a name .*not \['scala'\]"),
        ({"geometry": "onion"}, ValueError, "geometry: unknown 'onion'"),
    ],
)
def test_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        hydravit.fused_model(**{"config": SMALL, **arguments})


def test_configs_that_look_wrong_and_are_not():
    config = hydravit.config.resolve_config(SMALL, separate_classifiers=[4, 2, 4])
    assert config.separate_classifiers == (2, 4)
    for hidden, head_dim in ((62, 60), (3, 49), (5, 41)):  # the quotient times head_dim is not always exact
        config = HydraViTConfig(max_heads=3, head_dim=head_dim, mlp_ratio=hidden / head_dim)
        assert config.hidden_of(1) == hidden and config.hidden == 3 * hidden
    assert any(hidden / dim * dim != hidden for hidden, dim in ((62, 60), (3, 49), (5, 41)))


def test_untrained_widths_are_refused_unless_asked_for(backend):
    model = hydravit.HydraViT(SMALL, trained_heads=(3, 1, 1), backend=backend)
    assert model.heads == 3 and model.allowed_heads == (1, 3)
    for heads in (2, 4, torch.tensor([1, 2])):
        message = r"was not trained \(model.allow_untrained = True, --allow-untrained, allows it\).*\[1, 3\]"
        with pytest.raises(ValueError, match=message):
            model(IMAGES, heads=heads)
    with pytest.raises(ValueError, match="was not trained"):
        model.heads = 2
    model.allow_untrained = True
    assert model(IMAGES, heads=2).shape == (2, 10)
    model.allow_untrained = False
    with pytest.raises(ValueError, match="was not trained"):
        model(IMAGES, heads=2)


def test_subnetwork_of_another_model(model):
    other = hydravit.geometry.hydravit(hydravit.CONFIGS["base"], 3)
    with pytest.raises(ValueError, match="subnetwork has 12 attention"):
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


@pytest.mark.parametrize("trained", [(), (0, 1), (1, 9), (1, "3")])
def test_trained_widths_that_do_not_exist(trained):
    with pytest.raises(ValueError, match="trained_heads must be widths of the model"):
        hydravit.HydraViT(SMALL, trained_heads=trained)


def test_a_geometry_lacks_some_widths():
    """SortedNet keeps all heads, so a width must divide into them; separate classifiers exist for their widths only."""
    model = hydravit.fused_model(config=SMALL, head_dim=6, mlp_ratio=2.0, geometry="sortednet")
    assert model.allowed_heads == (2, 4)
    with pytest.raises(ValueError, match="width 1/4 of a head's 6 channels is no integer"):
        model(IMAGES, heads=1)
    assert hydravit.fused_model(config=SMALL, separate_classifiers=(1, 2)).heads == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_widths_of_any_integer_dtype(model, dtype):
    widths = torch.tensor([1, 3])
    assert torch.equal(model(IMAGES, heads=widths.to(dtype)), model(IMAGES, heads=widths))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(2, 17, 24), ValueError, r"features must be \(B, 17, 16\), not \(2, 17, 24\)"),
        (torch.zeros(2, 1, 16), ValueError, r"features must be \(B, 17, 16\)"),
        (torch.zeros(2, 16), ValueError, r"not \(2, 16\)"),
        (torch.zeros(0, 17, 24), ValueError, r"not \(0, 17, 24\)"),
        (torch.zeros(2, 17, 16, dtype=torch.float64), TypeError, "torch.float64, the model is torch.float32"),
    ],
)
def test_features(model, features, error, message):
    with pytest.raises(error, match=message):
        model.forward_head(features, 2)


@pytest.mark.needs("native")
def test_a_refused_cast_changes_nothing():
    model = hydravit.fused_model(config=SMALL, backend="native")
    with pytest.raises(RuntimeError, match="backend 'native'.*float64"):
        model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(IMAGES)


@pytest.mark.filterwarnings("ignore:hydravit. using backend")
@pytest.mark.parametrize("made_on", ["meta", "cpu"])
def test_assigned_weights_choose_the_backend_again(made_on):
    dtype = torch.float32 if made_on == "meta" else torch.float64
    model = hydravit.fused_model(config=SMALL, device=made_on, dtype=dtype)
    source = hydravit.fused_model(config=SMALL)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert model.backend == source.backend
