"""Arguments that say what a checkpoint of another project does not: its images' preprocessing, its classes' names."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

from hydravit.checkpoint import Checkpoint
from hydravit.config import HydraViTConfig
from hydravit.preprocessing import INTERPOLATIONS, Preprocessing

_FIELDS = ("mean", "std", "crop", "interpolation")  # of Preprocessing, and names of arguments


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=_numbers, metavar="R,G,B", help=f"{name} of the images that the model was trained with"
        )
    parser.add_argument("--crop", type=float, metavar="PART", help="of the resized image's side that it keeps")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="of resizing")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="the outputs' names: one a line, or JSON (a list, or number: name)"
    )


def with_images(checkpoint: Checkpoint, config: HydraViTConfig, args: argparse.Namespace, assume: bool) -> Checkpoint:
    """Return the checkpoint with the preprocessing and the class names that the arguments give in place of its own.

    Args:
        assume: whether the usual preprocessing, with a warning, takes the place of one that nothing tells.
    Raises:
        ValueError: the arguments do not fit the model, or the file of names is none.
        OSError: that file cannot be read.
    """
    given = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    for name in ("mean", "std"):
        if len(given.get(name, ())) == 1:
            given[name] *= config.in_channels
    known = checkpoint.preprocessing
    if known is not None:
        known = dataclasses.replace(known, **given)
    elif given or assume:
        known = Preprocessing.for_model(config, **given)
        assumed = ", ".join(f"{name} {_text(getattr(known, name))}" for name in _FIELDS if name not in given)
        if assumed:
            options = ", ".join(f"--{name}" for name in _FIELDS if name not in given)
            warnings.warn(
                f"{checkpoint.where}does not tell how images were prepared; assumed: {assumed} ({options} or --timm)",
                stacklevel=2,
            )
    if known is not None and len(known.mean) != config.in_channels:
        raise ValueError(f"mean and std must have {config.in_channels} values, one per channel, not {len(known.mean)}")
    names = checkpoint.class_names if args.classes is None else _read_names(args.classes, config.num_classes)
    return dataclasses.replace(checkpoint, preprocessing=known, class_names=names)


def check_order_of_classes(checkpoint: Checkpoint, data: str, found: tuple[str, ...], outputs: int) -> None:
    """Warn where a model without names for its classes is evaluated; ``ValueError`` if it has more or fewer classes."""
    if checkpoint.class_names is not None or outputs == 0:
        return
    text = f"{checkpoint.where}names no classes"
    some = ", ".join(map(repr, found[:3])) + (", ..." if len(found) > 3 else "")
    if outputs != len(found):
        raise ValueError(
            f"{text} and has {outputs} outputs, where {data} has {len(found)} classes ({some}): --classes FILE names "
            "the outputs"
        )
    warnings.warn(
        f"{text}: its outputs are taken for {data}'s classes in this order: {some} (or --classes)", stacklevel=2
    )


def _read_names(path: Path, count: int) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8")
    try:
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except ValueError as error:
        raise ValueError(f"--classes {path}: no JSON ({error})") from None
    if isinstance(names, dict) and sorted(names) == sorted(map(str, range(len(names)))):
        names = [names[str(output)] for output in range(len(names))]
    good = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not good or len(names) != count or len(set(names)) != count:
        found = f"{len(set(names))} different ones in {len(names)}" if good else "something else"
        raise ValueError(f"--classes {path}: expected {count} different names, one for each output, not {found}")
    return tuple(names)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.5 or 0.485,0.456,0.406, not {text!r}") from None


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
