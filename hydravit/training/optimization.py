"""The optimizer, the learning rate and the average of the weights that a recipe names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hydravit.model import HydraViT
from hydravit.recipes import Recipe
from hydravit.training.adamw import SliceAdamW

_NOT_DECAYED = ("cls_token", "dist_token", "reg_token", "pos_embed")


def freeze(model: HydraViT, recipe: Recipe) -> None:
    """Freeze what ``recipe.freeze`` names: ``requires_grad`` of these parameters becomes False.

    Raises ``ValueError`` for a name that is no module or parameter of the model.
    """
    for frozen in recipe.freeze:
        found = [parameter for name, parameter in model.named_parameters() if f"{name}.".startswith(f"{frozen}.")]
        if not found:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"recipe: freeze: the model has no {frozen!r}; it has {parts}, blocks.0 and so on")
        for parameter in found:
            parameter.requires_grad_(False)


def make_optimizer(
    model: HydraViT, recipe: Recipe, world: int = 1, average: AveragedModel | None = None
) -> torch.optim.AdamW | SliceAdamW:
    """Make AdamW, without decay on vectors (biases, norms, layer scale), tokens and position embedding, as in DeiT.

    ``recipe.optimizer == "dense"`` is torch's, as in the paper's code: weights outside the trained slice have a
    gradient of zero, so decay and momentum still change them. The caller updates the average. ``"active"`` is
    ``SliceAdamW``, which updates the average itself. Frozen parameters are left out; ``ValueError`` if all are frozen.
    """
    scale = recipe.batch_size * world / recipe.lr_batch if recipe.lr_batch else 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by learning rate and weight decay
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = recipe.lr * scale * recipe.layer_decay ** _layers_behind(name, model.config.depth)
            classifier_bias = name == "head.bias"  # a matrix if every width has its own
            decayed = parameter.dim() > 1 and name not in _NOT_DECAYED and not classifier_bias
            groups.setdefault((lr, recipe.weight_decay if decayed else 0.0), []).append(parameter)
    if not groups:
        raise ValueError("every parameter of the model is frozen: nothing to train")
    decays = [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]
    options: dict[str, Any] = {"betas": recipe.betas, "eps": recipe.eps}
    if recipe.optimizer == "dense":
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        return torch.optim.AdamW(decays, **options, fused=fused)
    weights = None if average is None else cast(HydraViT, average.module)
    return SliceAdamW(decays, model, average=weights, ema_decay=average_decay(recipe), **options)


def _layers_behind(name: str, depth: int) -> int:
    """How many layers come after a parameter's; the stem is one before the blocks, norm and classifier one after."""
    if name.startswith("blocks."):
        return depth - int(name.split(".")[1])
    return 0 if name.startswith(("norm.", "fc_norm.", "head")) else depth + 1


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int, done: int = 0) -> LambdaLR:
    """Make a schedule of linear warm-up, cosine to ``min_lr``, and cool-down there; it steps with the optimizer.

    The rate depends on the step alone, so that a resumed run needs nothing but the number of steps ``done``.
    """
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    end = (recipe.epochs - recipe.cooldown_epochs) * steps_per_epoch
    first, last = recipe.warmup_lr / recipe.lr, recipe.min_lr / recipe.lr

    def factor(step: int) -> float:
        if step < warmup:
            return first + (1.0 - first) * step / warmup
        if step >= end:
            return last
        return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (end - warmup)))

    return LambdaLR(optimizer, factor, last_epoch=done - 1)


def average_decay(recipe: Recipe) -> Callable[[int], float]:
    """Return a function from the number of steps ``n`` to the decay of the average of the weights.

    The decay grows as ``(1 + n) / (10 + n)`` to the recipe's, so that short runs forget the start too. It is computed
    in single precision, because torch counts the steps in a tensor.
    """

    def decay(n: int | Tensor) -> float:
        count = torch.as_tensor(n, dtype=torch.int64, device="cpu")
        return min(recipe.ema, float((1 + count).float() / (10 + count).float()))

    return decay


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Make the exponential moving average of the weights, or None if the recipe has none."""
    if not recipe.ema:
        return None
    decay = average_decay(recipe)

    def average(averaged, current, count) -> None:
        get_ema_multi_avg_fn(decay(count))(averaged, current, count)

    with torch.device("cpu"):  # where it counts the steps, whatever the default device
        averaged = AveragedModel(model, multi_avg_fn=average)
    averaged.requires_grad_(False)
    return averaged
