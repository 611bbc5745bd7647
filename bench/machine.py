"""The machine under the numbers: names and versions, clocks, and the most it can do, measured in the same run."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.peers import CACHE
from bench.workloads import DTYPES
from hydravit.evaluation.environment import commit, cpu_name

# M, N, K of the products among which the best is looked for: squares, and a block's own shapes at batch 1 and 8.
_CPU_PRODUCTS = ((768, 768, 768), (1536, 1536, 1536), (197, 3072, 768), (1576, 3072, 768))
_GPU_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (50432, 3072, 768))
_PROBE_SECONDS = 0.15
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_GPU_CALLS = 10  # between two events


class Machine:
    """Facts of one run. ``probe`` is called between workloads: each dtype's peak is the best it ever saw."""

    def __init__(self, device: torch.device, dtypes: Sequence[str]):
        self.device = device
        self._started, self._commit = datetime.datetime.now(datetime.timezone.utc), commit()
        self._peaks = dict.fromkeys(dtypes, 0.0)
        self._bandwidth = 0.0
        self._clocks: list[float] = []
        self._fma = _fma_library() if device.type == "cpu" else None

    @property
    def slug(self) -> str:
        """A folder's name for results of this machine."""
        name = self._name() if self.device.type == "cuda" else f"{self._name()} {torch.get_num_threads()} threads"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def probe(self) -> None:
        """Look for a higher peak and bandwidth, and note the clocks. Under two seconds."""
        for dtype in self._peaks:
            rates = [self._product_rate(dtype, *shape) for shape in self._products()]
            if dtype in ("fp32", "tf32") and self._fma is not None:
                rates.append(_fma_rate(self._fma, torch.get_num_threads()))
            self._peaks[dtype] = max(self._peaks[dtype], *rates)
        self._bandwidth = max(self._bandwidth, self._copy_rate())
        self._clocks.extend(self._read_clocks())

    def limit_ms(self, dtype: str, flops: float, moved: float) -> tuple[float, str]:
        """The least time this machine needs, by what it showed so far, and which of its limits that is."""
        times = {"peak": flops / self._peaks[dtype], "bandwidth": moved / self._bandwidth}
        limit = max(times, key=times.get)
        return times[limit] * 1e3, limit

    def environment(self) -> dict:
        """The entries of ``results.ENVIRONMENT``."""
        seen = (min(self._clocks), max(self._clocks)) if self._clocks else ()
        clocks = "-".join(dict.fromkeys(f"{mhz:.0f}" for mhz in seen)) or "not readable"
        return {
            "device": self.device.type,
            "name": self._name(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "clock_mhz": clocks,
            "peak_gflops": {dtype: round(peak / 1e9, 1) for dtype, peak in self._peaks.items()},
            "bandwidth_gb_s": round(self._bandwidth / 1e9, 1),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "system": platform.platform(),
            "commit": self._commit,
            "date": self._started.isoformat(timespec="seconds"),
        }

    def _name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def _products(self) -> tuple[tuple[int, int, int], ...]:
        return _GPU_PRODUCTS if self.device.type == "cuda" else _CPU_PRODUCTS

    def _product_rate(self, dtype: str, m: int, n: int, k: int) -> float:
        a, b = self._values(m, k, dtype), self._values(k, n, dtype)
        out = torch.empty(m, n, device=self.device, dtype=DTYPES[dtype])
        with precision(dtype):
            return 2.0 * m * n * k / self._best_seconds(lambda: torch.mm(a, b, out=out))

    def _values(self, rows: int, columns: int, dtype: str) -> torch.Tensor:
        """Spread over (-0.5, 0.5), as a processor's clock depends on them; no generator, whose state may be lost."""
        steps = torch.arange(rows * columns, device=self.device, dtype=torch.float64)
        return (steps * 0.6180339887498949).frac().sub(0.5).view(rows, columns).to(DTYPES[dtype])

    def _copy_rate(self) -> float:
        count = 2**30 if self.device.type == "cuda" else 2**26  # far beyond every cache
        source = torch.ones(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * count / self._best_seconds(lambda: target.copy_(source))

    def _best_seconds(self, run) -> float:
        """Of one call: the best one, after a first that does not count, for a fraction of a second."""
        run()
        best, end = float("inf"), time.perf_counter() + _PROBE_SECONDS
        while time.perf_counter() < end:
            best = min(best, self._gpu_seconds(run) if self.device.type == "cuda" else _seconds(run))
        return best

    def _gpu_seconds(self, run) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(_GPU_CALLS):
            run()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) / _GPU_CALLS / 1e3

    def _read_clocks(self) -> list[float]:
        if self.device.type == "cuda":
            command = ["nvidia-smi", f"--id={self.device.index or 0}", "--query-gpu=clocks.sm"]
            command.append("--format=csv,noheader,nounits")
            try:
                return [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])]
            except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
                return []
        try:
            return [float(mhz) for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())]
        except OSError:
            return []


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def keep_freed_memory() -> bool:
    """Stop glibc from giving freed memory back to the system; whether there is a glibc that does.

    By default the end of the heap goes back and is taken again page by page, in every call or in none, depending on
    what happens to lie behind it; eager PyTorch pays most for it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    from_the_heap = mallopt(_M_MMAP_THRESHOLD, 2**25)  # up to 32 MiB, the largest value there is
    return bool(from_the_heap and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Within it, float32 products and convolutions are what ``dtype`` says: exact, or rounded to TensorFloat-32."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _fma_library() -> ctypes.CDLL | None:
    """``fma.cpp``, built for this processor; None without a compiler: products alone then give the peak."""
    source = Path(__file__).with_name("fma.cpp")
    digest = hashlib.sha256(source.read_bytes() + cpu_name().encode()).hexdigest()[:16]
    library = CACHE / f"fma-{digest}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        try:
            subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", part], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        part.replace(library)
    fma = ctypes.CDLL(str(library))
    fma.multiply_adds.restype = ctypes.c_double
    fma.multiply_adds.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_void_p]
    return fma


def _fma_rate(fma: ctypes.CDLL, threads: int) -> float:
    """Operations per second of all threads together; ctypes lets the interpreter's lock go meanwhile."""
    barrier, rates = threading.Barrier(threads), []

    def work():
        sink = ctypes.c_float(0.0)
        barrier.wait()
        start = time.perf_counter()
        done = fma.multiply_adds(20_000_000, 0.5, ctypes.byref(sink))
        rates.append(done / (time.perf_counter() - start))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)
