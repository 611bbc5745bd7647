"""The timer on a clock of its own: turns, groups, repeats of noisy attempts, and when it stops."""

import itertools

import pytest
import torch
from fake_clock import FakeClock

from bench.measuring.timer import SPREAD, Broken, Effort, Timer, Witness, spread

CPU = torch.device("cpu")


@pytest.fixture
def clock():
    return FakeClock()


def lasting(clock, *seconds):
    """A closure whose calls last ``seconds`` one after the other, the last of them for ever."""
    durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))
    return lambda: clock.sleep(next(durations))


def test_closures_take_turns_and_short_ones_go_in_groups(clock):
    calls = []

    def call(name, seconds):
        def run():
            calls.append(name)
            clock.sleep(seconds)

        return run

    closures = {"long": call("long", 0.12), "short": call("short", 0.005)}
    times = Timer(CPU, Effort(3, 3, 0.0, 1), clock).interleave(closures)
    assert times["long"].samples == pytest.approx([120] * 3)
    assert times["short"].samples == pytest.approx([5] * 3)
    assert calls[:4] == ["long", "long", "short", "short"]  # to warm up and to estimate
    rounds = [calls[start : start + 9] for start in range(4, len(calls), 9)]
    long, short = ["long"] * 2, ["short"] * 7  # each with an untimed call first
    assert len(rounds) == 3 and all(found in (long + short, short + long) for found in rounds)


def test_a_noisy_attempt_is_repeated_until_it_is_calm(clock):
    noisy = [0.12, 0.2] * 3
    run = lasting(clock, 0.12, 0.12, *noisy, 0.12)
    times = Timer(CPU, Effort(6, 6, 0.0, 3), clock).interleave({"restless": run})["restless"]
    assert times.attempts == 2 and times.samples == pytest.approx([120] * 6)


def test_the_calmest_attempt_counts_where_none_is_calm(clock):
    attempts = [0.12, 0.24] * 2, [0.12, 0.18] * 2, [0.12, 0.3] * 2
    run = lasting(clock, 0.12, 0.12, *itertools.chain(*attempts))
    times = Timer(CPU, Effort(4, 4, 0.0, 3), clock).interleave({"restless": run})["restless"]
    assert times.attempts == 3 and times.samples == pytest.approx([120, 180] * 2)
    assert spread(times.samples) > SPREAD


def test_no_attempt_is_begun_that_would_need_too_much_patience(clock):
    """An attempt takes 0.33 s: after two of them a third ends before a second has passed, a fourth would not."""
    run = lasting(clock, 0.12, 0.12, *[0.12, 0.2] * 10)
    effort = Effort(2, 2, 0.0, attempts=10, patience=1.0)
    assert Timer(CPU, effort, clock).interleave({"restless": run})["restless"].attempts == 3


@pytest.mark.parametrize(("rounds", "most", "expected"), [(2, 10, 5), (2, 3, 3), (7, 10, 7)])
def test_rounds_go_on_while_seconds_are_left(clock, rounds, most, expected):
    """A round takes 0.205 s, so that a second has passed after five."""
    run = {"call": lasting(clock, 0.2)}
    times = Timer(CPU, Effort(rounds, most, 1.0, 1), clock).interleave(run)["call"]
    assert len(times.samples) == expected


def test_the_deadline_ends_rounds_and_attempts(clock):
    run = {"restless": lasting(clock, 0.12, 0.2, 0.12, 0.2)}
    times = Timer(CPU, Effort(2, 1000, 60.0, 50, deadline=0.0), clock).interleave(run)["restless"]
    assert len(times.samples) == 2 and times.attempts == 1


def test_cold_calls_go_alone(clock):
    calls = []

    def run():
        calls.append(clock.now())
        clock.sleep(0.002)

    times = Timer(CPU, Effort(3, 3, 0.0, 1), clock).interleave({"call": run}, cold=True)["call"]
    assert times.samples == pytest.approx([2.0] * 3)
    assert len(calls) == 2 + 3  # to warm up and to estimate, then one in every round


@pytest.mark.parametrize(("milliseconds", "slow"), [((40, 10, 10), False), ((40, 40, 40), True)])
def test_an_attempt_while_the_machine_was_slow_is_repeated_and_counts_only_if_all_were(clock, milliseconds, slow):
    left = list(milliseconds)  # of a call of the witness, per attempt

    class Scripted(Witness):
        def __call__(self):
            clock.sleep(left[0] / 1e3)

    def progress(text):
        if text.startswith("too noisy"):
            left.pop(0)

    witness = Scripted()
    witness.best = 10.0
    timer = Timer(CPU, Effort(3, 3, 0.0, 2), clock, witness, progress)
    times = timer.interleave({"call": lasting(clock, 0.002)})["call"]
    assert times.attempts == 2 and witness.slow(times.witness) == slow


def test_the_witness_works():
    witness = Witness()
    witness()
    assert not witness.slow(None)
    assert witness.note([2.0, 3.0, 4.0]) == witness.best == 3.0 and witness.note([4.0]) == 4.0
    assert witness.slow(4.0) and not witness.slow(3.2)


def test_a_closure_that_raises_is_named(clock):
    def breaks():
        raise MemoryError("no more")

    with pytest.raises(Broken) as raised:
        Timer(CPU, Effort(), clock).interleave({"calm": lasting(clock, 0.1), "breaks": breaks})
    assert raised.value.name == "breaks" and isinstance(raised.value.__cause__, MemoryError)


def test_nothing_to_time(clock):
    assert Timer(CPU, Effort(), clock).interleave({}) == {}
