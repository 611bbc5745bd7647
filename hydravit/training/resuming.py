"""Files from which training resumes, and signals that stop training when it can write one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from hydravit.atomic import atomic_write
from hydravit.checkpoint.formats import METADATA, read_file, write_torch

_FORMAT = 2
# A resumed run may train longer than the interrupted one, or so that the loss stays finite. Its data may have moved:
# classes and the number of images have to be the same.
CHANGEABLE = frozenset(
    f"recipe.{name}"
    for name in "epochs cooldown_epochs lr min_lr warmup_lr warmup_epochs weight_decay clip_norm amp data".split()
)


def save_state(path: str | os.PathLike, state: dict, identity: dict, metadata: dict) -> None:
    """Write the state of a training run, whole or not at all.

    Args:
        state: tensors and plain values in dicts and lists.
        identity: plain values in which the resumed run must agree: recipe, model, data.
        metadata: what ``hydravit.checkpoint.model_metadata`` returns: it makes the file a checkpoint of the model.
    Raises:
        OSError: the file could not be written; an older file at ``path`` is then unchanged.
    """
    content = {"format": _FORMAT, METADATA: metadata, "identity": identity, "state": state}
    atomic_write(path, lambda file: write_torch(content, file))


def load_state(path: str | os.PathLike, identity: dict, *, verify: bool = True) -> tuple[dict, dict[str, list]]:
    """Read the state in ``path``, on the CPU. Only tensors and plain values are read, never code.

    Args:
        verify: whether to check the file's checksums.
    Returns:
        The state, and the fields in ``CHANGEABLE`` that differ, each with its value in the file and in ``identity``.
    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or no training state, or it belongs to another run; the message names the first
            field of ``identity`` that differs.
    """
    content, _ = read_file(path, verify=verify)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "state" not in content:
        raise ValueError(f"{path}: no training checkpoint of this version")
    changed = {}
    for name, saved, wanted in _differences(content["identity"], identity):
        if name not in CHANGEABLE:
            raise ValueError(
                f"{path}: cannot resume, {name} was {saved!r} in the interrupted run and is {wanted!r} now"
            )
        changed[name.removeprefix("recipe.")] = [saved, wanted]
    return content["state"], changed


def _differences(saved: dict, wanted: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Iterate over ``(dotted name, saved, wanted)`` of the fields that differ."""
    for key in [*saved, *(key for key in wanted if key not in saved)]:
        a, b = saved.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


class Interrupt:
    """In a ``with`` block, SIGINT and SIGTERM only set ``signal``; a second SIGINT stops the program."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}  # handlers

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
