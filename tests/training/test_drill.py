"""A little of the drill of faults, which ``make drill`` runs in full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
FEW = {
    "kills": "6",
    "full_disks": "3",
    "signals": "2",
    "dead_workers": "1",
    "dead_ranks": "1",
    "damages": "20 10",
    "two_runs": "1",
}


@pytest.mark.parametrize("fault", FEW)
def test_runs_survive(fault):
    """In a process of its own: the drill forks, which a process that has computed on several threads cannot."""
    script = Path(__file__).parents[1] / "drill.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, fault, "--counts", *FEW[fault].split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{fault}: ")
