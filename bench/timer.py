"""Times closures against each other: in turns, in one process, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextlib
import gc
import random
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.results import AGREEMENT

# A measurement whose 80th percentile is above this multiple of its 20th is repeated, and in the end called noisy.
SPREAD = 1.15

_GROUP_MS = 30.0  # calls shorter than this are timed in groups of about this length
_LONG_MS = 100.0  # where all calls are longer, none needs an untimed one before it
_PAUSE_S = 0.005  # the threads of the peer before fall asleep
_WITNESS = object()  # its name among the closures
_FIFTHS = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


class Effort(NamedTuple):
    """How much to measure: at least ``rounds``, more (up to ``most``) while fewer than ``seconds`` have passed; all of
    it up to ``attempts`` times while spreads are above ``SPREAD``, but not again where that would take longer than
    ``patience`` seconds together, or after ``deadline`` (monotonic)."""

    rounds: int = 7
    most: int = 30
    seconds: float = 20.0
    attempts: int = 3
    patience: float = 120.0
    deadline: float = float("inf")


class Times(NamedTuple):
    """Milliseconds of a call. ``samples``: one per round, all closures in the same rounds. ``wall``: on a GPU, those
    of one call and the wait for it, on the host's clock; elsewhere empty. ``witness``: the median of the witness in
    these rounds, None without one."""

    samples: list[float]
    wall: list[float]
    attempts: int
    witness: float | None = None


class Witness:
    """A fixed piece of work on the CPU, a few milliseconds of products with weights larger than most caches, timed in
    every round of a run: it tells when the machine was slower than at other times, steadily and for all."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(64, 768, generator=generator)
        self._weights = torch.randn(5, 768, 3072, generator=generator)
        self.best = float("inf")  # the least median so far, ms

    def __call__(self) -> None:
        for weight in self._weights:
            torch.mm(self._x, weight)

    def note(self, samples: list[float]) -> float:
        """Their median."""
        _, median, _ = quantiles(samples)
        self.best = min(self.best, median)
        return median

    def slow(self, median: float | None) -> bool:
        return median is not None and median > AGREEMENT * self.best


class Broken(Exception):
    """A closure, called ``name``, raised while it was timed; the cause is what it raised."""

    def __init__(self, name: Hashable):
        super().__init__(f"{name} broke while it was timed")
        self.name = name


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(_FIFTHS).tolist())


def spread(values: list[float]) -> float:
    """80th percentile by 20th."""
    p20, _, p80 = quantiles(values)
    return p80 / p20


def interleave(
    closures: dict[Hashable, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    *,
    cold: bool = False,
    witness: Witness | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[Hashable, Times]:
    """Times of every closure, under its name. ``cold``: with the processor's caches flushed before every call.

    A round samples each closure once: one call, or a group of short ones; every round in another order. An attempt is
    all closures' rounds, so that all were measured in the same minutes; the calmest attempt (smallest sum of spreads,
    of those in which the witness was not slow) is the result. Raises ``Broken`` if a closure raises.
    """
    if not closures:
        return {}
    sampler = _GpuSampler(device, cold) if device.type == "cuda" else _CpuSampler(cold)
    attempts = []
    if witness is not None:
        closures = {**closures, _WITNESS: witness}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on whoever runs then
    try:
        estimates = {}
        for name, run in closures.items():
            with _named(name):
                run()  # pages, thread pools, clocks
                estimates[name] = sampler.estimate(run)
        warm = not cold and min(ms for name, ms in estimates.items() if name is not _WITNESS) < _LONG_MS
        calls = {name: 1 if cold else max(1, round(_GROUP_MS / estimate)) for name, estimate in estimates.items()}
        start = time.monotonic()
        while True:
            times = _attempt(closures, calls, warm, sampler, effort, progress)
            if witness is not None:
                median = witness.note(times.pop(_WITNESS).samples)
                times = {name: found._replace(witness=median) for name, found in times.items()}
            attempts.append(times)
            slow, _ = _disturbance(times, witness)
            calm = not slow and max(spread(found.samples) for found in times.values()) <= SPREAD
            done, now = len(attempts), time.monotonic()
            again = (now - start) * (done + 1) / done  # how long all would have taken with one more
            if calm or done >= effort.attempts or again > effort.patience or now > effort.deadline:
                break
            progress("too noisy, again: ")
    finally:
        if was_enabled:
            gc.enable()
    calmest = min(attempts, key=lambda attempt: _disturbance(attempt, witness))
    return {name: times._replace(attempts=len(attempts)) for name, times in calmest.items()}


def _disturbance(attempt: dict[Hashable, Times], witness: Witness | None) -> tuple[bool, float]:
    """Whether the machine was slow, then the sum of spreads."""
    slow = witness is not None and witness.slow(next(iter(attempt.values())).witness)
    return slow, sum(spread(times.samples) for times in attempt.values())


@contextlib.contextmanager
def _named(name: Hashable) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Broken(name) from error


def _attempt(closures, calls, warm, sampler, effort, progress) -> dict[Hashable, Times]:
    result = {name: Times([], [], 1) for name in closures}
    order, shuffle = list(closures), random.Random(0)
    start = time.monotonic()
    for done in range(effort.most):
        now = time.monotonic()
        if done >= effort.rounds and (now - start > effort.seconds or now > effort.deadline):
            break
        progress(f"round {done + 1}")
        shuffle.shuffle(order)
        for name in order:
            time.sleep(_PAUSE_S)
            with _named(name):
                sampler.sample(closures[name], calls[name], warm, result[name])
    return result


class _CpuSampler:
    def __init__(self, cold: bool):
        self._flush = torch.empty(_cache_bytes() * 2, dtype=torch.uint8) if cold else None

    def estimate(self, run: Callable) -> float:
        """Milliseconds of a warm call, roughly."""
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def sample(self, run: Callable, calls: int, warm: bool, times: Times) -> None:
        if self._flush is not None:
            self._flush.add_(1)
            time.sleep(_PAUSE_S)  # or torch's threads would be awake for those who use them
        if warm:
            run()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.samples.append((time.perf_counter() - start) * 1e3 / calls)


class _GpuSampler:
    """By the GPU's own events; nothing waits inside a group."""

    def __init__(self, device: torch.device, cold: bool):
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(properties.L2_cache_size * 2, dtype=torch.uint8, device=device) if cold else None
        self._device = device

    def estimate(self, run: Callable) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) * 1e3

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
    """The largest cache of this processor; a generous guess where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=64 * 2**20)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A closure that replays ``run`` as one CUDA graph and returns what the captured call returned.

    Raises for what cannot be captured, also where nothing was: work on other streams leaves an empty graph.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), warnings.catch_warnings():  # the stream comes back also from a failed capture
        warnings.filterwarnings("error", message=".*CUDA Graph is empty")
        for _ in range(3):
            run()
        torch._C._cuda_clearCublasWorkspaces()  # the graph gets one in its own memory, which nobody frees
        try:
            with torch.cuda.graph(graph, stream=stream):
                output = run()
        except Exception:
            with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.ones(1, device=device)  # a capture that ends well: the generator is free again
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.current_stream(device).wait_stream(stream)

    def replay():
        graph.replay()
        return output

    return replay
