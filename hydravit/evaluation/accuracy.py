"""How often a model is right at every width, and how sure that number is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from hydravit.model import HydraViT


@torch.inference_mode()
def accuracy(
    model: HydraViT,
    dataset: torch.utils.data.Dataset,
    heads: Sequence[int],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent per width. Every image is read once, for all widths. Errors as in ``evaluate``."""
    if len(dataset) == 0:
        raise ValueError("dataset is empty")
    if model.num_classes == 0:
        raise ValueError("the model has no classifier (num_classes=0)")
    parameter = next(model.parameters())
    correct = {k: torch.zeros(2, dtype=torch.int64) for k in heads}
    batches: Iterable = DataLoader(dataset, batch_size, num_workers=num_workers)
    for images, labels in tqdm(batches, desc="evaluate", unit="batch", disable=not progress, leave=False):
        if labels.max() >= model.num_classes:
            raise ValueError(f"label {int(labels.max())} in the data, but the model has {model.num_classes} classes")
        images = images.to(parameter.device, parameter.dtype)
        for k in heads:
            logits = model(images, heads=k).cpu()
            if not logits.isfinite().all():
                raise RuntimeError(f"heads={k}: the model's logits are not finite")
            hits = logits.topk(min(5, model.num_classes), dim=1).indices == labels[:, None]
            correct[k] += torch.stack((hits[:, 0].sum(), hits.sum()))
    return {k: tuple((100 * counts / len(dataset)).tolist()) for k, counts in correct.items()}


def interval(percent: float, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy in ``percent`` that was found on ``count`` images (Wilson's, 1927).

    It stays inside 0..100 and is not symmetric near the ends, unlike the normal approximation.
    """
    z = 1.959964
    p = percent / 100
    middle = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 100 / (1 + z * z / count)
    return max(scale * (middle - spread), 0.0), min(scale * (middle + spread), 100.0)
