"""Latency and memory of every width of an untrained supernet on this machine, ours beside eager slicing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hydravit.config import HydraViTConfig
from hydravit.evaluation.cost import costs
from hydravit.evaluation.evaluate import environment, latency_row, width_row
from hydravit.evaluation.latency import backends_to_time, measure_latency
from hydravit.evaluation.memory import Memory, measure_memory
from hydravit.factory import fused_model
from hydravit.integers import plain_int

_NAMES = {"tiny": "ViT-Ti", "small": "ViT-S", "base": "ViT-B", "large": "ViT-L"}


def measure_supernet(
    config: str | HydraViTConfig = "base",
    heads: Sequence[int] | None = None,
    *,
    seconds: float = 1.0,
    memory: bool = True,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict:
    """Measure one image at every width of a model with random weights; their values do not affect the cost.

    Args:
        config: as in ``hydravit.fused_model``.
        heads: widths; None: all.
        seconds: time to spend on the latency of one width on one backend.
        memory: whether to measure memory; otherwise its entries are None.
        device: None: torch's default.
    Returns:
        ``{"widths": [...], "environment": {...}}``, ready for JSON. Per width:

        * ``heads``, ``params``, ``gmacs``, ``latency_ms``, ``latency_spread_ms``, ``difference``: see ``evaluate``;
        * ``peak_memory_mib``: ``{"eager", "fused"}``, the most that a forward of one image needs beyond the weights.

        ``environment["weights_mib"]``: ``{"eager", "fused", "separate"}``, what is held to have every width ready: the
        parameters; these and their packed copy; and, counted instead of measured, the parameters of a network of its
        own for every width.
    Raises:
        RuntimeError: backends that disagree.
    """
    model = fused_model(config=config, device=device).eval()
    heads = [plain_int(k) for k in (model.allowed_heads if heads is None else heads)]
    models, fused_missing = backends_to_time(model)
    parameter = next(model.parameters())
    image = torch.randn(1, *model.config.image_shape, dtype=torch.float32, device="cpu").to(parameter)
    timings = measure_latency(models, image, heads, seconds=seconds, progress=progress)
    used: dict[str, Memory] = {}
    if memory:  # each in a process of its own, for which a thread waits
        with ThreadPoolExecutor() as pool:
            measured = pool.map(lambda each: measure_memory(each, heads, batch_size=1), models.values())
            used = dict(zip(models, measured, strict=True))
    counted = costs(model.config)
    rows = [
        {
            **width_row(model.config, k),
            "params": counted[k].params,
            "gmacs": counted[k].macs / 1e9,
            **latency_row(timings[k]),
            "peak_memory_mib": {name: used[name].peaks[k] if name in used else None for name in ("eager", "fused")},
        }
        for k in heads
    ]
    weights = {name: used[name].weights if name in used else None for name in ("eager", "fused")}
    weights["separate"] = sum(counted[k].params for k in heads) * parameter.element_size() / 2**20
    about = {
        **environment(model),
        "model": _NAMES.get(config, "the model") if isinstance(config, str) else "the model",
        "config": model.config.to_dict(),
        "latency": "median wall time of one image, backends and widths in turns",
        "fused_missing": fused_missing,
        "weights_mib": weights,
        "memory": used["eager"].measured if used else "not asked for",
    }
    return {"widths": rows, "environment": about}
