"""Optimizer, learning rate and weight average of a recipe: torch's own or ours, with the recipe's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hydravit.recipes import Recipe
from hydravit.training.adamw import SliceAdamW

_NOT_DECAYED = ("cls_token", "reg_token", "pos_embed")


def make_optimizer(
    model: nn.Module, recipe: Recipe, world: int = 1, average: AveragedModel | None = None
) -> torch.optim.AdamW | SliceAdamW:
    """AdamW, without decay on vectors (biases, norms, layer scale), tokens and the position embedding, as in DeiT.

    With ``recipe.optimizer == "dense"`` it is the reference's: a weight outside the trained slice has a gradient of
    zero, not none, so it is still decayed and moved by its momentum; and the caller updates the average.
    With ``"active"`` it is ``SliceAdamW``, which updates the average itself. Frozen parameters are left out. Raises
    ``ValueError`` if all are frozen.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            classifier_bias = name == "head.bias"  # a matrix where every width has its own
            decayed = parameter.dim() > 1 and name not in _NOT_DECAYED and not classifier_bias
            groups[decayed].append(parameter)
    if not groups[True] and not groups[False]:
        raise ValueError("every parameter of the model is frozen: nothing to train")
    scale = recipe.batch_size * world / recipe.lr_batch if recipe.lr_batch else 1.0
    options = {"lr": recipe.lr * scale, "betas": recipe.betas, "eps": recipe.eps}
    decays = [
        {"params": parameters, "weight_decay": recipe.weight_decay if decayed else 0.0}
        for decayed, parameters in groups.items()
        if parameters
    ]
    if recipe.optimizer == "dense":
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        return torch.optim.AdamW(decays, **options, fused=fused)
    weights = None if average is None else average.module
    return SliceAdamW(decays, model, average=weights, ema_decay=average_decay(recipe), **options)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LambdaLR:
    """Linear warm-up, cosine to ``min_lr``, cool-down there; stepped after every optimizer step."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    end = (recipe.epochs - recipe.cooldown_epochs) * steps_per_epoch
    first, last = recipe.warmup_lr / recipe.lr, recipe.min_lr / recipe.lr

    def factor(step: int) -> float:
        if step < warmup:
            return first + (1.0 - first) * step / warmup
        if step >= end:
            return last
        return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (end - warmup)))

    return LambdaLR(optimizer, factor)


def average_decay(recipe: Recipe) -> Callable[[int], float]:
    """The decay of the average of the weights after ``n`` steps.

    It grows to the recipe's, ``(1 + n) / (10 + n)`` at first, so that short runs forget the start too. In single
    precision, as torch counts in a tensor.
    """
    return lambda n: min(recipe.ema, float(torch.as_tensor(1 + n) / torch.as_tensor(10 + n)))


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The exponential moving average of the weights, or None."""
    if not recipe.ema:
        return None
    decay = average_decay(recipe)

    def average(averaged, current, count) -> None:
        get_ema_multi_avg_fn(decay(count))(averaged, current, count)

    averaged = AveragedModel(model, multi_avg_fn=average)
    averaged.requires_grad_(False)
    return averaged
