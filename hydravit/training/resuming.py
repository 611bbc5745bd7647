"""Files from which training resumes, and signals that stop training when it can write one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from hydravit.atomic import atomic_write

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
    atomic_write(path, lambda file: torch.save(content, file))


def load_state(path: str | os.PathLike, identity: dict) -> dict:
    """Read the state in ``path``, on the CPU. Only tensors and plain values are read, never code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no training state, or it belongs to another run; the message names the first
            field of ``identity`` that differs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise ValueError(f"{path}: damaged, or no training checkpoint ({type(error).__name__}: {error})") from error
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
