"""The images that a recipe trains on, and those held out from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hydravit.data import Dataset, load_dataset, usual_preprocessing
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import Recipe


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """Return the preprocessing at the recipe's image size, in its channels, with its mean and deviation."""
    config = recipe.config
    usual = usual_preprocessing(recipe.data, config.image_size, config.in_channels)
    mean, std = recipe.mean or usual.mean, recipe.std or usual.std
    if len(mean) != config.in_channels:
        raise ValueError(
            f"recipe: mean and std must have {config.in_channels} values, one per channel, not {len(mean)}"
        )
    return Preprocessing(config.image_size, mean=mean, std=std)


def load_training(recipe: Recipe, *, augment: bool = True) -> Dataset:
    """Load what the recipe trains on, with its augmentation if wanted. Errors are those of ``load_dataset``."""
    dataset = load_dataset(
        recipe.data,
        split="train",
        augment=recipe.augment and augment,
        preprocessing=preprocessing_of(recipe),
        **_options(recipe),
    )
    if len(dataset.class_names) == 1:
        warnings.warn(f"{recipe.data}: one class only, {dataset.class_names[0]!r}: nothing to tell apart", stacklevel=2)
    if augment and (recipe.rand_augment or recipe.color_jitter or recipe.random_erasing):
        from hydravit.recipes import photos

        photos.augment(dataset, recipe)
    return dataset


def make_mix(recipe: Recipe, dataset: Dataset) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return the recipe's mixup and cutmix for ``Trainer``, or None if it has neither."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    from hydravit.recipes import photos

    return photos.mix(recipe, len(dataset.class_names))


def load_held_out(recipe: Recipe, training: Dataset) -> Dataset:
    """Load what no choice in training may look at, with the labels that ``training`` has."""
    return load_dataset(
        recipe.data,
        split="test",
        preprocessing=training.preprocessing,
        class_names=training.class_names,
        **_options(recipe),
    )


def _options(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.split_seed, "skip_corrupt": recipe.skip_corrupt}
