"""The accuracy of a model at every width, and the interval that contains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from hydravit.data.loading import load_batches
from hydravit.model import HydraViT


class SizedDataset(Protocol):
    """A data set ``(image, label)`` that knows its length; torch's ``Dataset`` need not."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@torch.inference_mode()
def accuracy(
    model: HydraViT,
    dataset: SizedDataset,
    heads: Sequence[int],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> dict[int, tuple[float, float]]:
    """Compute top-1 and top-5 in percent per width, reading each image once. Errors are those of ``evaluate``."""
    if len(dataset) == 0:
        raise ValueError("dataset is empty")
    if model.num_classes == 0:
        raise ValueError("the model has no classifier (num_classes=0)")
    parameter = next(model.parameters())
    correct = {k: torch.zeros(2, dtype=torch.int64, device="cpu") for k in heads}
    batches = load_batches(dataset, batch_size=batch_size, num_workers=num_workers)
    total = math.ceil(len(dataset) / batch_size)
    for images, labels in tqdm(batches, desc="evaluate", unit="batch", total=total, disable=not progress, leave=False):
        if labels.max() >= model.num_classes:
            raise ValueError(f"label {int(labels.max())} in the data, but the model has {model.num_classes} classes")
        images = images.to(parameter.device, parameter.dtype)
        for k in heads:
            logits = model(images, heads=k).cpu()
            if not logits.isfinite().all():
                raise RuntimeError(f"heads={k}: the model's logits are not finite")
            hits = logits.topk(min(5, model.num_classes), dim=1).indices == labels[:, None]
            correct[k] += torch.stack((hits[:, 0].sum(), hits.sum()))
    return {k: tuple(((100 * counts).float() / len(dataset)).tolist()) for k, counts in correct.items()}


def interval(percent: float, count: int) -> tuple[float, float]:
    """Compute the 95 % interval of an accuracy in ``percent`` that was found on ``count`` images (Wilson, 1927).

    It stays inside 0..100 and is not symmetric near the ends, unlike the normal approximation.
    """
    z = 1.959964
    p = percent / 100
    middle = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 100 / (1 + z * z / count)
    return max(scale * (middle - spread), 0.0), min(scale * (middle + spread), 100.0)
