"""The arguments that name a trained model, and loading it, for all commands that use one."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch

from hydravit.checkpoint import Checkpoint, read_checkpoint
from hydravit.cli import parse_heads
from hydravit.cli.images import add_image_arguments, check_order_of_classes, with_images
from hydravit.extras import extra
from hydravit.factory import fused_model
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing

if TYPE_CHECKING:
    from hydravit.data import Dataset


def add_model_arguments(parser: argparse.ArgumentParser, heads_help: str) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="weights: .safetensors, .pt or .pth")
    add_reading_arguments(parser)
    add_image_arguments(parser)
    add_width_arguments(parser, f"3,6,12 or 3-12 or all ({heads_help})")
    parser.add_argument("--allow-untrained", action="store_true", help="also widths the checkpoint was not trained at")
    parser.add_argument("--backend", default="auto", help="native, reference, ...; an explicit one runs or is an error")
    add_device_argument(parser)
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    add_threads_argument(parser)


def add_width_arguments(parser: argparse.ArgumentParser, heads_help: str, required: bool = False) -> None:
    """Add three ways to name widths, for ``chosen_heads``."""
    ways = parser.add_mutually_exclusive_group(required=required)
    ways.add_argument("--heads", metavar="LIST", help=heads_help)
    ways.add_argument("--width", metavar="LIST", help="shares of the full width, such as 0.25,0.4375")
    ways.add_argument(
        "--budget", metavar="LIST", help="for each number of multiply-accumulates, such as 1.2e9, the widest within it"
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a checkpoint of another project is to be read."""
    parser.add_argument("--part", metavar="NAME", help="which model of a checkpoint that has several, such as teacher")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the file's checksums")
    parser.add_argument("--no-strict", dest="strict", action="store_false", help="also if names are missing or left")
    parser.add_argument("--timm", metavar="NAME", help="timm's name of the model, which tells what weights do not")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=VALUE", help="a field of the config, such as head_dim=80"
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names images and their classes, for ``load_data``."""
    parser.add_argument("--data", required=True, help="digits, fashion-mnist[:FOLDER], or a folder of class folders")
    parser.add_argument(
        "--split-seed",
        type=int,
        metavar="N",
        help="of a folder that has no test folder (default: the one that CHECKPOINT was trained with, or 0)",
    )
    parser.add_argument("--skip-corrupt", action="store_true", help="leave unreadable image files out and count them")
    add_workers_argument(parser)


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, which ``hydravit.cli.main`` obeys."""
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="that compute on the CPU (default: OMP_NUM_THREADS, or one for each core that this process may use)",
    )


def read_weights(args: argparse.Namespace) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint, and the fields of its config that the command line gives or a model of timm tells."""
    fields: dict[str, Any] = {}
    told: Checkpoint | None = None
    if args.timm is not None:
        with extra("recipes", "--timm"):
            from hydravit.timm_models import checkpoint_of
        told = checkpoint_of(args.timm)
        assert told.config is not None  # timm's model always tells it
        fields = {name: getattr(told.config, name) for name in ("head_dim", "norm_eps", "pool")}
    for setting in args.field:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--field {setting}: expected NAME=VALUE")
        try:
            fields[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            fields[name] = text
    checkpoint = read_checkpoint(args.checkpoint, part=args.part, verify=args.verify)
    if checkpoint.preprocessing is None and told is not None:
        checkpoint = dataclasses.replace(checkpoint, preprocessing=told.preprocessing)
    return checkpoint, fields


def positive(text: str) -> int:
    """Parse an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def load_model(args: argparse.Namespace) -> tuple[HydraViT, Checkpoint, Preprocessing]:
    """Return the model, ready for inference, its checkpoint with all that arguments add, and its preprocessing."""
    checkpoint, fields = read_weights(args)
    model = fused_model(
        checkpoint=checkpoint,
        strict=args.strict,
        backend=args.backend,
        device=usable_device(args.device),
        allow_untrained=args.allow_untrained,
        **fields,
    )
    checkpoint = with_images(checkpoint, model.config, args, assume=True)
    assert checkpoint.preprocessing is not None
    size = model.config.image_size  # where a field of the config or timm's model says another one than the file
    return model.eval(), checkpoint, dataclasses.replace(checkpoint.preprocessing, image_size=size)


def load_data(
    args: argparse.Namespace, split: str, checkpoint: Checkpoint, preprocessing: Preprocessing, outputs: int
) -> Dataset:
    """Return a part of the data, labelled as the model of the checkpoint counts its ``outputs``."""
    from hydravit.data import load_dataset

    known, seed = checkpoint.split_seed, args.split_seed
    if None not in (known, seed) and known != seed:
        warnings.warn(
            f"{checkpoint.where}trained with split seed {known}: seed {seed} holds out other images", stacklevel=2
        )
    dataset = load_dataset(
        args.data,
        split=split,
        seed=(known or 0) if seed is None else seed,
        skip_corrupt=args.skip_corrupt,
        preprocessing=preprocessing,
        class_names=checkpoint.class_names,
    )
    check_order_of_classes(checkpoint, args.data, dataset.class_names, outputs)
    return dataset


def about_data(source: str, split: str, dataset: Dataset) -> dict[str, Any]:
    """Return what results say about the images that they were measured on."""
    return {"source": source, "split": split, "part": dataset.origin, "skipped": len(dataset.skipped)}


def chosen_heads(args: argparse.Namespace, model: HydraViT, otherwise: str = "all") -> tuple[int, ...]:
    """Return the widths that ``--heads``, ``--width`` or ``--budget`` names; ``otherwise`` where none is given.

    ``all`` names all that the model allows, ``widest`` the widest of them.
    """
    if args.budget is not None:
        from hydravit.evaluation import widest_within

        return tuple(sorted({widest_within(model, _number("budget", part)) for part in args.budget.split(",")}))
    text = otherwise if args.heads is None else args.heads.strip().lower()
    if args.width is not None:
        heads = tuple(sorted({model.config.width_of(_number("width", part)) for part in args.width.split(",")}))
    elif text in ("all", "widest"):
        return model.allowed_heads if text == "all" else model.allowed_heads[-1:]
    else:
        heads = parse_heads(text, model.config.widths, model.config.narrowest)
    refused = [k for k in heads if k not in model.allowed_heads]
    if refused:
        counted = model.config.counted
        names, trained = (", ".join(map(model.config.width_name, each)) for each in (refused, model.allowed_heads))
        raise ValueError(
            f"{counted} [{names}] were not trained; trained: [{trained}] (--allow-untrained uses them anyway)"
        )
    return heads


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r}: expected numbers, such as 0.25,0.4375 or 1.2e9") from None


def usable_device(name: str) -> torch.device:
    """Return the device of that name. Raise ``ValueError`` for CUDA if torch finds none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no CUDA device")
    return device
