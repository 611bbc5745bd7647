"""What a training shows, on a terminal and elsewhere."""

import io
import sys

import pytest
from fake_clock import FakeClock

from hydravit.training.progress import Progress

ENTRY = {"epoch": 3, "step": 30, "loss": 1.25, "images_per_second": 512.4}


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def shown(monkeypatch, terminal, entry=ENTRY, **options):
    """What the steps 21 to 30 of 100 and their epoch write, a second each."""
    clock, stream = FakeClock(), Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10, 100, 20, "{} heads".format, clock=clock.now, **options) as progress:
        for _ in range(10):
            clock.sleep(1.0)
            progress.step(3, 1.25, 2)
        progress.epoch(entry)
    return stream.getvalue()


def test_elsewhere_a_line_per_epoch(monkeypatch):
    """The time that is left is judged by the steps of this run, not by those of an earlier one."""
    assert shown(monkeypatch, False) == "epoch 3/10: loss 1.2500, 512 images/s, 01:10 left\n"
    validated = ENTRY | {"validation_top1": {1: 40.0, 4: 62.5}}
    line = "epoch 3/10: loss 1.2500, top-1 at 1 heads 40.00 %, top-1 at 4 heads 62.50 %, 512 images/s, 01:10 left\n"
    assert shown(monkeypatch, False, validated) == line


def test_the_time_that_is_left_is_judged_by_the_last_epoch(monkeypatch):
    """The first one is slower: it allocates, compiles and reads files that nothing has cached."""
    clock, stream = FakeClock(), Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10, 100, 20, "{} heads".format, clock=clock.now) as progress:
        for epoch, seconds in ((3, 60.0), (4, 10.0)):
            clock.sleep(seconds)
            progress.epoch(ENTRY | {"epoch": epoch, "step": 10 * epoch})
    assert [line.split(", ")[-1] for line in stream.getvalue().splitlines()] == ["07:00 left", "01:00 left"]


def test_an_epoch_whose_steps_an_earlier_run_has_done(monkeypatch):
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10, 100, 30, str) as progress:
        progress.epoch(ENTRY | {"images_per_second": 0.0})
    assert stream.getvalue() == "epoch 3/10: loss 1.2500\n"


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, True, ENTRY | {"validation_top1": {4: 62.5}})
    assert "30/100" in text and "\r" in text and "epoch 3: top-1 at 4 heads 62.50 %\n" in text
    assert "images/s" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_where_nothing_is_wanted(monkeypatch, terminal):
    assert shown(monkeypatch, terminal, ENTRY | {"validation_top1": {4: 62.5}}, shown=False) == ""
