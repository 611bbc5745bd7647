"""timm's augmentation for photos (extra ``recipes``)."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from hydravit.data.folder import FolderDataset
from hydravit.extras import extra
from hydravit.recipes import Recipe


def _import_timm_data():
    with extra("recipes", "timm's augmentation"):
        from hydravit.timm_models import timm
    return timm.data


def mix(recipe: Recipe, num_classes: int):
    """Make the recipe's mixup and cutmix: ``(images, labels (B,)) -> (images, targets (B, classes))``, or None.

    timm draws from numpy's generator, which is seeded from torch's, so that training resumes exactly.
    """
    if not recipe.mixup and not recipe.cutmix:
        return None
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
        return mixup(images, labels)

    return mixed


def augment(dataset, recipe: Recipe) -> None:
    """Replace the transform of a folder's images by timm's for training, if the recipe has one.

    It has random resized crop, flip, RandAugment (arXiv 1909.13719), colour jitter, random erasing (arXiv 1708.04896).
    """
    if not (recipe.rand_augment or recipe.color_jitter or recipe.random_erasing):
        return
    if not isinstance(dataset, FolderDataset):
        raise ValueError(
            "rand_augment, color_jitter and random_erasing are for a folder of photos; set them to '' and 0"
        )
    values = dataset.preprocessing
    transform = _import_timm_data().create_transform(
        values.image_size,
        is_training=True,
        auto_augment=recipe.rand_augment or None,
        color_jitter=recipe.color_jitter or None,
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        interpolation="bicubic",
        mean=values.mean,
        std=values.std,
    )
    mode = "L" if len(values.mean) == 1 else "RGB"

    def transformed(image) -> Tensor:
        # It draws from Python's and numpy's generators too, so torch's, which is seeded per batch, seeds them.
        seed = int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))
        random.seed(seed)
        np.random.seed(seed)
        return transform(image.convert(mode))

    dataset.transform = transformed
