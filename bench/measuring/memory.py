"""Memory that a peer holds to have every width ready, or needs for a training step: one process per peer.

The memory of a width set is what the process holds once every width is ready and was called, and the full model was
released, beyond what it held before there was a model. So the full weights count for a peer that reads them, and not
for one with weights of its own. The memory of training is the most that the process holds at any time in its later
steps: weights, gradients, optimizer and activations.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from bench import ROOT
from bench.measuring.peer import Absent, Peer, offered
from bench.measuring.workloads import Workload, make_images, make_labels, make_model
from hydravit.config import HydraViTConfig
from hydravit.evaluation.memory import resident_kib

SECONDS = 900  # enough for a peer that compiles ten networks for the first time
_START = HydraViTConfig(image_size=32, patch_size=16, depth=1, max_heads=1, num_classes=8)


def held_bytes(workload: Workload, peer: Peer, device: torch.device, seconds: float = SECONDS) -> int:
    """Resident memory on the CPU, the GPU's own memory on a GPU, found within ``seconds``.

    Raises ``Absent`` where it cannot be read, ``RuntimeError`` if the process broke or outran its time.
    """
    if device.type == "cpu" and not Path("/proc/self/status").exists():
        raise Absent(f"resident memory is read on Linux, not on {sys.platform}")
    task = pickle.dumps((workload, peer, device, torch.get_num_threads()))
    command = [sys.executable, "-m", "bench.measuring.memory"]
    try:
        done = subprocess.run(command, cwd=ROOT, input=task, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not ready after {seconds:.0f} s") from None
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(errors[-1] if errors else f"exit code {done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "absent" in answer:
        raise Absent(answer["absent"])
    return answer["bytes"]


def _inference(workload: Workload, peer: Peer, device: torch.device) -> int:
    set_up = offered(peer, peer.inference)
    images = make_images(workload, device)
    # The tool loads its own code in a first network, which counts for no width.
    start = Workload("inference", (1,), 1, workload.dtype, _START)
    for run in set_up(make_model(start, device), make_images(start, device), start.heads).values():
        run()
    del run
    before = _held(device)
    model = make_model(workload, device)
    closures = set_up(model, images, workload.heads)
    for run in closures.values():
        run()
    del model
    return _held(device) - before


def _training(workload: Workload, peer: Peer, device: torch.device) -> int:
    set_up = offered(peer, peer.training)
    images, labels = make_images(workload, device), make_labels(workload, device)
    before = _held(device)
    model = make_model(workload, device)
    (step,) = set_up(model, images, labels, workload.heads, workload.autocast).values()
    del model
    step.run()  # makes what stays: gradients and the optimizer's state
    _held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    for _ in range(2):
        step.run()
    if device.type == "cuda":
        return _held(device) - before - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
    return resident_kib("VmHWM") * 1024 - before


def _held(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed pages otherwise
    if trim is not None:
        trim(0)
    return resident_kib("VmRSS") * 1024


def main() -> None:
    """The measuring process: a pickled task on standard input, the answer as JSON in the last line of output."""
    workload, peer, device, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    measure = _training if workload.task == "training_memory" else _inference
    try:
        answer: dict[str, int | str] = {"bytes": measure(workload, peer, device)}
    except Absent as absent:
        answer = {"absent": str(absent)}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
