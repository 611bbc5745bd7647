"""timm's augmentation as the recipes use it: it never fails, repeats exactly, and reaches any kind of worker."""

import pickle
from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from hydravit.data.folder import FolderDataset
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import RECIPES, photos

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

RECIPE = RECIPES["hydravit-imagenet"]
COLOUR, GREY = Preprocessing(16), Preprocessing(16, mean=(0.5,), std=(0.5,))


def augmentation(preprocessing, **changes):
    dataset = FolderDataset([], ["cat"], [], preprocessing)
    photos.augment(dataset, RECIPE.replace(**changes))
    return dataset.transform


def noise(preprocessing, size=(24, 20)):
    return preprocessing.convert(Image.effect_noise(size, 80))


@pytest.mark.long
def test_thousands_of_transforms():
    """The rare draws too: the recipe's RandAugment reaches the end of a range in one of 600 images."""
    transform, image = augmentation(COLOUR), noise(COLOUR)
    for seed in range(4000):
        torch.manual_seed(seed)
        result = transform(image)
        assert result.shape == (3, 16, 16) and result.isfinite().all(), seed


@pytest.mark.parametrize("preprocessing", [COLOUR, GREY], ids=["colour", "grey"])
def test_every_operation_at_every_magnitude(preprocessing):
    from hydravit.timm_models import timm

    operations, image = timm.data.auto_augment, noise(preprocessing)
    options = {"translate_const": 7, "img_mean": (120,) * len(preprocessing.mean)}
    for name in operations.NAME_TO_OP:
        for magnitude in range(11):
            operation = operations.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=options)
            assert operation(image).size == image.size, (name, magnitude)


def test_no_bits_are_black():
    from hydravit.timm_models import timm

    posterize = timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    for image in (noise(COLOUR), noise(GREY)):
        found = posterize(image, 0)
        assert (found.mode, found.size) == (image.mode, image.size) and not any(found.tobytes())
        assert any(posterize(image, 1).tobytes())


def test_the_augmentation_repeats_by_torchs_seed_in_any_process():
    transform = augmentation(COLOUR)
    copied = pickle.loads(pickle.dumps(transform))  # as workers that are no forks get it
    image = noise(COLOUR)
    results = []
    for each in (transform, copied, transform):
        torch.manual_seed(3)
        results.append(each(image))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], transform(image))


@pytest.mark.parametrize("text", ["rand-m9-what3", "rank-m9", "rand-m9-w7", "nothing"])
def test_augmentation_that_timm_does_not_know(text):
    with pytest.raises(ValueError, match=f"rand_augment must be of timm's form, .*, not '{text}'"):
        augmentation(COLOUR, rand_augment=text)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("changes", [{}, {"mixup": 0.0}, {"cutmix": 0.0}], ids=["both", "cutmix", "mixup"])
def test_batches_of_any_size_are_mixed(count, changes):
    mix = photos.mix(RECIPE.replace(**changes), num_classes=3)
    images, labels = torch.rand(count, 3, 8, 8), torch.arange(count) % 3
    mixed, targets = mix(images.clone(), labels)
    assert mixed.shape == images.shape and targets.shape == (count, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    if count % 2:
        assert torch.equal(mixed[-1], images[-1]) and targets[-1, labels[-1]] == 1
    if count > 1:
        assert not torch.equal(mixed, images)
