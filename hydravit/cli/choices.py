"""What decides a training where its arguments leave it open: the checkpoint, the recipe or the data."""

from __future__ import annotations

import argparse
from typing import Any

from hydravit.checkpoint import model_config, read_checkpoint
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.data import kind_of, usual_preprocessing
from hydravit.recipes import OF_CHECKPOINTS, Recipe, usual_recipe

_UNTOLD = ("head_dim", "norm_eps", "pool", "act_layer")  # what weights of other projects do not tell of their config


def recipe_name(args: argparse.Namespace) -> str:
    """Return the recipe that ``--recipe`` names, else the usual one for the data and the weights to start from."""
    return args.recipe or usual_recipe(kind_of(args.data or "digits"), args.checkpoint is not None)


def starting_point(
    args: argparse.Namespace, recipe: Recipe, given: dict[str, Any]
) -> tuple[HydraViTConfig, dict[str, Any]]:
    """Return the full model's config before ``--set``, and the fields of the recipe that the checkpoint decides.

    Args:
        given: the fields of the config that ``--set`` names.
    Raises:
        ValueError: the recipe needs a checkpoint and there is none, or that checkpoint's model is not clear.
        OSError: the checkpoint cannot be read.
    """
    follows = recipe_name(args) in OF_CHECKPOINTS and args.config is None
    drop_path = recipe.config.drop_path  # a setting of the training rather than of the model
    config = recipe.config if args.config is None else resolve_config(args.config, drop_path=drop_path)
    if args.checkpoint is None:
        if follows:
            raise ValueError(f"recipe {recipe_name(args)}: give the weights to start from, --checkpoint FILE")
        return config, {}
    checkpoint = read_checkpoint(args.checkpoint, part=args.part, verify=args.verify)
    decided: dict[str, Any] = {}
    if follows:
        told = {name: given[name] for name in _UNTOLD if name in given}
        config = model_config(checkpoint, strict=args.strict is not False, drop_path=drop_path, **told)
        decided["heads"] = checkpoint.trained_heads or ()
    known = checkpoint.preprocessing
    if known is not None and len(known.mean) == given.get("in_channels", config.in_channels):
        decided |= {"mean": known.mean, "std": known.std}
    return config, decided


def sizes_of_images(args: argparse.Namespace, recipe: Recipe, data: str, given: set[str]) -> dict[str, Any]:
    """Return fields of the config that follow from the data, where the recipe was made for images of another kind.

    Args:
        data: the source of the images.
        given: names of the fields that ``--set`` names.
    Raises:
        ValueError: nobody decided the size of the images.
    """
    name, same = recipe_name(args), kind_of(data) == kind_of(recipe.data)
    if "num_classes" in given:
        raise ValueError("--set num_classes: the data's number of classes decides it; leave it out")
    if name in OF_CHECKPOINTS and args.config is None:
        return {}
    if not same and args.config is None and "image_size" not in given:
        height, width = recipe.config.grid
        size = recipe.config.patch_size
        raise ValueError(
            f"recipe {name} is for {recipe.data} at {height * size}x{width * size} pixels, not for {data}: choose "
            f"--recipe {usual_recipe(kind_of(data), False)}, a model with --config, or its --set image_size=PIXELS"
        )
    channels = recipe.config.in_channels if same else len(usual_preprocessing(data).mean)
    return {} if "in_channels" in given else {"in_channels": channels}
