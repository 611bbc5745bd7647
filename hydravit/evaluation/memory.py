"""Peak memory of a forward beyond the weights, measured at every width.

On the CPU a process of its own measures it (``main``): the high-water mark of its resident
memory over the mark before the first forward. So everything counts, libraries' and kernels' workspaces too, to the
granularity of pages and of what the allocator keeps. On CUDA it is what torch's allocator handed out at most.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hydravit.config import HydraViTConfig
from hydravit.model import HydraViT

MEASURED = {
    "cpu": "growth of the process's resident memory during the forward, high-water mark",
    "cuda": "growth of torch.cuda.max_memory_allocated during the forward",
}


def measure_memory(model: HydraViT, heads: Sequence[int], batch_size: int) -> tuple[dict[int, float | None], str]:
    """MiB at every width, for one batch in inference, and what was measured or why it was not (the values are None)."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return {k: _cuda_peak(model, k, batch_size) for k in heads}, MEASURED["cuda"]
    nothing = dict.fromkeys(heads)
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return nothing, f"not measured: needs Linux or CUDA, not {sys.platform} with {device.type}"
    task = {
        "config": model.config.to_dict(),
        "heads": sorted(heads),
        "batch_size": batch_size,
        "backend": model.backend,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-c", "from hydravit.evaluation.memory import main; main()", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return {int(k): v for k, v in json.loads(done.stdout).items()}, MEASURED["cpu"]
    except subprocess.CalledProcessError as error:
        return nothing, f"not measured: {(error.stderr.strip().splitlines() or ['no message'])[-1]}"
    except (subprocess.TimeoutExpired, ValueError) as error:
        return nothing, f"not measured: {error}"


@torch.inference_mode()
def _cuda_peak(model: HydraViT, heads: int, batch_size: int) -> float:
    parameter = next(model.parameters())
    images = parameter.new_zeros(batch_size, model.config.in_channels, *model.config.image_size)
    model(images, heads=heads)  # what libraries allocate once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(images, heads=heads)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.inference_mode()
def _cpu_peaks(task: dict) -> dict[int, float]:
    """Widths in ascending order: the mark of a wider one hides nothing of a narrower one's that the allocator kept."""
    torch.set_num_threads(task["threads"])
    config = HydraViTConfig.from_dict(task["config"])
    model = HydraViT(config, backend=task["backend"], dtype=getattr(torch, task["dtype"])).eval()
    images = next(model.parameters()).new_zeros(task["batch_size"], config.in_channels, *config.image_size)
    model(images[:1], heads=task["heads"][0])  # what libraries and thread pools allocate once
    before = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    peaks = {}
    for heads in task["heads"]:
        model(images, heads=heads)
        peaks[heads] = (resident_kib("VmHWM") - before) / 1024
    return peaks


def resident_kib(name: str) -> int:
    """Memory of this process, by its name in Linux's ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    """The measuring process: the task as JSON in the first argument, MiB per width as JSON on standard output."""
    print(json.dumps(_cpu_peaks(json.loads(sys.argv[1]))))
