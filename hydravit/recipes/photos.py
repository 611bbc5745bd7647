"""timm's augmentation for photos (extra ``recipes``)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hydravit.data.folder import FolderDataset
from hydravit.extras import extra
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


def _import_timm_data():
    with extra("recipes", "timm's augmentation"):
        from hydravit.timm_models import timm
    return timm.data


def mix(recipe: Recipe, num_classes: int):
    """Make the recipe's mixup and cutmix: ``(images, labels (B,)) -> (images, targets (B, classes))``.

    timm draws from numpy's generator, which is seeded from torch's, so that training resumes exactly. It mixes pairs,
    so the last image of an odd batch stays as it is.
    """
    # The loss smooths the labels, with the same result, because smoothing and mixing are both linear.
    mixup = _import_timm_data().Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        switch_prob=0.5,
        label_smoothing=0.0,
        num_classes=num_classes,
    )

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        np.random.seed(int(torch.randint(2**32, (), dtype=torch.int64, device="cpu")))
        targets = F.one_hot(labels, num_classes).float()
        paired = len(images) // 2 * 2
        if paired:
            images[:paired], targets[:paired] = mixup(images[:paired], labels[:paired])
        return images, targets

    return mixed


def augment(dataset, recipe: Recipe) -> None:
    """Replace the transform of a folder's images by timm's for training.

    It has random resized crop, flip, RandAugment (arXiv 1909.13719), colour jitter, random erasing (arXiv 1708.04896).
    """
    if not isinstance(dataset, FolderDataset):
        raise ValueError(
            "rand_augment, color_jitter and random_erasing are for a folder of photos; set them to '' and 0"
        )
    dataset.transform = _Augmentation(recipe, dataset.preprocessing)


class _Augmentation:
    """timm's random transform, from a Pillow image to the model's input."""

    def __init__(self, recipe: Recipe, preprocessing: Preprocessing):
        self._arguments = (recipe, preprocessing)
        data = _import_timm_data()
        try:
            self._transform = data.create_transform(
                preprocessing.image_size,
                is_training=True,
                auto_augment=recipe.rand_augment or None,
                color_jitter=recipe.color_jitter or None,
                re_prob=recipe.random_erasing,
                re_mode="pixel",
                interpolation="bicubic",
                mean=preprocessing.mean,
                std=preprocessing.std,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"recipe: rand_augment must be of timm's form, such as 'rand-m9-mstd0.5-inc1', not "
                f"{recipe.rand_augment!r} ({type(error).__name__}: {error})"
            ) from error

    def __reduce__(self):
        return type(self), self._arguments  # a worker that is not a fork imports timm as this process did

    def __call__(self, image: Image) -> Tensor:
        # It draws from Python's and numpy's generators too, so torch's, which is seeded per batch, seeds them.
        seed = int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))
        random.seed(seed)
        np.random.seed(seed)
        return self._transform(image)
