"""The check before any timing: outputs must be right within a small multiple of eager PyTorch's own error."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import hydravit_kernels as kernels
from bench.measuring.dtypes import DTYPES, precision
from bench.measuring.peer import cut
from bench.measuring.workloads import Workload, images_of, make_images, make_labels, make_residual
from hydravit import HydraViT
from hydravit.inference import with_e4m3_weights

# How many times eager PyTorch's error in the same dtype a peer may have, per norm: the error budget of the kernels.
FACTORS = {2: 2.0, float("inf"): 4.0}
_CHUNK = 4  # images at a time in float64, to save memory


class Refused(Exception):
    """The outputs are wrong; ``error`` and ``allowed`` belong to the worst one."""

    def __init__(self, message: str, error: float, allowed: float):
        super().__init__(message)
        self.error, self.allowed = error, allowed


class Reference:
    """The right outputs of a workload at each of its widths, and eager PyTorch's error there.

    ``check`` compares one peer's outputs, tensors by name; ``model`` is the workload's. An error is a norm, L2 or
    maximum, of the difference from float64, by the same norm of the float64 output. Allowed is eager's error times
    ``FACTORS``, plus two units in the last place of the output's root mean square. A peer with e4m3 weights is allowed
    that on top of the change that such weights alone make in float64, which is many times as large.
    """

    def __init__(self, workload: Workload, model: HydraViT):
        self._exact, self._allowed = {}, {}
        self._workload, self._model = workload, model
        device = model.pos_embed.device
        double = copy.deepcopy(model).double()
        for k in workload.heads:
            exact = _outputs(workload, double, k, device, torch.float64)
            eager = _outputs(workload, model, k, device, DTYPES[workload.dtype])
            if not all(tensor.isfinite().all() for tensor in [*exact.values(), *eager.values()]):
                raise ValueError(f"eager PyTorch's outputs at k={k} are not finite in {workload.dtype}")
            ulp = torch.finfo(DTYPES[workload.dtype]).eps
            self._exact[k] = exact
            self._allowed[k] = {
                (name, norm): factor * _error(eager[name], tensor, norm) + 2 * ulp * _unit(tensor, norm)
                for name, tensor in exact.items()
                for norm, factor in FACTORS.items()
            }

    @functools.cached_property
    def _change_by_e4m3(self) -> dict[int, dict[tuple[str, float], float]]:
        device, rounded = self._model.pos_embed.device, with_e4m3_weights(copy.deepcopy(self._model).double())
        changed = {k: _outputs(self._workload, rounded, k, device, torch.float64) for k in self._exact}
        return {
            k: {
                (name, norm): _error(changed[k][name], tensor, norm)
                for name, tensor in exact.items()
                for norm in FACTORS
            }
            for k, exact in self._exact.items()
        }

    def check(self, heads: int, outputs: Mapping[str, Tensor], e4m3_weights: bool = False) -> tuple[float, float]:
        """Error and allowed error of the output nearest to its limit. Raises ``Refused`` for wrong outputs."""
        exact, allowed = self._exact[heads], self._allowed[heads]
        if e4m3_weights:
            allowed = {which: limit + self._change_by_e4m3[heads][which] for which, limit in allowed.items()}
        if outputs.keys() != exact.keys():
            wrong = ", ".join(sorted(outputs.keys() ^ exact.keys()))
            raise Refused(f"outputs are missing or unknown: {wrong}", float("inf"), 0.0)
        errors = {}
        for name, output in outputs.items():
            if output.shape != exact[name].shape:
                shapes = f"{tuple(output.shape)}, not {tuple(exact[name].shape)}"
                raise Refused(f"{name} has shape {shapes}", float("inf"), allowed[name, 2])
            errors.update({(name, norm): _error(output, exact[name], norm) for norm in FACTORS})
        worst = max(errors, key=lambda output: errors[output] / allowed[output])
        error, limit = errors[worst], allowed[worst]
        if not error <= limit:
            name, norm = worst[0], "L2" if worst[1] == 2 else "maximum"
            text = f"{name} at k={heads} is off by {error:.1e} in the {norm} norm, allowed is {limit:.1e}"
            raise Refused(text, error, limit)
        return error, limit


def _unit(exact: Tensor, norm: float) -> float:
    """The relative error that a difference by the root mean square makes: in every element for L2, else in one."""
    return 1.0 if norm == 2 else (exact.square().mean().sqrt() / exact.abs().max()).item()


def _error(output: Tensor, exact: Tensor, norm: float) -> float:
    error = (torch.linalg.vector_norm(output.double() - exact, norm) / torch.linalg.vector_norm(exact, norm)).item()
    return error if error == error else float("inf")  # nan: something is not finite


def _outputs(
    workload: Workload, model: HydraViT, heads: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The reference backend's outputs, computed in ``dtype``."""
    with precision(workload.dtype):
        if workload.task == "training":
            return _gradients(workload, model, heads, device, dtype)
        if workload.task.startswith(("attention", "mlp")):
            return _block(workload, model, heads, device, dtype)
        images = make_images(workload, device)[images_of(workload, heads)].to(dtype)
        with torch.inference_mode():
            return {"logits": torch.cat([model(part, heads=heads) for part in images.split(_CHUNK)])}


def _gradients(workload, model, heads, device, dtype) -> dict[str, Tensor]:
    images, labels = make_images(workload, device), make_labels(workload, device)
    low = dtype in (torch.bfloat16, torch.float16)
    for part in torch.arange(len(images), device=device).split(_CHUNK):
        with torch.autocast(device.type, dtype=dtype if low else None, enabled=low):
            logits = model(images[part].to(model.pos_embed.dtype), heads=heads)
        (F.cross_entropy(logits.to(model.pos_embed.dtype), labels[part], reduction="sum") / len(images)).backward()
    result = cut({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model, heads)
    model.zero_grad(set_to_none=True)
    return result


def _block(workload, model, heads, device, dtype) -> dict[str, Tensor]:
    kind, _, backward = workload.task.partition("_")
    x, grad = (tensor.to(dtype) for tensor in make_residual(workload, device))
    x.requires_grad_(bool(backward))
    block, subnetwork = model.blocks[0], model.subnetwork(heads)
    if kind == "attention":
        parameters, slices, run = block.attention_parameters(), subnetwork.attention[:1], kernels.attention_block
    else:
        parameters, slices, run = block.mlp_parameters(), subnetwork.mlp[:1], kernels.mlp_block
    with torch.set_grad_enabled(bool(backward)):
        y = run(x, parameters, None, slices, subnetwork.eps, backend="reference")
    if not backward:
        return {"y": y}
    y.backward(grad)
    gradients = {f"blocks.0.{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    result = {name.removeprefix("blocks.0."): tensor for name, tensor in cut(gradients, model, heads).items()}
    model.zero_grad(set_to_none=True)
    return {"y": y.detach(), "x": x.grad, **result}
