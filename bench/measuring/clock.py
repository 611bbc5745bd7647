"""The clock that timing and deadlines read. Tests pass one of their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    def sleep(self, seconds: float) -> None:
        """Returns after ``seconds``."""


class SystemClock:
    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)


SYSTEM = SystemClock()
