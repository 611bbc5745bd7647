"""How one sample of a closure is taken: on a CPU by the clock, on a GPU by its own events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.measuring.clock import Clock

_PAUSE_S = 0.005  # after the flush torch's threads would still be awake for a peer that uses them


class Times(NamedTuple):
    """Milliseconds of a call. ``samples``: one per round, for all closures in the same rounds. ``wall``: on a GPU, one
    call and the wait for it by the host's clock; elsewhere empty. ``witness``: the median of the witness in these
    rounds, None without one."""

    samples: list[float]
    wall: list[float]
    attempts: int = 1
    witness: float | None = None


class CpuSampler:
    def __init__(self, device: torch.device, clock: Clock, cold: bool):
        self._clock = clock
        self._flush = torch.empty(_cache_bytes() * 2, dtype=torch.uint8) if cold else None

    def estimate(self, run: Callable) -> float:
        """Milliseconds of a warm call, roughly."""
        return self._milliseconds(run, 1)

    def sample(self, run: Callable, calls: int, warm: bool, times: Times) -> None:
        if self._flush is not None:
            self._flush.add_(1)
            self._clock.sleep(_PAUSE_S)
        if warm:
            run()
        times.samples.append(self._milliseconds(run, calls))

    def _milliseconds(self, run: Callable, calls: int) -> float:
        start = self._clock.now()
        for _ in range(calls):
            run()
        return (self._clock.now() - start) * 1e3 / calls


class GpuSampler:
    """Nothing waits inside a group of calls."""

    def __init__(self, device: torch.device, clock: Clock, cold: bool):
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(properties.L2_cache_size * 2, dtype=torch.uint8, device=device) if cold else None
        self._device, self._clock = device, clock

    def estimate(self, run: Callable) -> float:
        """Milliseconds of a warm call and the wait for it."""
        torch.cuda.synchronize(self._device)
        start = self._clock.now()
        run()
        torch.cuda.synchronize(self._device)
        return (self._clock.now() - start) * 1e3

    def sample(self, run: Callable, calls: int, warm: bool, times: Times) -> None:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self._flush is not None:
            self._flush.add_(1)
        if warm:
            run()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        torch.cuda.synchronize(self._device)
        times.samples.append(start.elapsed_time(stop) / calls)
        if self._flush is None:
            times.wall.append(self.estimate(run))


def _cache_bytes() -> int:
    """Size of this processor's largest cache; a generous guess where the system does not tell it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=64 * 2**20)
