"""Loading batches on the CPU, whatever ``torch.set_default_device`` says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate


def load_batches(dataset: Any, **options) -> Iterator:
    """Iterate over a data set's batches; ``options`` are those of ``DataLoader``.

    ``DataLoader`` makes its seed and the labels on the default device, from a generator of the CPU.
    """
    with torch.device("cpu"):
        return iter(DataLoader(dataset, collate_fn=_collate, **options))


def _collate(items: list) -> list:
    with torch.device("cpu"):
        return default_collate(items)
