"""Accuracy, cost, latency and memory of a model at every width."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from hydravit.config import HydraViTConfig
from hydravit.evaluation.accuracy import SizedDataset, accuracy, interval
from hydravit.evaluation.cost import cost
from hydravit.evaluation.environment import commit, cpu_name
from hydravit.evaluation.latency import backends_to_time, measure_latency
from hydravit.evaluation.memory import Memory, measure_memory
from hydravit.inference import with_e4m3_weights
from hydravit.integers import plain_int
from hydravit.model import HydraViT


def evaluate(
    model: HydraViT,
    dataset: SizedDataset,
    *,
    heads: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    latency: bool = True,
    memory: bool = True,
    seconds: float = 1.0,
    e4m3_weights: bool = False,
    progress: bool = False,
) -> dict:
    """Measure accuracy and cost of every width.

    Args:
        model: the call puts it into evaluation mode and back, and runs it on its own device.
        dataset: items ``(image (C, H, W) float32, label)``.
        heads: widths; None: all that the model allows.
        latency, memory: whether to measure them; otherwise their entries are None.
        seconds: time to spend on the latency of one width on one backend.
        e4m3_weights: whether to measure accuracy also with weights rounded as a float8_e4m3fn engine rounds them.
    Returns:
        ``{"widths": [...], "environment": {...}}``, ready for JSON. Per width:

        * ``heads``; where widths are no heads, ``width``, the share of the full one as people read it;
        * ``params``, ``gmacs``: 10^9 multiply-accumulates of an image;
        * ``top1``, ``top5``: percent (top5 counts all classes if there are fewer than 5);
        * ``top1_interval``: the 95 % interval of top1, in percent, that this number of images allows;
        * ``e4m3_top1``, ``e4m3_top5``: the same with rounded weights, if asked for;
        * ``latency_ms``: ``{"eager", "fused"}``, medians at batch 1 of the reference and of the model's own backend;
          the reason for a None is in ``environment["fused_missing"]``;
        * ``latency_spread_ms``: their 20th and 80th percentiles;
        * ``difference``: the largest between the two backends' logits, relative to the largest logit;
        * ``peak_memory_mib``: what a batch of ``batch_size`` needs beyond the weights, ``environment["weights_mib"]``;
          ``environment["memory"]`` says how it was measured.
    Raises:
        ValueError: an empty data set, labels that the model has no class for, widths that it refuses.
        RuntimeError: logits that are not finite, backends that disagree.
    """
    heads = [plain_int(k) for k in (model.allowed_heads if heads is None else heads)]
    subnetworks = {k: model.subnetwork(k) for k in heads}
    mode = model.training
    model.eval()
    try:
        reading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
        accuracies = accuracy(model, dataset, heads, **reading)
        rounded = accuracy(with_e4m3_weights(model), dataset, heads, **reading) if e4m3_weights else {}
        models, fused_missing = backends_to_time(model)
        timings, used = {}, Memory(None, {}, "not asked for")
        if latency:
            parameter = next(model.parameters())
            image = dataset[0][0][None].to(parameter.device, parameter.dtype)
            timings = measure_latency(models, image, heads, seconds=seconds, progress=progress)
        if memory:
            used = measure_memory(model, heads, batch_size)
    finally:
        model.train(mode)
    rows = []
    for k in heads:
        params, macs = cost(model.config, subnetworks[k])
        timing = timings.get(k, {})
        rows.append(
            {
                **width_row(model.config, k),
                "params": params,
                "gmacs": macs / 1e9,
                "top1": accuracies[k][0],
                "top5": accuracies[k][1],
                "top1_interval": list(interval(accuracies[k][0], len(dataset))),
                **({"e4m3_top1": rounded[k][0], "e4m3_top5": rounded[k][1]} if rounded else {}),
                **latency_row(timing),
                "peak_memory_mib": used.peaks.get(k),
            }
        )
    about = {
        **environment(model),
        "images": len(dataset),
        "classes": model.num_classes,
        "batch_size": batch_size,
        "latency": "median wall time of one image, backends and widths in turns" if latency else "not asked for",
        "fused_missing": fused_missing if latency else "not asked for",
        "weights_mib": used.weights,
        "memory": used.measured,
    }
    return {"widths": rows, "environment": about}


def width_row(config: HydraViTConfig, heads: int) -> dict:
    """Return the entries of a result's row that name the width."""
    return {"heads": heads} | ({"width": config.width_name(heads)} if config.counted == "width" else {})


def latency_row(timing: dict[str, dict[str, float]]) -> dict:
    """Return the entries of a result's row for one width of ``measure_latency``; ``timing`` may be empty."""
    return {
        "latency_ms": {name: timing[name]["p50"] if name in timing else None for name in ("eager", "fused")},
        "latency_spread_ms": {name: [times["p20"], times["p80"]] for name, times in timing.items()},
        "difference": timing["fused"]["difference"] if "fused" in timing else None,
    }


def environment(model: HydraViT) -> dict:
    """Describe the machine and the software that a result belongs to."""
    device = next(model.parameters()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backend": model.backend,
        "counted": model.config.counted,
        "commit": commit(),
    }
