"""Batches whose order depends on seed and epoch only, so that training can stop after any batch and go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hydravit.data.loading import load_batches


class _Batch(NamedTuple):
    seed: int
    indices: list[int]


class _Seeded(Dataset):
    """Seeds the augmentation of each batch, so that any process may make it, in any order."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, batch: _Batch) -> list:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(batch.seed)
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(batch.indices)
            return [self.dataset[i] for i in batch.indices]


class Batches:
    """Shuffled batches of a data set; every rank of a distributed run gets its own part, all of one size.

    A last batch that is not full is left out, unless it is the only one. Augmentation may draw from torch's global CPU
    generator, which is seeded for each batch and restored after it.

    Raises:
        ValueError: the data set has fewer items than there are ranks.
    """

    def __init__(self, dataset, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1, workers: int = 0):
        if len(dataset) < world:
            raise ValueError(f"the data set has {len(dataset)} items for {world} rank(s)")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.workers = rank, world, workers

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(len(self.dataset) // self.world // self.batch_size, 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Make the batches ``start``, ``start + 1``, ... of an epoch: float images ``(B, C, H, W)`` and labels.

        uint8 images are divided by 255.
        """
        random = torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.dataset), generator=random, dtype=torch.int64, device="cpu")[
            self.rank :: self.world
        ]
        indices = order[: len(self.dataset) // self.world].tolist()
        draws = torch.randint(2**62, (len(self) * self.world,), generator=random, dtype=torch.int64, device="cpu")
        seeds = draws[self.rank :: self.world].tolist()
        size = self.batch_size
        batches = [_Batch(seeds[i], indices[i * size : (i + 1) * size]) for i in range(start, len(self))]
        loader = load_batches(
            _Seeded(self.dataset),
            batch_sampler=batches,  # a batch is its indices and its seed
            num_workers=self.workers,
            generator=torch.Generator(
                device="cpu"
            ),  # for the workers' seed: without it the loader draws from the global one
        )
        for images, labels in loader:
            yield images.float() / 255 if images.dtype == torch.uint8 else images, labels
