"""The images on which importance is measured."""

import pytest
import torch

from hydravit.compression import CalibrationImages
from hydravit.data import load_dataset


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digits", split="train")


def test_every_pass_has_the_same_images(dataset):
    images = CalibrationImages(dataset, 100, batch_size=32, seed=3)
    passes = [list(images), list(images)]
    assert [len(labels) for _, labels in passes[0]] == [32, 32, 32, 4] and len(images) == 4
    for (x, y), (x_again, y_again) in zip(*passes, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    other = CalibrationImages(dataset, 100, batch_size=32, seed=4)
    assert not torch.equal(next(iter(images))[0], next(iter(other))[0])
    # Folders are sorted by class: their first images alone would be of few classes.
    assert len(torch.cat([labels for _, labels in images]).unique()) == 10


def test_no_image_comes_twice(dataset):
    images = torch.cat([x for x, _ in CalibrationImages(dataset, 10**6, batch_size=500)])
    assert len(images) == len(dataset)
    torch.testing.assert_close(images.sum(0), dataset.images.sum(0), rtol=1e-4, atol=1e-2)


def test_wrong_arguments(dataset):
    with pytest.raises(ValueError, match="dataset is empty"):
        CalibrationImages([])
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        CalibrationImages(dataset, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        CalibrationImages(dataset, batch_size=0)
