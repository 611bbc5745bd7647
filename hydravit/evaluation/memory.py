"""The memory of inference at every width: that of the weights, and what a forward needs beyond it.

On the CPU a process of its own measures both as resident memory, so that everything counts: parameters, their packed
copy, activations and workspaces, to the granularity of pages. On CUDA torch's allocator tells what it handed out.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hydravit.config import HydraViTConfig
from hydravit.evaluation.latency import with_backend
from hydravit.model import HydraViT

MEASURED = {
    "cpu": "resident: growth by making a model and packing its weights, and the high-water mark of a forward beyond",
    "cuda": "torch.cuda.memory_allocated, and growth of max_memory_allocated during the forward",
}


class Memory(NamedTuple):
    """Memory in MiB.

    ``weights``: what the process holds with every width ready. ``peaks``: per width, the most that a forward needs
    beyond that. ``measured``: how it was measured, or why it was not; the values are then None.
    """

    weights: float | None
    peaks: dict[int, float | None]
    measured: str


def measure_memory(model: HydraViT, heads: Sequence[int], batch_size: int) -> Memory:
    """Measure inference on ``batch_size`` images; on the CPU another model of the same config stands for ``model``."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        weights = sum(p.untyped_storage().nbytes() for p in model.parameters()) / 2**20
        return Memory(weights, {k: _cuda_peak(model, k, batch_size) for k in heads}, MEASURED["cuda"])
    nothing = dict.fromkeys(heads)
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return Memory(None, nothing, f"not measured: needs Linux or CUDA, not {sys.platform} with {device.type}")
    task = {
        "config": model.config.to_dict(),
        "heads": sorted(heads),
        "batch_size": batch_size,
        "backend": model.backend,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-c", "from hydravit.evaluation.memory import main; main()", json.dumps(task)]
    # With this glibc returns a freed buffer at once, so that a narrow width's buffers do not count at a wider one.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
        weights, peaks = json.loads(done.stdout)
        return Memory(weights, {int(k): peak for k, peak in peaks.items()}, MEASURED["cpu"])
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
    except (subprocess.TimeoutExpired, ValueError) as error:
        reason = str(error)
    return Memory(None, nothing, f"not measured: {reason}")


@torch.inference_mode()
def _cuda_peak(model: HydraViT, heads: int, batch_size: int) -> float:
    parameter = next(model.parameters())
    images = parameter.new_zeros(batch_size, *model.config.image_shape)
    model(images, heads=heads)  # libraries allocate some memory once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(images, heads=heads)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _cpu_memory(task: dict) -> tuple[float, dict[int, float]]:
    """Measure the MiB of the weights, and per width those beyond.

    Widths come in ascending order, because a wider one needs all that a workspace keeps of a narrower one.
    """
    torch.set_num_threads(task["threads"])
    config = HydraViTConfig.from_dict(task["config"])
    # This lets libraries and thread pools allocate what they allocate once, which belongs to no weight or forward.
    _prepare(_model(dataclasses.replace(config, depth=1), task), task)
    before = _settled_kib()
    model = _model(config, task)
    _prepare(model, task)
    held = _settled_kib()
    # Sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    peaks: dict[int, float] = {}
    for heads in task["heads"]:
        _call(model, heads, task["batch_size"])
        peaks[heads] = (resident_kib("VmHWM") - held) / 1024
    return (held - before) / 1024, peaks


def _model(config: HydraViTConfig, task: dict) -> HydraViT:
    """Make a model of zeros, because drawing random weights takes longer than all that is measured."""
    model = HydraViT(config, backend="reference", dtype=getattr(torch, task["dtype"]), device="meta")
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return with_backend(model, task["backend"])


def _prepare(model: HydraViT, task: dict) -> None:
    """Pack the weights, which the second call does."""
    for _ in range(3):
        _call(model, task["heads"][0], 1)


@torch.inference_mode()
def _call(model: HydraViT, heads: int, batch_size: int) -> None:
    model(next(model.parameters()).new_zeros(batch_size, *model.config.image_shape), heads=heads)


def _settled_kib() -> int:
    """Return the resident memory without what could be freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed pages otherwise
    if trim is not None:
        trim(0)
    return resident_kib("VmRSS")


def resident_kib(name: str) -> int:
    """Return this process's memory by its name in Linux's ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8", errors="replace"))
    assert found is not None, name
    return int(found[1])


def main() -> None:
    """Measure in this process: the first argument is the task as JSON, standard output gets the result as JSON."""
    print(json.dumps(_cpu_memory(json.loads(sys.argv[1]))))
