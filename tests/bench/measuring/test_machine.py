"""The machine's limits, on a clock of its own, and what it does with freed memory."""

import platform
import subprocess
import sys

import pytest
import torch
from fake_clock import FakeClock

from bench import ROOT
from bench.measuring import fma
from bench.measuring.machine import Machine
from bench.rows import ENVIRONMENT


def test_the_machine_shows_its_limits(monkeypatch):
    """Every call takes 10 ms, so the largest product sets the peak: 2 x 1576 x 3072 x 768 operations."""
    monkeypatch.setattr(fma, "library", lambda: None)
    machine = Machine(torch.device("cpu"), ["fp32"], FakeClock(tick=0.01))
    machine.probe()
    found = machine.environment()
    assert set(found) == set(ENVIRONMENT)
    assert found["peak_gflops"]["fp32"] == pytest.approx(743.65, abs=0.06) and found["bandwidth_gb_s"] == 13.4
    peak_ms, limit = machine.limit_ms("fp32", 1e12, 1)
    assert limit == "peak" and peak_ms == pytest.approx(1e6 / 743.6, rel=1e-3)
    assert machine.limit_ms("fp32", 1, 1e12)[1] == "bandwidth"


def test_the_probe_of_the_peak_counts_its_operations():
    library = fma.library()
    if library is None:
        pytest.skip("there is no C++ compiler")
    per_lane = 2 * 12 * 20_000_000  # two operations, 12 chains
    assert fma.rate(library, 1, FakeClock(tick=1.0)) / per_lane in (4, 8, 16)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is glibc's malloc")
def test_freed_memory_is_kept():
    """48 MB that come and go cost no page any more, in a process in which every page was given back before."""
    code = """
import ctypes, resource, torch
from bench.measuring.machine import keep_freed_memory
ctypes.CDLL(None).mallopt(-3, 2**17)  # from here on the system is asked for whatever is larger
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2**21) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""
    given_back, kept = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).split())
    assert kept < 200 < 100_000 < given_back
