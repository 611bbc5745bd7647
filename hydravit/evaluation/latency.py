"""The latency of one forward at every width, on the reference and on the fused backend, in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import hydravit_kernels as kernels
from hydravit.model import HydraViT

_LEAST, _MOST = 10, 200  # samples of a width on a backend

# Largest difference of two backends' logits, relative to the largest logit, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


def with_backend(model: HydraViT, backend: str) -> HydraViT:
    """Return the model on another backend, with the same weights. Raise ``RuntimeError`` if it cannot run there."""
    parameter = next(model.parameters())
    other = copy.copy(model)  # shallow: the parameters are the model's own
    other.requested_backend = backend
    other.backend = kernels.select(backend, parameter.device, parameter.dtype)
    return other


def backends_to_time(model: HydraViT) -> tuple[dict[str, HydraViT], str]:
    """Return ``"eager"`` (reference backend) and, if there is one, ``"fused"``; else the reason why there is none."""
    models = {"eager": with_backend(model, "reference")}
    if model.backend != "reference":
        return {**models, "fused": model}, ""
    if model.requested_backend == "reference":
        return models, "the reference backend was asked for"
    parameter = next(model.parameters())
    try:
        kernels.select("native", parameter.device, parameter.dtype)
    except RuntimeError as error:
        return models, str(error)
    return models, "the model runs on the reference backend"


@torch.inference_mode()
def measure_latency(
    models: dict[str, HydraViT],
    images: Tensor,
    heads: Sequence[int],
    *,
    seconds: float = 1.0,
    progress: bool = False,
) -> dict[int, dict[str, dict[str, float]]]:
    """Measure the wall time of ``model(images, heads=k)`` per width and backend.

    All take turns, so that a disturbance of the machine disturbs all alike. Outputs are compared before any timing.

    Args:
        seconds: time to spend on one width on one backend; 10 to 200 samples are taken.
        progress: whether to show a bar.
    Returns:
        ``{"p20", "p50", "p80", "samples", "difference"}``: percentiles in ms, the number of samples, and the largest
        difference of the outputs relative to the largest logit.
    Raises:
        RuntimeError: the outputs differ by more than rounding.
    """
    differences = {k: _compare(models, images, k) for k in heads}
    runs = [(k, name, model) for k in heads for name, model in models.items()]
    samples: dict[tuple[int, str], list[float]] = {(k, name): [] for k, name, _ in runs}
    for k, _, model in runs:  # warms up caches, thread pools and clocks, as the comparison did
        _time(model, images, k)
    start, limit = time.perf_counter(), seconds * len(runs)
    with tqdm(desc="time every width", unit="call", total=None, disable=not progress, leave=False) as bar:
        for turn in range(_MOST):
            if turn >= _LEAST and time.perf_counter() - start > limit:
                break
            for k, name, model in runs if turn % 2 else reversed(runs):
                samples[k, name].append(_time(model, images, k))
                bar.update()
            # The number of turns to come follows from the mean time of those done.
            turns = min(max(_LEAST, limit * (turn + 1) / max(time.perf_counter() - start, 1e-9)), _MOST)
            bar.total = max(round(turns), turn + 1) * len(runs)
    result: dict[int, dict[str, dict[str, float]]] = {k: {} for k in heads}
    for k in heads:
        for name in models:
            times = torch.tensor(samples[k, name], dtype=torch.float32, device="cpu")
            p20, p50, p80 = times.quantile(times.new_tensor([0.2, 0.5, 0.8])).tolist()
            counted = {"samples": len(samples[k, name]), "difference": differences[k]}
            result[k][name] = {"p20": p20, "p50": p50, "p80": p80, **counted}
    return result


def _compare(models: dict[str, HydraViT], images: Tensor, heads: int) -> float:
    outputs = {name: model(images, heads=heads).double() for name, model in models.items()}
    expected = outputs["eager"]
    worst = 0.0
    for name, output in outputs.items():
        difference = ((output - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
        if not difference <= _TOLERANCE.get(images.dtype, 5e-2):
            raise RuntimeError(f"heads={heads}: {name} ({models[name].backend}) differs from eager by {difference:.1e}")
        worst = max(worst, difference)
    return worst


def _time(model: HydraViT, images: Tensor, heads: int) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(images, heads=heads)
    if images.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
