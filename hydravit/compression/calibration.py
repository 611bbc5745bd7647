"""What a trained model computes for some images, and how its answers depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from hydravit.data.loading import load_batches
from hydravit.evaluation.accuracy import SizedDataset
from hydravit.model import HydraViT
from hydravit_kernels import Subnetwork

Batches = Iterable[tuple[Tensor, Tensor]]


class CalibrationImages:
    """Some images of a data set, in batches: the same ones in the same order in every pass.

    Args:
        dataset: items ``(image (C, H, W) float32, label)``, without augmentation.
        count: how many images to draw; all, if the data set has fewer.
        seed: of the drawing.
        progress: whether to show the progress of every pass.
    Raises:
        ValueError: an empty data set, or a ``count`` or ``batch_size`` below 1.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        count: int = 1024,
        *,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        progress: bool = False,
    ):
        if len(dataset) == 0:
            raise ValueError("dataset is empty")
        for name, value in (("count", count), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        order = torch.randperm(len(dataset), generator=generator, dtype=torch.int64, device="cpu")
        self._dataset = Subset(cast("Dataset", dataset), order[:count].tolist())
        self._options = {"batch_size": batch_size, "num_workers": num_workers}
        self._progress = progress

    def __len__(self) -> int:
        """The number of batches."""
        return math.ceil(len(self._dataset) / self._options["batch_size"])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = load_batches(self._dataset, **self._options)
        yield from tqdm(
            batches, desc="calibrate", unit="batch", total=len(self), disable=not self._progress, leave=False
        )


class Activation(NamedTuple):
    """The output of a module for one batch, and the gradient of the objective with respect to it, in float64."""

    value: Tensor
    gradient: Tensor


def activations(
    model: HydraViT,
    batches: Batches,
    names: Sequence[str],
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    heads: int | Subnetwork,
) -> Iterator[dict[str, Activation]]:
    """Run one width of a model and yield, batch by batch, the activations of the modules of these names.

    Args:
        objective: of the logits and the labels, a sum over the images of the batch.
    Raises:
        ValueError: there are no batches, or labels that the model has no class for.
        RuntimeError: the objective is not finite.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    weight, empty = next(model.parameters()), True
    try:
        for images, labels in batches:
            if not 0 <= labels.min() <= labels.max() < model.num_classes:
                raise ValueError(f"labels must be in 0..{model.num_classes - 1}, but one is {_outside(labels, model)}")
            images, labels = images.to(weight.device, weight.dtype), labels.to(weight.device)
            with torch.enable_grad():
                # Where all parameters are frozen, only images that need a gradient give the outputs one.
                value = objective(model(images.detach().requires_grad_(), heads=heads), labels)
            if not value.isfinite():
                width = heads.heads if isinstance(heads, Subnetwork) else heads
                raise RuntimeError(f"heads={width}: the model's logits are not finite")
            gradients = torch.autograd.grad(value, [outputs[name] for name in names])
            yield {
                name: Activation(outputs[name].detach().double(), gradient.double())
                for name, gradient in zip(names, gradients, strict=True)
            }
            empty = False
    finally:
        for hook in hooks:
            hook.remove()
    if empty:
        raise ValueError("batches: there are none; several passes need a list, a DataLoader or CalibrationImages")


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The objective of WPAC: the sum of the labels' own logits."""
    return logits.gather(1, labels[:, None]).sum()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The objective of Fisher information: the sum of the images' cross entropies."""
    return F.cross_entropy(logits, labels, reduction="sum")


def slopes(activation: Activation) -> Tensor:
    """Return the derivatives ``(B, channels)`` of each image's loss by a factor, 1, before each channel."""
    products = activation.value * activation.gradient
    return products.reshape(len(products), -1, products.shape[-1]).sum(1)


def _outside(labels: Tensor, model: HydraViT) -> int:
    return int(labels.min() if labels.min() < 0 else labels.max())
