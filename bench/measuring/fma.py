"""The arithmetic peak of a CPU by ``fma.cpp``, which is compiled for this processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import threading
from pathlib import Path

from bench import CACHE
from bench.measuring.clock import Clock
from hydravit.evaluation.environment import cpu_name


def library() -> ctypes.CDLL | None:
    """The compiled ``fma.cpp``; None without a compiler, where matrix products alone must show the peak."""
    source = Path(__file__).with_name("fma.cpp")
    digest = hashlib.sha256(source.read_bytes() + cpu_name().encode()).hexdigest()[:16]
    path = CACHE / f"fma-{digest}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        try:
            subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", part], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        part.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.multiply_adds.restype = ctypes.c_double
    loaded.multiply_adds.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_void_p]
    return loaded


def rate(loaded: ctypes.CDLL, threads: int, clock: Clock) -> float:
    """Operations per second of all threads together; ctypes releases the interpreter's lock meanwhile."""
    barrier, rates = threading.Barrier(threads), []

    def work():
        sink = ctypes.c_float(0.0)
        barrier.wait()
        start = clock.now()
        done = loaded.multiply_adds(20_000_000, 0.5, ctypes.byref(sink))
        rates.append(done / (clock.now() - start))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)
