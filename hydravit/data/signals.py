"""Signals and the processes that load data: a signal to the whole process group is for the process that trains.

Slurm, Kubernetes and Ctrl-C signal every process. A worker that ended then would take with it the batch that the
trainer waits for, and so the trainer's last checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Deliver signals after the ``with`` block only; processes that start in it begin in this state."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent(worker: int) -> None:
    """End a worker that started in ``signals_held_back`` when its parent says so; others' signals stay held back."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(_ENDING).si_pid != os.getppid():
        pass
    os._exit(0)
