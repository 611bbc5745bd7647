"""The log of a training for TensorBoard (extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydravit.extras import extra


def check_tensorboard() -> None:
    """Raise ``RuntimeError`` before the work if TensorBoard is missing."""
    with extra("tensorboard", "TensorBoard"):
        import torch.utils.tensorboard  # noqa: F401


class TensorBoard:
    """Writes log entries of epochs as scalars to event files in ``folder``.

    Args:
        done: steps that are done. What an interrupted run wrote about later ones is no longer shown.
        label: what to call a width.
    """

    def __init__(self, folder: Path, done: int, label: Callable[[int], str]):
        with extra("tensorboard", "TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

        self._label = label
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def epoch(self, entry: dict[str, Any]) -> None:
        """Write what the entry says about every width and about all."""
        for name, value in entry.items():
            if isinstance(value, dict):
                for heads, number in value.items():
                    self._writer.add_scalar(f"{name}/{self._label(heads)}", number, entry["step"])
            elif name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
