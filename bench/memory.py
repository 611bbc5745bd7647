"""Memory that a peer holds to have every width ready, or needs for a training step: one process per peer.

What the process holds once every width is ready and was called, and the full model was let go, beyond what it held
before there was a model. So the full weights count for a peer that reads them, and not for one that has its own. Of
training the most that it holds at any time of its later steps: weights, gradients, optimizer and activations.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.peers import Absent, Peer, peers
from bench.workloads import DTYPES, Workload, make_images, make_labels, make_model
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.evaluation.memory import resident_kib

_START = HydraViTConfig(image_size=32, patch_size=16, depth=1, max_heads=1, num_classes=8)
SECONDS = 900  # a peer that compiles ten networks for the first time


def held_bytes(workload: Workload, peer: str, device: torch.device, seconds: float = SECONDS) -> int:
    """Resident memory on the CPU, on a GPU its own, found within ``seconds``.

    Raises ``Absent`` where that is impossible, ``RuntimeError`` where the process broke or time was up.
    """
    if device.type == "cpu" and not Path("/proc/self/status").exists():
        raise Absent(f"resident memory is read on Linux, not on {sys.platform}")
    config = resolve_config(workload.config).to_dict()
    task = {"workload": workload._replace(config=config)._asdict(), "peer": peer, "device": str(device)}
    command = [sys.executable, "-m", "bench.memory", json.dumps({**task, "threads": torch.get_num_threads()})]
    folder = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not ready after {seconds:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    if "absent" in answer:
        raise Absent(answer["absent"])
    return answer["bytes"]


def _measure(workload: Workload, name: str, device: torch.device) -> int:
    peer = next(peer for peer in peers() if peer.name == name)
    if workload.task == "training_memory":
        return _measure_training(workload, peer, device)
    if peer.inference is None:
        raise Absent(peer.without)
    images = make_images(workload, device)
    start = Workload("inference", (1,), 1, workload.dtype, _START)  # what the tool loads at its start is no width's
    for run in peer.inference(make_model(start, device), make_images(start, device), start.heads).values():
        run()
    del run
    before = _held(device)
    model = make_model(workload, device)
    closures = peer.inference(model, images, workload.heads)
    for run in closures.values():
        run()
    del model
    return _held(device) - before


def _measure_training(workload: Workload, peer: Peer, device: torch.device) -> int:
    if peer.training is None:
        raise Absent(peer.without)
    images, labels = make_images(workload, device), make_labels(workload, device)
    amp = DTYPES[workload.dtype] if workload.dtype in ("bf16", "fp16") else None
    before = _held(device)
    model = make_model(workload, device)
    (step,) = peer.training(model, images, labels, workload.heads, amp).values()
    del model
    step.run()  # makes what stays: gradients and the optimizer's state
    _held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
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
    """The measuring process: the task as JSON in the first argument, the answer as JSON in the last line of output."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    fields = task["workload"]
    fields.update(heads=tuple(fields["heads"]), config=HydraViTConfig.from_dict(fields["config"]))
    try:
        answer = {"bytes": _measure(Workload(**fields), task["peer"], torch.device(task["device"]))}
    except Absent as absent:
        answer = {"absent": str(absent)}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
