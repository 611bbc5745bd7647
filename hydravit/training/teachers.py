"""Frozen models that teach: they compute logits for the images of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydravit.checkpoint import read_checkpoint
from hydravit.data import Dataset
from hydravit.extras import extra
from hydravit.factory import fused_model
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import Recipe


class Teacher:
    """Computes the logits ``(B, classes)`` of a frozen model, in evaluation mode, for images ``(B, C, H, W)``.

    Args:
        network: from images to logits; it is frozen here.
        given: the preprocessing of the images that come.
        expected: that of the images which the network was trained with. Normalisation, size and the number of channels
            are adapted: grey images become three equal channels.
    Raises:
        ValueError: the channels cannot be adapted.
    """

    def __init__(self, network: nn.Module, given: Preprocessing, expected: Preprocessing):
        if len(given.mean) not in (1, len(expected.mean)):
            raise ValueError(f"the teacher takes images of {len(expected.mean)} channels, not of {len(given.mean)}")
        self.network, self._expected = network.eval().requires_grad_(False), expected
        factory: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        of_given, of_expected = (
            [torch.tensor(values, **factory).view(1, -1, 1, 1) for values in (each.mean, each.std)]
            for each in (given, expected)
        )
        # pixel = image * std + mean, before and after.
        self._scale = of_given[1] / of_expected[1]
        self._shift = (of_given[0] - of_expected[0]) / of_expected[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images * self._scale.to(images) + self._shift.to(images)
        if images.shape[-2:] != self._expected.image_size:
            images = F.interpolate(images, self._expected.image_size, mode="bicubic", antialias=True)
        return self.network(images)


def make_teacher(
    recipe: Recipe, dataset: Dataset, *, device: torch.device | str | None = None, verify: bool = True
) -> Teacher | None:
    """Make the recipe's teacher for the images and classes of the data; None if the recipe names none.

    Args:
        verify: whether to check the checksums of a checkpoint.
    Raises:
        ValueError: the teacher does not have the classes or the channels of the data.
        OSError, RuntimeError: it cannot be loaded.
    """
    if not recipe.teacher:
        return None
    made = _of_checkpoint if Path(recipe.teacher).is_file() else _of_timm
    network, expected, classes = made(recipe, dataset, verify)
    if classes != len(dataset.class_names):
        raise ValueError(
            f"recipe: teacher {recipe.teacher!r} has {classes} classes and the data {len(dataset.class_names)}; "
            "teacher_checkpoint names a file of timm's model for these"
        )
    return Teacher(network.to(device), dataset.preprocessing, expected)


def _of_checkpoint(recipe: Recipe, dataset: Dataset, verify: bool) -> tuple[nn.Module, Preprocessing, int]:
    checkpoint = read_checkpoint(recipe.teacher, verify=verify)
    model = fused_model(checkpoint=checkpoint)
    if checkpoint.class_names and tuple(checkpoint.class_names) != dataset.class_names:
        raise ValueError(
            f"recipe: teacher {recipe.teacher!r} has the classes {', '.join(checkpoint.class_names)} "
            f"and the data {', '.join(dataset.class_names)}"
        )
    return model, checkpoint.preprocessing or Preprocessing.for_model(model.config), model.num_classes


def _of_timm(recipe: Recipe, dataset: Dataset, verify: bool) -> tuple[nn.Module, Preprocessing, int]:
    with extra("recipes", "a teacher of timm"):
        from hydravit.timm_models import timm
    if recipe.teacher_checkpoint:
        if not Path(recipe.teacher_checkpoint).is_file():
            raise FileNotFoundError(f"teacher_checkpoint: {recipe.teacher_checkpoint} does not exist")
        classes = len(dataset.class_names)
        network = timm.create_model(recipe.teacher, num_classes=classes, checkpoint_path=recipe.teacher_checkpoint)
    else:
        network = timm.create_model(recipe.teacher, pretrained=True)
    described = timm.data.resolve_model_data_config(network)
    expected = Preprocessing(described["input_size"][1:], described["mean"], described["std"])
    return network, expected, cast(int, network.num_classes)
