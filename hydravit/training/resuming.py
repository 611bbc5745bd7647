"""Files from which training resumes, and signals that stop training when it can write one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from hydravit.atomic import atomic_write
from hydravit.checkpoint.formats import read_file, write_torch

_FORMAT = 1


def save_state(path: str | os.PathLike, state: dict, identity: dict) -> None:
    """Write the state of a training run, whole or not at all.

    Args:
        state: tensors and plain values in dicts and lists.
        identity: plain values in which the resumed run must agree: recipe, model, data.
    Raises:
        OSError: the file could not be written; an older file at ``path`` is then unchanged.
    """
    content = {"format": _FORMAT, "identity": identity, "state": state}
    atomic_write(path, lambda file: write_torch(content, file))


def load_state(path: str | os.PathLike, identity: dict, *, verify: bool = True) -> dict:
    """Read the state in ``path``, on the CPU. Only tensors and plain values are read, never code.

    Args:
        verify: whether to check the file's checksums.
    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or no training state, or it belongs to another run; the message names the first
            field of ``identity`` that differs.
    """
    content, _ = read_file(path, verify=verify)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "state" not in content:
        raise ValueError(f"{path}: no training checkpoint of this version")
    difference = _first_difference(content["identity"], identity)
    if difference:
        name, saved, wanted = difference
        raise ValueError(f"{path}: cannot resume, {name} was {saved!r} in the interrupted run and is {wanted!r} now")
    return content["state"]


def _first_difference(saved: dict, wanted: dict, prefix: str = "") -> tuple | None:
    """Return ``(dotted name, saved, wanted)`` of the first field that differs, or None."""
    for key in [*saved, *(key for key in wanted if key not in saved)]:
        a, b = saved.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _first_difference(a, b, f"{prefix}{key}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{key}", a, b
    return None


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
