"""Integers of NumPy and of torch, which come out of samplers, wherever a number of heads or of pixels is taken."""

import copy
import json

import numpy as np
import pytest
import small
import torch

import hydravit
from hydravit import HydraViTConfig
from hydravit.checkpoint import extract, extract_config, read_checkpoint, save_checkpoint
from hydravit.evaluation import evaluate
from hydravit.geometry import hydravit as first_heads
from hydravit.integers import plain_int
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import Recipe
from hydravit.training import SliceGradients, WidthSampler

KINDS = [np.int64, np.int32, np.uint8, np.array, torch.tensor, lambda k: torch.tensor(k, dtype=torch.int16)]
REFUSED = [True, np.True_, 2.0, np.float64(2.0), torch.tensor(2.0), torch.tensor(True), "2", np.array([2]), [2]]
native = pytest.mark.needs("native")


@pytest.fixture(params=[pytest.param("native", marks=native), "reference"])
def backend(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_an_integer_of_any_kind(kind):
    assert type(plain_int(kind(3))) is int and plain_int(kind(3)) == 3


@pytest.mark.parametrize("value", REFUSED, ids=repr)
def test_what_is_no_integer_comes_back(value):
    assert plain_int(value) is value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_heads_of_a_model(backend, kind, heads, training):
    model = small.make(backend=backend).train(training)
    images = small.images(model.config)
    with torch.set_grad_enabled(training):
        expected = model(images, heads=heads)
        for _ in range(3):  # packed at last
            torch.testing.assert_close(model(images, heads=kind(heads)), expected)
        model.heads = kind(heads)
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(
            model.forward_head(model.forward_features(images, heads=kind(heads)), heads=kind(heads)), expected
        )
    assert type(model.heads) is int and model.heads == heads
    assert model.subnetwork(kind(heads)) is model.subnetwork(heads)
    assert len(model.attention_maps(images, heads=kind(heads))) == 2
    small_one = hydravit.fused_model(kind(heads), config=model.config, backend=backend)
    assert small_one.heads == heads
    for name, tensor in extract(model, kind(heads)).items():
        assert torch.equal(tensor, extract(model, heads)[name])
    assert extract_config(model, kind(heads))["num_heads"] == heads


@native
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_an_engine(kind):
    model = small.make(backend="native")
    engine, images = model.engine(max_batch=kind(2)), small.images(model.config)
    for heads in (1, 3):
        assert torch.equal(engine(images, heads=kind(heads)), engine(images, heads=heads))
    with pytest.raises(ValueError, match="heads must be in 1..4"):
        engine(images, heads=kind(9))


@pytest.mark.parametrize("value", REFUSED, ids=repr)
def test_what_is_no_width_is_refused(backend, value):
    model = small.make(backend=backend)
    images = small.images(model.config)
    with pytest.raises((TypeError, ValueError), match="heads must"):
        model(images, heads=value)
    with pytest.raises((TypeError, ValueError), match="heads must"):
        model.heads = value
    if backend == "native":
        with pytest.raises((TypeError, ValueError), match="heads must"):
            model.engine()(images, heads=value)


@pytest.mark.parametrize(
    "trained", [np.array([1, 3]), [np.int64(3), np.int32(1)], torch.tensor([1, 3]), range(1, 4, 2)]
)
def test_trained_widths(backend, trained, tmp_path):
    model = hydravit.HydraViT(small.SMALL, trained_heads=trained, backend=backend)
    assert model.trained_heads == model.allowed_heads == (1, 3)
    assert all(type(k) is int for k in model.trained_heads)
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pt"):
        save_checkpoint(path, model, trained_heads=trained)
        assert read_checkpoint(path).trained_heads == (1, 3)
    with pytest.raises(ValueError, match="trained_heads"):
        hydravit.HydraViT(small.SMALL, trained_heads=[True, 3], backend=backend)


def test_sizes_of_a_config():
    plain = dict(image_size=(32, 16), patch_size=8, depth=1, max_heads=2, head_dim=8, num_classes=3)
    values = {name: np.int64(value) for name, value in plain.items() if isinstance(value, int)}
    config = HydraViTConfig(
        **values, image_size=tuple(np.array([32, 16])), separate_classifiers=tuple(np.array([1, 2]))
    )
    assert config == HydraViTConfig(**plain, separate_classifiers=(1, 2))
    assert json.loads(json.dumps(config.to_dict()))["image_size"] == [32, 16]
    assert HydraViTConfig(image_size=np.int32(96)).image_size == (96, 96)
    for bad in (np.float64(8), np.True_, True, np.array([8])):
        with pytest.raises(ValueError, match="patch_size"):
            HydraViTConfig(patch_size=bad)
    assert Preprocessing(image_size=np.int64(32)) == Preprocessing(image_size=32)
    assert first_heads(config, np.int64(1)) == first_heads(config, 1)


def test_samplers_and_recipes():
    sampler = WidthSampler(np.array([1, 3]), seed=0)
    plain = WidthSampler([1, 3], seed=0)
    for _ in range(4):
        drawn = sampler.draw(2)
        assert type(drawn) is int and drawn == plain.draw(2)
    assert WidthSampler(torch.tensor([2]), per_image=True).draw(2).tolist() == [2, 2]
    for bad in ([1.5, 2], [True, 2], [np.float32(1)]):
        with pytest.raises(ValueError, match="different widths"):
            WidthSampler(bad)
    recipe = Recipe(config=small.SMALL, heads=np.array([1, 3]), epochs=np.int64(9), seed=np.int32(7))
    assert recipe == Recipe(config=small.SMALL, heads=(1, 3), epochs=9, seed=7)
    json.dumps(recipe.to_dict())


def test_a_training_step(backend):
    """With gradients in place, at a width that NumPy drew."""
    model = small.make(backend=backend).train()
    other = copy.deepcopy(model)
    gradients, images = SliceGradients(model), small.images(model.config)
    for heads in np.random.default_rng(0).integers(1, 5, 2):
        gradients.zero_()
        other.zero_grad()
        model(images, heads=heads).square().sum().backward()
        other(images, heads=int(heads)).square().sum().backward()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_results_of_an_evaluation_are_json(backend):
    model = small.make(backend=backend)
    data = [(image, label) for label, image in enumerate(small.images(model.config, 3))]
    results = evaluate(model, data, heads=np.array([1, 3]), latency=False, memory=False)
    assert [row["heads"] for row in json.loads(json.dumps(results))["widths"]] == [1, 3]


@pytest.mark.long
@native
@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_compiled_models(kind):
    torch._dynamo.reset()
    model = small.make(backend="native")
    compiled = torch.compile(model, backend="aot_eager")
    images = small.images(model.config)
    with torch.no_grad():
        for heads in (4, 1, 3):
            torch.testing.assert_close(compiled(images, heads=kind(heads)), model(images, heads=heads))
            model.heads = kind(heads)
            torch.testing.assert_close(compiled(images), model(images, heads=heads))
