"""``hydravit predict``: the classes of images at one width or at many."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hydravit.cli.loading import add_model_arguments, chosen_heads, load_model, positive

_EXAMPLES = """examples:
  hydravit predict photo.jpg --checkpoint model.safetensors
  hydravit predict photos/ scan.png --checkpoint model.safetensors --heads 3 --json > answers.json
  hydravit predict photo.jpg --checkpoint model.safetensors --heads all   # how the answer changes with the width
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="classes of images",
        description="The most probable classes of images, at one width or at many.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    add_model_arguments(parser, "default: the widest trained")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes to show (default: %(default)s)")
    parser.add_argument("--skip-corrupt", action="store_true", help="go on after an image that cannot be read")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    from hydravit.data.layout import image_files

    model, checkpoint, preprocessing = load_model(args)
    if not model.num_classes:
        raise ValueError(f"{args.checkpoint}: the model has no classifier")
    heads = chosen_heads(args, model, otherwise="widest")
    names = checkpoint.class_names or tuple(str(label) for label in range(model.num_classes))
    files = [file for path in args.images for file in image_files(path)]
    answers = []
    for batch, images in _batches(files, preprocessing, args.batch_size, args.skip_corrupt):
        answers += _predict(model, batch, images, heads, names, args.top)
    if args.json:
        print(json.dumps(answers, indent=2))
    else:
        _print(answers, len(heads) > 1)
    if len(answers) < len(files):
        print(f"skipped {len(files) - len(answers)} unreadable file(s)", file=sys.stderr)


def _batches(files, preprocessing, size: int, skip_corrupt: bool) -> Iterator[tuple[list[Path], torch.Tensor]]:
    from hydravit.data.folder import read_image

    for start in range(0, len(files), size):
        read = {}
        for file in files[start : start + size]:
            try:
                read[file] = preprocessing(read_image(file, preprocessing))
            except ValueError:
                if not skip_corrupt:
                    raise
        if read:
            yield list(read), torch.stack(list(read.values()))


@torch.inference_mode()
def _predict(model, files, images, heads, names, top: int) -> list[dict]:
    """Return per file ``{"file", "widths": [{"heads", "classes": [{"name", "label", "probability"}]}]}``.

    Where widths are no heads, they have their share of the full one too, ``"width"``.
    """
    from hydravit.evaluation.evaluate import width_row

    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    answers: list[dict[str, Any]] = [{"file": str(file), "widths": []} for file in files]
    for k in heads:
        probabilities = model(images, heads=k).float().softmax(1)
        if not probabilities.isfinite().all():
            raise RuntimeError(f"heads={k}: the model's logits are not finite")
        values, labels = (part.tolist() for part in probabilities.topk(min(top, len(names)), dim=1))
        for answer, row, row_labels in zip(answers, values, labels, strict=True):
            classes = [
                {"name": names[label], "label": label, "probability": value}
                for value, label in zip(row, row_labels, strict=True)
            ]
            answer["widths"].append({**width_row(model.config, k), "classes": classes})
    return answers


def _print(answers: list[dict], many_widths: bool) -> None:
    for answer in answers:
        print(answer["file"])
        for width in answer["widths"]:
            texts = [f"{entry['probability']:.3f} {entry['name']}" for entry in width["classes"]]
            if many_widths:
                name = f"width={width['width']:<6}" if "width" in width else f"k={width['heads']:<3}"
                print(f"  {name} " + "  ".join(texts))
            else:
                print("\n".join(f"  {text}" for text in texts))
