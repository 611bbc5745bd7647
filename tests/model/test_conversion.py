"""Models converted as PyTorch's users convert them: memory formats, dtypes, swapped parameters, pickles."""

import copy
import io

import pytest
import torch
from small import SMALL, images, make

from hydravit.training import SliceGradients

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.needs("native"))])
at_widths = pytest.mark.parametrize("heads", [2, 4])


def logits(model, x, heads):
    with torch.no_grad():
        return [model(x, heads=heads) for _ in range(3)]  # in place, then packed


def gradients(model, x, heads):
    model.zero_grad(set_to_none=False)
    model(x, heads=heads).square().sum().backward()
    return [p.grad for p in model.parameters()]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


# ---- Memory formats ----


@both
@at_widths
@pytest.mark.parametrize("which", ["model", "images", "both"])
def test_channels_last(backend, heads, which):
    model, x = make(SMALL, backend), images(SMALL, 3)
    other, y = copy.deepcopy(model), x
    if which != "images":
        other.to(memory_format=torch.channels_last)
    if which != "model":
        y = x.to(memory_format=torch.channels_last)
    close(logits(other, y, heads), logits(model, x, heads))
    close(gradients(other, y, heads), gradients(model, x, heads))
    SliceGradients(other), SliceGradients(model)
    close(gradients(other, y, heads), gradients(model, x, heads))
    if backend == "native":
        assert torch.equal(other.engine()(y, heads=heads), model.engine()(x, heads=heads))
    other.eval().to(memory_format=torch.contiguous_format)
    close(logits(other, y, heads), logits(model, x, heads))


# ---- Dtypes ----


@at_widths
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:hydravit. using backend 'reference'")
def test_dtypes(heads, dtype):
    model, x = make(SMALL, "auto"), images(SMALL, 3)
    expected, before = logits(model, x, heads), model.backend
    model.to(dtype)
    assert model.backend == "reference"
    for found in logits(model, x.to(dtype), heads):
        torch.testing.assert_close(found.float(), expected[0], rtol=0.1, atol=0.1)
    with pytest.raises(TypeError, match=rf"images are torch.float32, the model is {dtype}"):
        model(x, heads=heads)
    assert model.float().backend == before


@pytest.mark.needs("native")
@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
def test_a_named_backend_refuses_a_dtype_and_leaves_the_model_as_it_was(convert):
    model, x = make(SMALL, "native"), images(SMALL, 3)
    expected = logits(model, x, 2)
    with pytest.raises(
        RuntimeError, match="backend 'native': computes in .* not in .*; backend='reference' or \"auto\" can"
    ):
        getattr(model, convert)()
    close(logits(model, x, 2), expected)


# ---- Swapped parameters ----


@both
@at_widths
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_loaded_by_swapping(swapping, backend, heads, wrapped):
    model, other, x = make(SMALL, backend), make(SMALL, backend), images(SMALL, 3)
    logits(model, x, heads)  # packs the old weights
    if wrapped:
        torch.nn.Sequential(model).load_state_dict({f"0.{k}": v.clone() for k, v in other.state_dict().items()})
    else:
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()})
    close(logits(model, x, heads), logits(other, x, heads))


@at_widths
@pytest.mark.filterwarnings("ignore:hydravit. using backend 'reference'")
def test_a_model_cast_by_swapping(swapping, heads):
    model, x = make(SMALL, "auto"), images(SMALL, 3)
    expected, parameters = logits(model, x, heads), [*model.parameters()]
    model.double()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    close([y.float() for y in logits(model, x.double(), heads)], expected)
    close(logits(model.float(), x, heads), expected)


# ---- Pickles ----


@both
@at_widths
def test_a_whole_model_saved_and_loaded(backend, heads):
    model, x = make(SMALL, backend), images(SMALL, 3)
    model.heads = heads
    expected = logits(model, x, None)  # packed: the file has no packed copy
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 1.3 * sum(4 * p.numel() for p in model.parameters()) + 50_000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert (loaded.heads, loaded.backend) == (heads, backend)
    for a, b in zip(logits(loaded, x, None), expected, strict=True):
        assert torch.equal(a, b)
