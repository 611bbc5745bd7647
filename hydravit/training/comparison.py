"""Cross-validation, which compares recipes without the test part of their data."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Subset

from hydravit.data.dataset import Dataset, folds
from hydravit.evaluation import accuracy
from hydravit.recipes import Recipe
from hydravit.training.data import load_training, make_mix
from hydravit.training.model import make_model
from hydravit.training.teachers import make_teacher
from hydravit.training.trainer import Trainer


class CrossValidation:
    """Trains a recipe on all folds of the training part but one, and evaluates it on that one.

    The test part is not read. Every fold has a seed of its own for weights, order and widths, so that no recipe wins
    by one lucky seed.

    Args:
        count: number of folds.
    """

    def __init__(self, count: int = 3):
        self.count = count

    def fold(self, recipe: Recipe, fold: int, *, backend: str = "auto", progress: bool = False) -> dict[int, float]:
        """Return top-1 in percent of every width that the recipe trains, on one fold that took no part in training."""
        training, validation = load_training(recipe), load_training(recipe, augment=False)
        chosen = folds(training.labels.tolist(), self.count, seed=0) == fold
        recipe = recipe.replace(seed=recipe.seed + fold)
        model = make_model(recipe, training, backend=backend)
        mix, teacher = make_mix(recipe, training), make_teacher(recipe, training)
        trainer = Trainer(model, recipe, _subset(training, ~chosen), mix=mix, teacher=teacher, progress=progress)
        trained = trainer.run().eval()
        found = accuracy(trained, _subset(validation, chosen), recipe.trained_heads)
        return {heads: top1 for heads, (top1, _) in found.items()}


def _subset(dataset: Dataset, chosen: np.ndarray) -> Subset:
    return Subset(dataset, np.flatnonzero(chosen).tolist())
