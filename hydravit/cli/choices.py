"""What decides a training where its arguments leave it open: a file, the checkpoint, the recipe or the data."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hydravit.checkpoint import model_config, read_checkpoint
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.data import kind_of, usual_preprocessing
from hydravit.recipes import OF_CHECKPOINTS, Recipe, usual_recipe

_UNTOLD = ("head_dim", "norm_eps", "pool", "act_layer")  # what weights of other projects do not tell of their config
# Arguments of recipes, which a file of settings may name besides fields.
_ARGUMENTS = ("recipe", "config", "data", "heads", "checkpoint", "part", "strict", "skip_corrupt", "split_seed", "amp",
              "epochs", "batch_size", "lr", "seed")  # fmt: skip


def take_settings_from_file(args: argparse.Namespace) -> None:
    """Let the YAML file that ``--set-from`` names decide what neither other arguments nor ``--set`` decide.

    Its keys are fields of the recipe or the model, and ``recipe``, ``config`` and the other arguments of a recipe.
    Those that it decides are then in ``args.decided_by_file``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML file of such names and values.
    """
    if args.set_from is None:
        return
    try:
        settings = yaml.safe_load(Path(args.set_from).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.set_from}: no YAML ({error})") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"{args.set_from}: expected lines of FIELD: VALUE, not {type(settings).__name__}")
    known = {field.name for kind in (Recipe, HydraViTConfig) for field in dataclasses.fields(kind)}
    fields, decided, named = [], {}, {setting.partition("=")[0] for setting in args.set}
    for name, value in settings.items():
        if name not in (*_ARGUMENTS, *known):
            hint = did_you_mean(name, [*_ARGUMENTS, *known])
            raise ValueError(
                f"{args.set_from}: {name!r} is no field of the recipe or the model, nor recipe or config"
                + (f"; {hint}" if hint else "")
            )
        if name not in named and getattr(args, name, None) is None:
            decided[name] = args.set_from
        if name not in _ARGUMENTS:
            fields.append(f"{name}={tuple(value) if isinstance(value, list) else value}")
        elif getattr(args, name) is None:
            setattr(args, name, _argument(args.set_from, name, value))
    args.set, args.set_from, args.decided_by_file = [*fields, *args.set], None, decided


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question about the name that is most like ``name``, or "" if none is."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else ""


def _argument(file: str, name: str, value: object) -> object:
    """Return a value of a file as the command line would have it."""
    if name == "heads" and isinstance(value, list):
        return ",".join(map(str, value))
    texts = {"recipe": "demo", "config": "small", "heads": "1-6"}
    example = texts[name] if name in texts else getattr(Recipe(), name)
    try:
        cut = isinstance(example, int) and isinstance(value, float)
        if cut or isinstance(value, bool) != isinstance(example, bool) or isinstance(value, (dict, list)):
            raise TypeError
        return type(example)(value)  # YAML takes 1e-3 for text
    except (TypeError, ValueError):
        raise ValueError(f"{file}: {name}: expected a value such as {example!r}, not {value!r}") from None


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
        nesting = recipe.config.geometry
        if nesting != HydraViTConfig().geometry and config.geometry != nesting:
            raise ValueError(
                f"recipe {recipe_name(args)}: the checkpoint must have geometry {nesting!r}, as `hydravit compress "
                f"--method wpac` makes it, not {config.geometry!r}"
            )
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
