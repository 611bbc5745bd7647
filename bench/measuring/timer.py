"""Times closures against each other: in turns, in one process, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from bench.measuring.clock import SYSTEM, Clock
from bench.measuring.samplers import CpuSampler, GpuSampler, Times
from bench.rows import AGREEMENT

# A measurement whose 80th percentile is above this multiple of its 20th is repeated, and in the end called noisy.
SPREAD = 1.15

_GROUP_MS = 30.0  # calls shorter than this are timed in groups of about this length
_LONG_MS = 100.0  # where all calls are longer, none needs an untimed one before it
_PAUSE_S = 0.005  # in this time the threads of the peer before fall asleep
_WITNESS = object()  # the witness's name among the closures
_FIFTHS = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)

Closures = Mapping[Any, Callable[[], object]]  # by names of the caller's choice
Attempt = dict[Any, Times]


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(_FIFTHS).tolist())


def spread(values: list[float]) -> float:
    """The 80th percentile by the 20th."""
    p20, _, p80 = quantiles(values)
    return p80 / p20


class Effort(NamedTuple):
    """How much to measure.

    An attempt has at least ``rounds`` rounds, and more (up to ``most``) while fewer than ``seconds`` have passed. While
    spreads are above ``SPREAD`` there are up to ``attempts`` attempts, but no further one that would end more than
    ``patience`` seconds after the first began, and none after ``deadline`` (a moment of the timer's clock).
    """

    rounds: int = 7
    most: int = 30
    seconds: float = 20.0
    attempts: int = 3
    patience: float = 120.0
    deadline: float = float("inf")


class Witness:
    """A fixed piece of work on the CPU: a few milliseconds of products with weights larger than most caches.

    It is timed in every round of a run. It shows that the machine was slower than at other times, for all and steadily,
    which no spread shows.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(64, 768, generator=generator)
        self._weights = torch.randn(5, 768, 3072, generator=generator)
        self.best = float("inf")  # the least median so far, ms

    def __call__(self) -> None:
        for weight in self._weights:
            torch.mm(self._x, weight)

    def note(self, samples: list[float]) -> float:
        """Keep the best median; returns that of ``samples``."""
        _, median, _ = quantiles(samples)
        self.best = min(self.best, median)
        return median

    def slow(self, median: float | None) -> bool:
        return median is not None and median > AGREEMENT * self.best


class Broken(Exception):
    """The closure ``name`` raised while it was timed; the cause is what it raised."""

    def __init__(self, name: Any):
        super().__init__(f"{name} broke while it was timed")
        self.name = name


class Timer(NamedTuple):
    """Measures times. ``progress`` is told what happens, for a person who waits."""

    device: torch.device
    effort: Effort = Effort()
    clock: Clock = SYSTEM
    witness: Witness | None = None
    progress: Callable[[str], None] = lambda text: None

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.clock.now() >= self.effort.deadline

    def interleave(self, closures: Closures, *, cold: bool = False) -> Attempt:
        """Times of every closure, under its name. ``cold``: the processor's caches are flushed before every call.

        A round samples each closure once, one call or a group of short calls, and every round goes through the closures
        in another order. An attempt is the rounds of all closures, so that all are measured in the same minutes. The
        result is the calmest attempt: the smallest sum of spreads, among the attempts in which the witness was not
        slow. Raises ``Broken`` if a closure raises.
        """
        if not closures:
            return {}
        if self.witness is not None:
            closures = {**closures, _WITNESS: self.witness}
        sampler = (GpuSampler if self.device.type == "cuda" else CpuSampler)(self.device, self.clock, cold)
        with _without_garbage_collection():
            estimates = {}
            for name, run in closures.items():
                with _named(name):
                    run()  # it gets its pages and thread pools, and the clock goes up
                    estimates[name] = sampler.estimate(run)
            shortest = min(ms for name, ms in estimates.items() if name is not _WITNESS)
            warm = not cold and shortest < _LONG_MS
            calls = {name: 1 if cold else max(1, round(_GROUP_MS / ms)) for name, ms in estimates.items()}

            def sample(name: Hashable, times: Times) -> None:
                with _named(name):
                    sampler.sample(closures[name], calls[name], warm, times)

            attempts = self._attempts(list(closures), sample)
        calmest = min(attempts, key=self._disturbance)
        return {name: times._replace(attempts=len(attempts)) for name, times in calmest.items()}

    def _attempts(self, names: list[Hashable], sample: Callable[[Hashable, Times], None]) -> list[Attempt]:
        attempts, start = [], self.clock.now()
        while True:
            times = self._rounds(names, sample)
            if self.witness is not None:
                median = self.witness.note(times.pop(_WITNESS).samples)
                times = {name: found._replace(witness=median) for name, found in times.items()}
            attempts.append(times)
            slow, _ = self._disturbance(times)
            calm = not slow and max(spread(found.samples) for found in times.values()) <= SPREAD
            done, effort = len(attempts), self.effort
            with_one_more = (self.clock.now() - start) * (done + 1) / done
            if calm or done >= effort.attempts or with_one_more > effort.patience or self.late():
                return attempts
            self.progress("too noisy, again: ")

    def _rounds(self, names: list[Hashable], sample: Callable[[Hashable, Times], None]) -> Attempt:
        result = {name: Times([], []) for name in names}
        order, shuffle = list(names), random.Random(0)
        start = self.clock.now()
        for done in range(self.effort.most):
            enough = self.clock.now() - start > self.effort.seconds or self.late()
            if done >= self.effort.rounds and enough:
                break
            self.progress(f"round {done + 1}")
            shuffle.shuffle(order)
            for name in order:
                self.clock.sleep(_PAUSE_S)
                sample(name, result[name])
        return result

    def _disturbance(self, attempt: Attempt) -> tuple[bool, float]:
        """Whether the machine was slow, then the sum of spreads: the smaller, the calmer."""
        slow = self.witness is not None and self.witness.slow(next(iter(attempt.values())).witness)
        return slow, sum(spread(times.samples) for times in attempt.values())


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A collection would burden the closure that happens to run then."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _named(name: Hashable) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Broken(name) from error
