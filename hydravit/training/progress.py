"""How far a training is, on standard error: a bar on a terminal; in a file or the log of a job a line per epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows the steps of a training with the time that is left. In a ``with`` block, because it clears its bar.

    Args:
        epochs, steps: of the whole training.
        done: steps that earlier runs have done.
        label: what to call a width.
        shown: whether to show anything.
        clock: a clock in seconds.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        done: int,
        label: Callable[[int], str],
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._epochs, self._steps, self._label, self._clock = epochs, steps, label, clock
        self._seen, self._time = done, clock()  # of the last epoch's end
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._bar = tqdm(total=steps, initial=done, unit="step", leave=False, disable=not (shown and terminal))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def step(self, epoch: int, loss: float, heads: object) -> None:
        """Note that a step of ``epoch``, counted from 1, is done."""
        self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix(loss=f"{loss:.3f}", k=heads if isinstance(heads, int) else "mixed", refresh=False)
        self._bar.update()

    def epoch(self, entry: dict[str, Any]) -> None:
        """Show the log entry of an epoch: its line, or on a terminal its validation only."""
        tops = [
            f"top-1 at {self._label(heads)} {top1:.2f} %" for heads, top1 in entry.get("validation_top1", {}).items()
        ]
        if self._lines:
            facts, done, now = [f"loss {entry['loss']:.4f}", *tops], entry["step"] - self._seen, self._clock()
            if done:  # an earlier run may have stopped after the last step of an epoch
                per_step = (now - self._time) / done  # of this epoch, because the first one is slower than the others
                left = tqdm.format_interval(per_step * (self._steps - entry["step"]))
                facts += [f"{entry['images_per_second']:.0f} images/s", f"{left} left"]
            self._seen, self._time = entry["step"], now
            print(f"epoch {entry['epoch']}/{self._epochs}: {', '.join(facts)}", file=sys.stderr, flush=True)
        elif tops and not self._bar.disable:
            tqdm.write(f"epoch {entry['epoch']}: {', '.join(tops)}", file=sys.stderr)
