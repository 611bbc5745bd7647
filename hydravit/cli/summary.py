"""What a training is about to do, and what decided it: printed before it starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from hydravit.cli.choices import recipe_name
from hydravit.data import Dataset, kind_of, usual_preprocessing
from hydravit.evaluation.cost import cost
from hydravit.evaluation.report import aligned, count
from hydravit.preprocessing import IMAGENET_MEAN
from hydravit.recipes import OF_CHECKPOINTS, RECIPES, Recipe, get_recipe
from hydravit.training import Trainer
from hydravit.training.folder import RunFolder

_MANY = 20  # classes, of which only the smallest and the largest are then shown


def training_summary(
    args: argparse.Namespace,
    trainer: Trainer,
    folder: RunFolder,
    training: Dataset,
    held_out: Dataset | None,
    resumed: Path | None,
) -> str:
    """Describe a training that is ready to run: data, images, model, steps, device and files; reasons in brackets.

    Args:
        resumed: the checkpoint of the interrupted run that it goes on with.
    """
    because = _Reasons(args)
    parts = {
        "recipe": [because.of_recipe],
        "data": _data(trainer, training, held_out, because),
        "images": _images(trainer, training, because),
        "model": _model(trainer, because, resumed),
        "steps": _steps(trainer, because),
        "learning rate": _learning_rate(trainer, because),
        **_teacher(trainer.recipe),
        "device": _device(args, trainer),
        "output": _output(trainer, folder),
    }
    width = max(map(len, parts)) + 2
    lines = []
    for label, texts in parts.items():
        lines += [f"{label:{width}}{texts[0]}", *(" " * width + text for text in texts[1:])]
    return "\n".join(lines)


class _Reasons:
    """What decided a field: an argument, the checkpoint or the recipe."""

    def __init__(self, args: argparse.Namespace):
        name = recipe_name(args)
        self._args, self._recipe = args, f"recipe {name}" if name in RECIPES else Path(name).name
        self._decided = {setting.partition("=")[0]: "--set" for setting in args.set} | args.decided_by_file
        self._follows_checkpoint = name in OF_CHECKPOINTS
        kind = kind_of(args.data or "digits")
        usual = f"for {'a folder of photos' if kind == 'folder' else kind}"
        if self._follows_checkpoint:
            usual += " and weights to start from"
        self.of_recipe = name if args.recipe else f"{name} (the usual one {usual}; --recipe chooses another)"

    def __call__(self, field: str) -> str:
        """Return what decided a field of the recipe, in brackets."""
        given = getattr(self._args, field, None) is not None
        option = f"--{field.replace('_', '-')}" if given else self._recipe
        return f"({self._decided.get(field, option)})"

    def of_warmup(self, epochs: float) -> str:
        """Return what decided the length of the warm-up, in brackets."""
        shortened = epochs != get_recipe(recipe_name(self._args)).warmup_epochs and "warmup_epochs" not in self._decided
        return "(shortened with the epochs)" if shortened else self("warmup_epochs")

    def of_model(self, field: str) -> str:
        """Return what decided a field of the model's config, in brackets."""
        other = "the checkpoint's" if self._follows_checkpoint else self._recipe
        named = self._args.config and self._decided.get("config", f"--config {self._args.config}")
        return f"({self._decided.get(field) or named or other})"


def _data(trainer: Trainer, training: Dataset, held_out: Dataset | None, because: _Reasons) -> list[str]:
    parts = {"training": training} | ({} if held_out is None else {"held out": held_out})
    lines = [f"{trainer.recipe.data} {because('data')}, {len(training.class_names)} classes"]
    for name, data in parts.items():
        skipped = f", {len(data.skipped)} unreadable left out" if data.skipped else ""
        lines.append(f"{name}: {len(data)} images, {data.origin}{skipped}")
    if held_out is None:
        lines.append("held out: not read, because nothing is evaluated")
    counts = [data.labels.bincount(minlength=len(training.class_names)).tolist() for data in parts.values()]
    if len(training.class_names) <= _MANY:
        rows = [[name, *map(str, row)] for name, *row in zip(training.class_names, *counts, strict=True)]
        lines += aligned(["class", *parts], rows).splitlines()
    else:
        ranges = [f"{min(each)} to {max(each)} {name}" for name, each in zip(parts, counts, strict=True)]
        lines.append(f"images per class: {', '.join(ranges)}")
    return lines


def _images(trainer: Trainer, training: Dataset, because: _Reasons) -> list[str]:
    images, recipe = training.preprocessing, trainer.recipe
    height, width = training.image_size
    if recipe.mean:
        source = "the checkpoint's" if recipe.checkpoint else "the recipe's"
    else:
        usual = usual_preprocessing(recipe.data)
        source = "ImageNet's, usual for photos" if usual.mean == IMAGENET_MEAN else "the data's"
        if len(usual.mean) != len(images.mean):
            source += ", a mean over its channels"
    heavy = {name: getattr(recipe, name) for name in ("rand_augment", "color_jitter", "random_erasing")}
    light = {"light": True} if recipe.augment and not any(heavy.values()) else {}
    mixed = {name: getattr(recipe, name) for name in ("mixup", "cutmix")}
    augmentation = [
        name if value is True else f"{name} {value}" for name, value in (light | heavy | mixed).items() if value
    ]
    return [
        f"{height}x{width} pixels {because.of_model('image_size')}, {training.in_channels} channel(s), "
        f"resized by {images.interpolation}, centre crop of {images.crop:g}",
        f"mean {_numbers(images.mean)}, std {_numbers(images.std)} ({source})",
        f"augmentation in training: {', '.join(augmentation) or 'none'}",
    ]


def _model(trainer: Trainer, because: _Reasons, resumed: Path | None) -> list[str]:
    model, recipe = trainer.model, trainer.recipe
    config = model.config
    if resumed is not None:
        start = f"goes on from {resumed} after step {trainer.step}"
    elif recipe.checkpoint:
        start = f"starts from {recipe.checkpoint}"
    else:
        start = f"starts from random weights of seed {recipe.seed}"
    average = f"; its moving average, ema {recipe.ema:g}, is what is evaluated and saved" if recipe.ema else ""
    drawn = "a width for every image" if recipe.per_image else "a width for every step"
    rows = []
    for heads in some(sorted(trainer.heads)):
        params, macs = cost(config, model.subnetwork(heads))
        rows.append([config.width_name(heads), count(params), f"{macs / 1e9:.4g}"])
    frozen = [f"frozen: {', '.join(recipe.freeze)}"] if recipe.freeze else []
    return [
        f"{config.depth} layers, {config.max_heads} heads of {config.head_dim} channels {because.of_model('depth')}, "
        f"patches of {config.patch_size} pixels, {config.num_classes} classes (the data's)",
        *frozen,
        f"{start}{average}",
        f"trained widths, {'several in a step' if recipe.sandwich else drawn}"
        + (":" if len(rows) == len(trainer.heads) else f"; {len(rows)} of {len(trainer.heads)}:"),
        *aligned([config.counted, "params", "GMACs"], rows).splitlines(),
    ]


def some(widths: Sequence[int], most: int = 20) -> Sequence[int]:
    """Return at most so many widths, equally far apart, the last among them: a list of cuts can have hundreds."""
    step = -(-len(widths) // most)
    return widths[(len(widths) - 1) % step :: step]


def _steps(trainer: Trainer, because: _Reasons) -> list[str]:
    recipe, steps = trainer.recipe, len(trainer.batches)
    size = min(recipe.batch_size, len(trainer.batches.dataset) // trainer.world)
    left = len(trainer.batches.dataset) - steps * size * trainer.world
    batch = (
        f"(all that there are; batch_size is {recipe.batch_size})"
        if size < recipe.batch_size
        else because("batch_size")
    )
    ranks = f" on each of {trainer.world} processes" if trainer.world > 1 else ""
    return [
        f"{recipe.epochs * steps} = {recipe.epochs} epochs {because('epochs')} of {steps} steps with {size} images"
        f"{ranks} {batch}"
        + (f"; of every epoch's random order the last {left} images fill no step and are left out" if left else ""),
        *_widths(recipe),
    ]


def _widths(recipe: Recipe) -> list[str]:
    """Return what a step trains, where that is more than one width."""
    if recipe.grow_epochs:
        grows = f"a list of cuts grows in the first {recipe.grow_epochs} epoch(s); its narrowest width keeps"
        return [f"{grows} {recipe.keep:g} of the cost of all channels; its widths are what is trained"]
    if not recipe.sandwich:
        return []
    between = f"{recipe.sandwich - 2} drawn between them" if recipe.sandwich > 2 else "none between them"
    between += ", one from each of equal ranges" if recipe.bins else ""
    teachers = {"": "labels teach all", "widest": "the widest teaches the others", "next": "each teaches the next"}
    labels = f", and labels with weight {recipe.label_weight:g}" if recipe.label_weight else ""
    first = f"; the first {recipe.full_epochs} epochs train the widest only" if recipe.full_epochs else ""
    return [f"a step trains the widest width, the narrowest, {between}; {teachers[recipe.transfer]}{labels}{first}"]


def _learning_rate(trainer: Trainer, because: _Reasons) -> list[str]:
    recipe = trainer.recipe
    peak = max(trainer.scheduler.base_lrs)
    scaled = f", {recipe.lr:g} for {recipe.lr_batch} images" if recipe.lr_batch else ""
    falling = f", layer decay {recipe.layer_decay:g}" if recipe.layer_decay < 1 else ""
    now = f"; goes on at {max(trainer.scheduler.get_last_lr()):.3g}" if trainer.step else ""
    clipped = f", gradients clipped to norm {recipe.clip_norm:g}" if recipe.clip_norm else ""
    cooldown = f" and {recipe.cooldown_epochs} epochs there" if recipe.cooldown_epochs else ""
    return [
        f"{peak:.3g} {because('lr')[:-1]}{scaled}) after {recipe.warmup_epochs:.3g} epochs of warm-up "
        f"{because.of_warmup(recipe.warmup_epochs)}, a cosine to {peak * recipe.min_lr / recipe.lr:.3g}{cooldown}{now}",
        f"AdamW ({recipe.optimizer}), betas {_numbers(recipe.betas)}, eps {recipe.eps:g}, "
        f"weight decay {recipe.weight_decay:g}, drop path {recipe.config.drop_path:g}, "
        f"label smoothing {recipe.smoothing:g}{clipped}{falling}",
    ]


def _teacher(recipe: Recipe) -> dict[str, list[str]]:
    if not recipe.distillation:
        return {}
    weights = f" with the weights in {recipe.teacher_checkpoint}" if recipe.teacher_checkpoint else ""
    return {
        "teacher": [
            f"{recipe.teacher}{weights}: {recipe.distillation} distillation of weight {recipe.distillation_weight:g}"
        ]
    }


def _device(args: argparse.Namespace, trainer: Trainer) -> list[str]:
    precision = "float32" if trainer.recipe.amp == "none" else f"float32 and {trainer.recipe.amp}"
    return [
        f"{trainer.device}, backend {trainer.model.backend}, {precision}; {trainer.world} process(es) of "
        f"{torch.get_num_threads()} thread(s), {args.workers} that load images"
    ]


def _output(trainer: Trainer, folder: RunFolder) -> list[str]:
    every = f" every {trainer.checkpoint_every} epoch(s)" if trainer.checkpoint_every else " at the end"
    return [
        f"{folder}: {folder.description.name}, {folder.log.name}, {folder.checkpoint.name}{every}, at the end "
        f"{folder.model.name} and results"
    ]


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
