"""``hydravit demo``: train every width of a small model at once, then time every width of ViT-B."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hydravit.cli.loading import add_threads_argument
from hydravit.cli.threads import set_threads
from hydravit.config import CONFIGS
from hydravit.recipes import Recipe

_EXAMPLES = """examples:
  hydravit demo                                  # about 90 seconds on two CPU cores
  hydravit demo --epochs 5 --seconds 0.1         # a first look in a few seconds
  hydravit demo --config large --out runs/large  # the widths of a ViT-L supernet
An interrupted demo goes on where it stopped; a finished one starts anew.
"""

RESULTS, MODEL = "results.json", "model.safetensors"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train on small digits, then time every width of ViT-B",
        description="Train every width of a small model on scikit-learn's digits, evaluate it on the third that was "
        "held out, and time every width of a ViT-B supernet beside eager slicing, on the CPU. Writes "
        "model.safetensors, results.json and results.png.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--config", default="base", choices=CONFIGS, help="the supernet to time (default: %(default)s)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of the training (default: the recipe's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per width and way (default: %(default)s)")
    add_threads_argument(parser)


def run(args: argparse.Namespace) -> None:
    from hydravit.evaluation import format_accuracy, format_supernet, measure_supernet, write_json, write_results
    from hydravit.evaluation.picture import check_plotting

    check_plotting()
    out, progress = Path(args.out), sys.stderr.isatty()
    training = _training_arguments(args, out)
    results = _unfinished(out, training)
    if results is None:
        _say(f"1. Train every width of a small model at once, on two thirds of scikit-learn's digits, to {out}.")
        results = _train(training, out)
        write_json(results, out)
    else:
        _say(f"1. {out / MODEL} is trained already.")
    _say(f"   Accuracy on the {results['environment']['images']} digits held out:\n")
    print(format_accuracy(results))
    _say(f"\n2. Run every width of the {args.config!r} model, in turns with eager slicing of the same weights.")
    supernet = measure_supernet(args.config, seconds=args.seconds, device="cpu", progress=progress)
    print("\n" + format_supernet(supernet) + "\n")
    print("wrote", out / MODEL, *write_results({**results, "supernet": supernet}, out))


def _say(text: str) -> None:
    print(text, flush=True)


def _training_arguments(args: argparse.Namespace, out: Path) -> argparse.Namespace:
    from hydravit.cli import parser

    arguments = ["train", "--recipe", "demo", "--out", str(out), "--device", "cpu", "--no-evaluate"]
    arguments += ["--checkpoint-every", "10"]  # seconds apart
    if args.epochs is not None:
        arguments += ["--epochs", str(args.epochs)]
    return parser().parse_args(arguments)


def _recipe(training: argparse.Namespace) -> Recipe:
    from hydravit.cli.train import make_recipe

    return make_recipe(training)


def _unfinished(out: Path, training: argparse.Namespace) -> dict | None:
    """Return the results of an earlier run of the same recipe that was stopped after its training, or None."""
    try:
        results = json.loads((out / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    same = results.get("recipe") == json.loads(json.dumps(_recipe(training).to_dict()))
    return results if same and "supernet" not in results and (out / MODEL).exists() else None


def _train(training: argparse.Namespace, out: Path) -> dict:
    """Train, or resume an interrupted training; return the results of ``evaluate`` on the part that was held out.

    One thread trains: in so small a model, two threads that sleep while they wait take more than twice as long.
    """
    import torch

    from hydravit.checkpoint import read_checkpoint
    from hydravit.cli import train
    from hydravit.cli.loading import about_data
    from hydravit.data import load_dataset
    from hydravit.evaluation import evaluate
    from hydravit.factory import fused_model
    from hydravit.training.folder import RunFolder

    folder = RunFolder(out)
    if folder.checkpoint.exists() and not folder.model.exists():
        training.resume = ""
        _say(f"   Going on from {folder.checkpoint}.")
    else:
        training.overwrite = True
    threads = torch.get_num_threads()
    set_threads(1)
    try:
        train.run(training)
    finally:
        set_threads(threads)
    recipe, checkpoint = _recipe(training), read_checkpoint(out / MODEL)
    dataset = load_dataset(recipe.data, split="test", preprocessing=checkpoint.preprocessing)
    model = fused_model(checkpoint=checkpoint, device="cpu")
    results = evaluate(model, dataset, latency=False, memory=False)
    results["data"] = about_data(recipe.data, "test", dataset)
    results["checkpoint"] = str(out / MODEL)
    return {**results, "recipe": recipe.to_dict()}
