"""The arguments that name a trained model, and loading it, for all commands that use one."""

from __future__ import annotations

import argparse

import torch

from hydravit.checkpoint import Checkpoint, read_checkpoint
from hydravit.cli import parse_heads
from hydravit.factory import fused_model
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing


def add_model_arguments(parser: argparse.ArgumentParser, heads_help: str) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="weights: .safetensors, .pt or .pth")
    parser.add_argument("--heads", default=None, metavar="LIST", help=f"3,6,12 or 3-12 or all ({heads_help})")
    parser.add_argument("--allow-untrained", action="store_true", help="also widths the checkpoint was not trained at")
    parser.add_argument("--backend", default="auto", help="native, reference, ...; an explicit one runs or is an error")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="(default: %(default)s)")


def positive(text: str) -> int:
    """Parse an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def load_model(args: argparse.Namespace) -> tuple[HydraViT, Checkpoint, Preprocessing]:
    """Return the model, ready for inference, its checkpoint, and the preprocessing of its images."""
    checkpoint = read_checkpoint(args.checkpoint)
    model = fused_model(
        checkpoint=checkpoint,
        backend=args.backend,
        device=usable_device(args.device),
        allow_untrained=args.allow_untrained,
    )
    return model.eval(), checkpoint, checkpoint.preprocessing or Preprocessing.for_model(model.config)


def chosen_heads(args: argparse.Namespace, model: HydraViT) -> tuple[int, ...]:
    """Return the widths that ``--heads`` names; ``all`` names all that the model allows."""
    if args.heads.strip().lower() == "all":
        return model.allowed_heads
    heads = parse_heads(args.heads, model.config.max_heads)
    refused = [k for k in heads if k not in model.allowed_heads]
    if refused:
        trained = list(model.allowed_heads)
        raise ValueError(f"heads {refused} were not trained; trained: {trained} (--allow-untrained uses them anyway)")
    return heads


def usable_device(name: str) -> torch.device:
    """Return the device of that name. Raise ``ValueError`` for CUDA if torch finds none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no CUDA device")
    return device
