"""The model that a recipe trains."""

from __future__ import annotations

import dataclasses

import torch

from hydravit.checkpoint import load_weights, read_checkpoint
from hydravit.checkpoint.classes import with_classes
from hydravit.data import Dataset
from hydravit.factory import fused_model
from hydravit.model import HydraViT
from hydravit.recipes import Recipe


def make_model(
    recipe: Recipe,
    dataset: Dataset,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    start: bool = True,
    verify: bool = True,
) -> HydraViT:
    """Make the recipe's model, with the image size, channels and classes of the data.

    Args:
        backend, device: those of ``hydravit.fused_model``.
        start: whether to load the weights of ``recipe.checkpoint``, if it names one; otherwise they are random.
        verify: whether to check that file's checksums.
    Raises:
        OSError, ValueError: those of ``read_checkpoint`` and ``load_weights``.
    """
    config = dataclasses.replace(
        recipe.config,
        image_size=dataset.image_size,
        in_channels=dataset.in_channels,
        num_classes=len(dataset.class_names),
    )
    torch.manual_seed(recipe.seed)
    model = fused_model(config=config, backend=backend, device=device)
    if recipe.checkpoint and start:
        checkpoint = read_checkpoint(recipe.checkpoint, part=recipe.part or None, verify=verify)
        load_weights(model, with_classes(checkpoint, dataset.class_names), strict=recipe.strict)
    return model
