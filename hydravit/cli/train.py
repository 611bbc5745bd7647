"""``hydravit train``: train all widths by a recipe, some of whose values may be replaced, and evaluate them."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import math
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hydravit.cli import parse_heads
from hydravit.cli.choices import (
    did_you_mean,
    recipe_name,
    sizes_of_images,
    starting_point,
    take_settings_from_file,
)
from hydravit.cli.loading import (
    about_data,
    add_device_argument,
    add_threads_argument,
    add_workers_argument,
    usable_device,
)
from hydravit.config import HydraViTConfig
from hydravit.recipes import AMP, RECIPES, Recipe, get_recipe, resumed_with

if TYPE_CHECKING:
    from hydravit.training.folder import RunFolder

_EXAMPLES = """examples:
  hydravit train --recipe demo --out runs/demo
  hydravit train --out runs/demo --resume                        # goes on where an interrupted run stopped
  hydravit train --out runs/demo --resume --epochs 200           # trains a finished run for longer
  hydravit train --recipe runs/demo/recipe.json --out runs/same  # the same run once more
  hydravit train --data photos/ --config tiny --heads 1-3 --epochs 100 --batch-size 128 --out runs/photos
  hydravit train --data photos/ --config base --checkpoint deit_tiny.pth --amp bf16 --out runs/base
  hydravit train --recipe demo --set depth=6 --set clip_norm=0.5 --out runs/deep
  torchrun --nproc-per-node 2 --no-python hydravit train --recipe hydravit-imagenet --data imagenet/ --out runs/in1k
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train all widths of a model at once",
        description="Train by a recipe. Writes recipe.json, log.jsonl, checkpoint.pt, model.safetensors and results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything is written")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the files' checksums")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="go on exactly from a checkpoint.pt (default: OUT's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that OUT holds")
    add_device_argument(parser)
    add_workers_argument(parser)
    parser.add_argument(
        "--validate-every",
        type=int,
        default=0,
        metavar="N",
        help="epochs between looks at the test part (default: never)",
    )
    parser.add_argument("--checkpoint-every", type=int, default=1, metavar="N", help="epochs (default: %(default)s)")
    parser.add_argument("--checkpoint-steps", type=int, default=0, metavar="N", help="steps; also within an epoch")
    parser.add_argument("--tensorboard", action="store_true", help="also write the log for TensorBoard")
    parser.add_argument("--no-evaluate", action="store_true", help="do not evaluate every width at the end")
    parser.add_argument("--accuracy-only", action="store_true", help="evaluate without latency and memory")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that make a recipe and its data, for every command that trains."""
    parser.add_argument(
        "--recipe",
        help=f"{', '.join(RECIPES)}, or a run's recipe.json (default: the resumed run's, or the usual for the data)",
    )
    parser.add_argument(
        "--data", help="digits, fashion-mnist[:FOLDER], or a folder of class folders (default: the recipe's)"
    )
    parser.add_argument("--config", help="tiny, small, base, large: the full model (default: the recipe's)")
    parser.add_argument(
        "--heads", metavar="LIST", help="widths to train: 3,6,12 or 3-12 or all (default: the recipe's)"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to start from: timm's, DeiT's or our own")
    parser.add_argument("--part", metavar="NAME", help="which model of a checkpoint that has several, such as teacher")
    parser.add_argument(
        "--no-strict", dest="strict", action="store_const", const=False, help="also if names are missing or left"
    )
    parser.add_argument(
        "--skip-corrupt", action="store_const", const=True, help="leave unreadable image files out and count them"
    )
    parser.add_argument("--split-seed", type=int, metavar="N", help="of a folder that has no test folder (default: 0)")
    parser.add_argument("--amp", choices=AMP, help="mixed precision (default: the recipe's)")
    for name, kind in (("epochs", int), ("batch_size", int), ("lr", float), ("seed", int)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help="replaces the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replaces any field of the recipe or the model",
    )
    parser.add_argument("--set-from", metavar="FILE", help="fields from a YAML file; other arguments take precedence")
    parser.set_defaults(decided_by_file={})  # fields, and that file's name
    parser.add_argument("--backend", default="auto", help="native, reference, ...; an explicit one runs or is an error")
    add_threads_argument(parser)


def run(args: argparse.Namespace) -> None:
    from hydravit.evaluation.picture import check_plotting
    from hydravit.training.folder import RunFolder
    from hydravit.training.tensorboard import check_tensorboard

    if not args.no_evaluate:
        check_plotting()
    if args.tensorboard:
        check_tensorboard()
    device, main = _start_ranks(args.device)
    folder = RunFolder(args.out)
    with folder.lock() if main else contextlib.nullcontext():
        _train(args, device, main, folder)


def _train(args: argparse.Namespace, device: torch.device, main: bool, folder: RunFolder) -> None:
    from hydravit.checkpoint import save_checkpoint
    from hydravit.cli.summary import training_summary
    from hydravit.training import Interrupted, Trainer, load_held_out, load_training, make_mix, make_model, make_teacher

    resume = _checkpoint_to_resume(args, folder, main)
    if args.recipe is None and resume is not None and (resume.parent / folder.description.name).exists():
        args.recipe = str(resume.parent / folder.description.name)
    recipe = make_recipe(args)
    others = resumed_with(args.recipe) if resume is None and args.recipe is not None else []
    if others:
        text = (
            f"{args.recipe}: that run got other {', '.join(others)} when it was resumed; this run has them throughout"
        )
        warnings.warn(text, stacklevel=2)
    try:
        dataset = load_training(recipe)
    except ValueError as error:
        if resume is None or args.data is not None:
            raise
        raise ValueError(f"{error}; --data says where the images of a resumed run are now") from error
    preprocessing, class_names = dataset.preprocessing, dataset.class_names
    evaluation = load_held_out(recipe, dataset) if args.validate_every or not args.no_evaluate else None

    start = resume is None  # where a run goes on, the weights that it began with do not matter
    model = make_model(recipe, dataset, backend=args.backend, device=device, start=start, verify=args.verify)
    trainer = Trainer(
        model,
        recipe,
        dataset,
        out=folder,
        preprocessing=preprocessing,
        class_names=class_names,
        validation=evaluation,
        validate_every=args.validate_every,
        mix=make_mix(recipe, dataset),
        teacher=make_teacher(recipe, dataset, device=device, verify=args.verify),
        calibration=load_training(recipe, augment=False) if recipe.grow_epochs else None,
        checkpoint_every=args.checkpoint_every,
        checkpoint_steps=args.checkpoint_steps,
        workers=args.workers,
        tensorboard=args.tensorboard,
    )
    changed = {} if resume is None else trainer.resume(resume, verify=args.verify)
    if trainer.epoch >= recipe.epochs and changed.keys() - {"data"}:
        raise ValueError(
            f"{folder}: all {recipe.epochs} epochs are done, so another {', '.join(changed)} changes nothing; "
            "give more --epochs, or another --out for a new run"
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # every rank has seen what the folder held
    if main:
        print(training_summary(args, trainer, folder, dataset, evaluation, resume), flush=True)
        if trainer.epoch >= recipe.epochs:
            print("no step is left: the run is finished and not trained any further", flush=True)
        for name, (before, now) in changed.items():
            print(f"after step {trainer.step}, {name} is {now!r}; it was {before!r}", flush=True)
        if resume is None:
            folder.clear()
    try:
        trained = trainer.run()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except Interrupted as stopped:
        print(f"hydravit: {stopped}; {_resuming(folder)}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except (RuntimeError, ValueError, OSError) as error:
        step = trainer.saved_step
        rest = f"{folder.checkpoint} " + (
            "was not written yet" if step is None else f"holds the state after step {step}: {_resuming(folder)}"
        )
        raise RuntimeError(f"{_reason(error)}; {rest}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if not main:
        return
    trained.trained_heads = trainer.heads
    save_checkpoint(
        folder.model, trained, preprocessing=preprocessing, class_names=class_names, split_seed=recipe.split_seed
    )
    print("wrote", folder.model)
    if not args.no_evaluate:
        try:
            _evaluate(trained, evaluation, args, recipe, folder.model)
        except KeyboardInterrupt:
            print(
                f"hydravit: interrupted: the training is done, its evaluation is not; {_resuming(folder)}",
                file=sys.stderr,
            )
            raise SystemExit(130) from None


def _resuming(folder: RunFolder) -> str:
    return f"go on with: hydravit train --out {shlex.quote(str(folder))} --resume"


def _reason(error: Exception) -> str:
    """Return what ended a training. Of a rank that ended, the others learn only that a connection broke."""
    lost = re.search(r"Connection (closed|reset) by peer|Broken pipe", str(error))
    if lost is not None and torch.distributed.is_initialized():
        return f"another rank of this training has ended ({lost[0]})"
    return str(error)


def _checkpoint_to_resume(args: argparse.Namespace, folder: RunFolder, main: bool) -> Path | None:
    """Return the checkpoint that ``--resume`` names, or None; refuse to replace a run that nobody said to replace."""
    if args.resume is None:
        finished = folder.model.exists()
        if main and not args.overwrite and (finished or folder.checkpoint.exists()):
            raise ValueError(
                f"{folder} holds {'a finished' if finished else 'an interrupted'} run: --resume goes on with it "
                f"{'(for more --epochs) ' if finished else ''}and --overwrite replaces it, or choose another --out"
            )
        return None
    checkpoint = Path(args.resume or folder.checkpoint)
    if not args.resume and not checkpoint.exists() and folder.description.exists():
        args.recipe = args.recipe or str(folder.description)
        if main:
            print(f"{checkpoint} was not written yet: the run starts anew", flush=True)
        return None
    return checkpoint


def _evaluate(model, dataset, args: argparse.Namespace, recipe: Recipe, path: Path) -> None:
    from hydravit.cli.summary import some
    from hydravit.evaluation import evaluate, format_table, write_results

    measure = not args.accuracy_only
    heads, shown = some(model.allowed_heads), sys.stderr.isatty()
    results = evaluate(model.eval(), dataset, heads=heads, latency=measure, memory=measure, progress=shown)
    results["data"] = about_data(recipe.data, "test", dataset)
    results["checkpoint"] = str(path)
    print(format_table(results))
    if len(heads) < len(model.allowed_heads):
        print(
            f"{len(heads)} of {len(model.allowed_heads)} widths; `hydravit evaluate` takes any, by --heads or --budget"
        )
    print("wrote", *write_results(results, args.out))


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe with all that the command line replaces. Raise ``ValueError``, which names a wrong setting."""
    take_settings_from_file(args)
    recipe = get_recipe(recipe_name(args))
    config_fields = {field.name for field in dataclasses.fields(HydraViTConfig)}
    recipe_fields = {field.name for field in dataclasses.fields(Recipe)} - {"config"}
    # An argument that has the name of a field replaces it; widths are text that the model's size explains.
    given = {name: getattr(args, name, None) for name in recipe_fields - {"heads"}}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config_changes: dict[str, Any] = {}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals or name not in config_fields | recipe_fields:
            fields = [*sorted(recipe_fields), *sorted(config_fields)]
            expected = did_you_mean(name, fields) or f"expected FIELD=VALUE with one of {', '.join(fields)}"
            raise ValueError(f"--set {setting}: no field of the recipe or the model; {expected}")
        target, owner = (changes, recipe) if name in recipe_fields else (config_changes, recipe.config)
        target[name] = _parse(setting, value, getattr(owner, name))
    config, decided = starting_point(args, recipe, config_changes)
    changes = decided | changes
    sizes = sizes_of_images(args, recipe, changes.get("data", recipe.data), set(config_changes))
    config = dataclasses.replace(config, **sizes, **config_changes)
    changes = _schedule(recipe, changes.get("epochs", recipe.epochs)) | changes
    # A recipe's widths are those of its own model, so another model does not take them.
    if config.widths != recipe.config.widths or args.heads is not None:
        changes = {"heads": (), "weights": (), **changes}
    if args.heads is not None:
        changes["heads"] = parse_heads(args.heads, config.widths, config.narrowest)
    return recipe.replace(config=config, **changes)


def _schedule(recipe: Recipe, epochs: int) -> dict[str, Any]:
    """Return the recipe's warm-up, cool-down and first epochs, in proportion where so few have no room for them."""
    first = max(recipe.full_epochs, recipe.grow_epochs)
    if epochs >= recipe.epochs or max(recipe.warmup_epochs + recipe.cooldown_epochs, 2 * first) < epochs:
        return {}
    share = epochs / recipe.epochs
    return {
        "full_epochs": int(recipe.full_epochs * share),
        "grow_epochs": math.ceil(recipe.grow_epochs * share),
        "warmup_epochs": recipe.warmup_epochs * share,
        "cooldown_epochs": int(recipe.cooldown_epochs * share),
    }


def _parse(setting: str, text: str, default: object) -> object:
    """Return a value of the field's type: strings need no quotes, numbers and tuples are Python's."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, tuple) and isinstance(value, str):
        value = tuple(value.split(","))
    if isinstance(default, tuple) and isinstance(value, (int, float)):
        value = (value,) * (2 if setting.startswith("image_size") else 1)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise ValueError(f"--set {setting}: expected a value of type {type(default).__name__}, such as {default!r}")
    return value


def _start_ranks(name: str) -> tuple[torch.device, bool]:
    """Return the device, and whether this process writes; under torchrun join the other ranks first."""
    device = usable_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, True
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, torch.distributed.get_rank() == 0
