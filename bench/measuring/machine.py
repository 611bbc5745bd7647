"""The machine behind the numbers: names, versions and clocks, and its limits, which the same run measures."""

from __future__ import annotations

import ctypes
import datetime
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import RESULTS
from bench.measuring import fma
from bench.measuring.clock import SYSTEM, Clock
from bench.measuring.dtypes import DTYPES, precision
from hydravit.evaluation.environment import commit, cpu_name

# M, N, K of the products that look for the peak: squares, and a block's own shapes at batch 1 and 8.
_CPU_PRODUCTS = ((768, 768, 768), (1536, 1536, 1536), (197, 3072, 768), (1576, 3072, 768))
_GPU_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (50432, 3072, 768))
_PROBE_SECONDS = 0.15
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_GPU_CALLS = 10  # between two events


class Machine:
    """Facts of one run. ``probe`` is called between workloads: the peak of a dtype is the best that any probe saw."""

    def __init__(self, device: torch.device, dtypes: Sequence[str], clock: Clock = SYSTEM):
        self.device = device
        self._clock = clock
        self._started, self._commit = datetime.datetime.now(datetime.timezone.utc), commit()
        self._peaks = dict.fromkeys(dtypes, 0.0)
        self._bandwidth = 0.0
        self._clocks: list[float] = []
        self._fma = fma.library() if device.type == "cpu" and dtypes else None

    @property
    def slug(self) -> str:
        """The name of the folder for results of this machine."""
        name = self._name() if self.device.type == "cuda" else f"{self._name()} {torch.get_num_threads()} threads"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def folder(self, out: str | None) -> Path:
        """The folder ``out``, else the one of this machine's committed results; made if it is missing."""
        path = Path(out) if out else RESULTS / self.slug
        path.mkdir(parents=True, exist_ok=True)
        return path

    def probe(self) -> None:
        """Look for a higher peak and bandwidth, and note the clocks. Takes less than two seconds."""
        for dtype in self._peaks:
            rates = [self._product_rate(dtype, *shape) for shape in self._products()]
            if dtype in ("fp32", "tf32") and self._fma is not None:
                rates.append(fma.rate(self._fma, torch.get_num_threads(), self._clock))
            self._peaks[dtype] = max(self._peaks[dtype], *rates)
        self._bandwidth = max(self._bandwidth, self._copy_rate())
        self._clocks.extend(self._read_clocks())

    def limit_ms(self, dtype: str, flops: float, moved: float) -> tuple[float, str]:
        """The least time that the probes so far allow, and which of the two limits sets it."""
        times = {"peak": flops / self._peaks[dtype], "bandwidth": moved / self._bandwidth}
        limit = max(times, key=lambda name: times[name])
        return times[limit] * 1e3, limit

    def environment(self) -> dict:
        """The entries of ``bench.rows.ENVIRONMENT``."""
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
        """Values spread over (-0.5, 0.5), because a processor's clock depends on them. A formula makes them: a failed
        capture may have left the random generator unusable."""
        steps = torch.arange(rows * columns, device=self.device, dtype=torch.float64)
        return (steps * 0.6180339887498949).frac().sub(0.5).view(rows, columns).to(DTYPES[dtype])

    def _copy_rate(self) -> float:
        count = 2**30 if self.device.type == "cuda" else 2**26  # far beyond every cache
        source = torch.ones(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * count / self._best_seconds(lambda: target.copy_(source))

    def _best_seconds(self, run) -> float:
        """Seconds of the fastest call within a fraction of a second, after a first call that does not count."""
        run()
        best, end = float("inf"), self._clock.now() + _PROBE_SECONDS
        while self._clock.now() < end:
            best = min(best, self._gpu_seconds(run) if self.device.type == "cuda" else self._seconds(run))
        return best

    def _seconds(self, run) -> float:
        start = self._clock.now()
        run()
        return self._clock.now() - start

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
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            return [float(mhz) for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", text)]
        except OSError:
            return []


def keep_freed_memory() -> bool:
    """Stop glibc from giving freed memory back to the system. Returns whether there is a glibc that does.

    By default the end of the heap goes back and is taken again page by page, in every call or in none, depending on
    what happens to lie after it; eager PyTorch pays most for it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    from_the_heap = mallopt(_M_MMAP_THRESHOLD, 2**25)  # up to 32 MiB, the largest value there is
    return bool(from_the_heap and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
