"""Loading batches on the CPU, whatever ``torch.set_default_device`` says, with errors that say the same anywhere."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from hydravit.data.signals import obey_parent, signals_held_back


def load_batches(dataset: Any, *, num_workers: int = 0, **options) -> Iterator:
    """Iterate over a data set's batches; ``options`` are those of ``DataLoader``.

    ``DataLoader`` makes its seed and the labels on the default device, from a generator of the CPU. It also writes a
    worker's traceback into the message of the error that it raises; here the error of a worker is the data set's own.
    The workers end with the iteration, whether it was finished, raised, or was closed or collected.
    """
    if num_workers:
        dataset, options["worker_init_fn"] = _Reporting(dataset), obey_parent
    with torch.device("cpu"), signals_held_back():
        batches: Any = iter(DataLoader(dataset, num_workers=num_workers, collate_fn=_collate, **options))
    _loading.add(batches)
    try:
        for batch in batches:
            if isinstance(batch, _Failure):
                raise batch.error from _WorkerTraceback(batch.traceback)
            yield batch
    finally:
        _loading.remove(batches)
        if num_workers:
            batches._shutdown_workers()  # now, because the traceback of an error can keep the iterator for long


# Iterators that have workers must not become cyclic garbage, which an abandoned loop can be when it ended with an
# error: the garbage collector takes their queues apart first, and then waits five seconds for every worker, which no
# queue can tell to end. It does so in any thread at any time.
_loading: set[Iterator] = set()


class _Failure(NamedTuple):
    """What a worker returns in place of a batch."""

    error: Exception
    traceback: str


class _WorkerTraceback(Exception):
    """The cause of an error that a worker met: where it was raised there."""


class _Reporting(Dataset):
    """A data set whose errors are values, which reach another process as they are."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Any) -> list | _Failure:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        except (ValueError, RuntimeError, OSError) as error:
            if type(error).__module__ != "builtins":
                raise  # not every class of errors can be pickled and read back
            return _Failure(error, traceback.format_exc())


def _collate(items: list | _Failure) -> list | _Failure:
    if isinstance(items, _Failure):
        return items
    with torch.device("cpu"):
        return default_collate(items)
