"""Preprocessing of images and tensors."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL

from hydravit.config import resolve_config
from hydravit.preprocessing import IMAGENET_MEAN, Preprocessing


def test_preprocessing_of_images_and_tensors():
    pixels = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    preprocess = Preprocessing(image_size=32)
    result = preprocess(image)
    assert result.shape == (3, 32, 32) and result.dtype == torch.float32 and result.is_contiguous()
    assert torch.equal(result, preprocess(pixels))
    exact = Preprocessing(image_size=(40, 60), crop=1.0)(pixels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, preprocess.std))
    torch.testing.assert_close(exact * std + mean, pixels / 255)
    assert preprocess(image.convert("L")).shape == preprocess(image.convert("P")).shape == (3, 32, 32)
    assert preprocess(image.convert("RGBA").resize((7, 90))).shape == (3, 32, 32)
    assert Preprocessing(image_size=(16, 48))(image).shape == (3, 16, 48)


def test_preprocessing_of_other_channels():
    grey = Preprocessing.for_model(resolve_config(SMALL, in_channels=1))
    assert grey.mean == (0.5,) and grey.crop == 1.0 and grey.image_size == (32, 32)
    deep = Image.fromarray(np.full((32, 32), 128 << 8, np.uint16))
    assert torch.allclose(grey(deep), torch.tensor((128 / 255 - 0.5) / 0.5), atol=1e-6)
    five = Preprocessing.for_model(resolve_config(SMALL, in_channels=5), crop=0.8)
    assert five(torch.zeros(5, 20, 20, dtype=torch.uint8)).shape == (5, 32, 32)
    with pytest.raises(ValueError, match="the model has 5: pass a uint8 tensor"):
        five(Image.new("RGB", (8, 8)))
    assert Preprocessing.from_dict(five.to_dict()) == five


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.5,)}, "one value per channel"),
        ({"std": (0.1, 0.1, 0.0)}, "std must be positive"),
        ({"crop": 0}, r"crop must be in \(0, 1\]"),
        ({"image_size": 0}, "image_size must be"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest"),
        ({"sharpen": 1}, "unknown preprocessing field.*sharpen"),
    ],
)
def test_preprocessing_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(values)


def test_preprocessing_refuses_images():
    preprocess = Preprocessing()
    with pytest.raises(TypeError, match="Pillow image or a uint8 tensor, not ndarray"):
        preprocess(np.zeros((4, 4, 3), np.uint8))
    for tensor in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 tensor \(3, height, width\)"):
            preprocess(tensor)
    with pytest.raises(ValueError, match="mode 'F'"):
        preprocess(Image.new("F", (4, 4)))
