"""Cross-validation: what a recipe is worth, found without the test part of its data."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch.utils.data import Subset

from hydravit.data import load_dataset
from hydravit.data.dataset import Dataset, folds
from hydravit.evaluation import accuracy
from hydravit.factory import fused_model
from hydravit.recipes import Recipe
from hydravit.training.trainer import Trainer


class CrossValidation:
    """Trains a recipe on all folds of the training part but one, and counts what it gets right of that one.

    Nobody sees the test part. Every fold has a seed of its own for weights, order and widths, so that no recipe is
    preferred for what it makes of one seed.

    Args:
        data: source, as in ``hydravit.data.load_dataset``.
        count: folds.
        skip_corrupt, split_seed: as in ``load_dataset``.
    """

    def __init__(self, data: str, count: int = 3, *, skip_corrupt: bool = False, split_seed: int = 0):
        self.data, self.count = data, count
        self._options = {"split": "train", "seed": split_seed, "skip_corrupt": skip_corrupt}

    def fold(self, recipe: Recipe, fold: int, *, backend: str = "auto", progress: bool = False) -> dict[int, float]:
        """Top-1 in percent of every width the recipe trains, on one fold that took no part in training."""
        training = self._load(recipe, recipe.augment)
        validation = self._load(recipe, False)
        chosen = folds(training.labels, self.count, seed=0) == fold
        config = dataclasses.replace(
            recipe.config,
            image_size=training.image_size,
            in_channels=training.in_channels,
            num_classes=len(training.class_names),
        )
        recipe = recipe.replace(seed=recipe.seed + fold)
        torch.manual_seed(recipe.seed)
        model = fused_model(config=config, backend=backend)
        trainer = Trainer(model, recipe, _subset(training, ~chosen), progress=progress)
        trained = trainer.run().eval()
        found = accuracy(trained, _subset(validation, chosen), recipe.trained_heads)
        return {heads: top1 for heads, (top1, _) in found.items()}

    def _load(self, recipe: Recipe, augment: bool) -> Dataset:
        return load_dataset(self.data, image_size=recipe.config.image_size, augment=augment, **self._options)


def _subset(dataset: Dataset, chosen: np.ndarray) -> Subset:
    return Subset(dataset, np.flatnonzero(chosen).tolist())
