"""No images at all, as the last batch of a sharded loader or a detector without regions has: what timm's models do."""

import pytest
import torch
from packing import WIDE
from small import make

from hydravit.training import SliceGradients

WIDTHS = [1, 3, None, torch.zeros(0, dtype=torch.int64)]
EMPTY = torch.randn(0, 3, 24, 32)


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
def test_inference(backend, heads):
    model = make(WIDE, backend)
    with torch.inference_mode():
        for _ in range(3):  # native packs in the second call
            logits = model(EMPTY, heads=heads)
            assert logits.shape == (0, 32) and logits.dtype == torch.float32
        features = model.forward_features(EMPTY, heads=heads)
        assert features.shape[:2] == (0, WIDE.tokens)
        assert model.forward_head(features, heads=heads).shape == (0, 32)


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
def test_training(backend, heads):
    """Every parameter that takes part has a gradient of zeros; the images have an empty one."""
    model, images = make(WIDE, backend).train(), EMPTY.clone().requires_grad_()
    model(images, heads=heads).sum().backward()
    assert images.grad.shape == EMPTY.shape
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_gradients_in_place(backend):
    model = make(WIDE, backend).train()
    gradients = SliceGradients(model)
    model(EMPTY, heads=2).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    gradients.close()


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_without_a_classifier(backend, pool):
    model = make(WIDE, backend, num_classes=0, pool=pool)
    with torch.no_grad():
        for heads in (1, 3):
            assert all(model(EMPTY, heads=heads).shape == (0, 24 * heads) for _ in range(3))


@pytest.mark.needs("native")
@pytest.mark.parametrize("heads", [1, 3])
def test_engine(heads):
    model = make(WIDE, "native")
    engine = model.engine()
    assert engine(EMPTY, heads=heads).shape == (0, 32)
    assert torch.equal(engine(torch.ones(2, 3, 24, 32), heads=heads), model(torch.ones(2, 3, 24, 32), heads=heads))
