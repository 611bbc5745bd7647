"""The heads and channels of a trained plain ViT in the order of their importance, as a start for HydraViT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hydravit.compression.calibration import Batches, activations, loss, slopes
from hydravit.compression.source import check_source, rearranged, working_copy
from hydravit.config import HydraViTConfig
from hydravit.model import HydraViT
from hydravit_kernels import named_specs


def order_heads(model: HydraViT, batches: Batches) -> HydraViT:
    """Return the model with its most important heads, residual channels and hidden channels first.

    Heads and hidden channels are permuted within their layer. The channels of the residual have one permutation for
    the whole network: norms do not mind it, and every weight that reads or writes the residual is permuted alike. The
    full width computes the same as before; narrower ones read first parts (``hydravit.geometry.hydravit``).

    Importance is the empirical Fisher information of a factor, 1, before a head's output, a hidden channel, or all
    that the norms read of a residual channel: the mean over images of the squared derivative of the loss. It is
    measured once per width, from the widest down, on the heads and channels that are left: the least important ones
    become the last of that width. What matters in a narrow network is not what matters in the full one.

    Args:
        model: trained at full width; it stays as it is.
        batches: ``(images (B, C, H, W), labels (B,))``, read ``max_heads - 1`` times: a list, a ``DataLoader`` or
            ``CalibrationImages``.
    Returns:
        A model of geometry ``"hydravit"``, with the dtype, device and mode of ``model``.
    Raises:
        TypeError, ValueError: a model, labels or batches that do not serve.
        RuntimeError: logits that are not finite.
    """
    check_source(model)
    result = rearranged(model, model.state_dict(), "hydravit")
    for heads in range(model.config.max_heads, 1, -1):
        importance = _measure(working_copy(result), batches, heads)
        result.load_state_dict(_permuted(result, importance))
    return result


class _Importance(NamedTuple):
    """Of what one width reads: ``residual (embed,)``; per layer ``heads (heads,)`` and ``hidden (hidden,)``."""

    residual: Tensor
    heads: Tensor
    hidden: Tensor


def _measure(model: HydraViT, batches: Batches, heads: int) -> _Importance:
    config = model.config
    layers = range(config.depth)
    norms = [f"blocks.{i}.{norm}" for i in layers for norm in ("norm1", "norm2")] + [config.final_norm]
    qkv, hidden = ([f"blocks.{i}.{module}" for i in layers] for module in ("attn.qkv", "mlp.act"))
    total: list[Tensor] = []
    for found in activations(model, batches, [*norms, *qkv, *hidden], loss, heads=heads):
        of_heads = []
        for name in qkv:
            # A head's output is linear in its values, so a factor of one is a factor of the other.
            *_, values = slopes(found[name]).unflatten(1, (3, heads, config.head_dim)).unbind(1)
            of_heads.append(values.sum(-1))
        found_slopes = (
            torch.stack([slopes(found[name]) for name in norms]).sum(0),
            torch.stack(of_heads, 1),
            torch.stack([slopes(found[name]) for name in hidden], 1),
        )
        squares = [slope.square().sum(0) for slope in found_slopes]
        total = [old + new for old, new in zip(total, squares, strict=True)] if total else squares
    return _Importance(*total)


def _permuted(model: HydraViT, importance: _Importance) -> dict[str, Tensor]:
    """Return all weights, with what the importance is of in descending order; the channels beyond it stay."""
    config, weights = model.config, model.state_dict()
    embed = _order(importance.residual, config.embed)
    axes, result = _axes(config), {}
    for name, tensor in weights.items():
        orders = {"embed": embed, "attention_embed": embed, "mlp_embed": embed}
        if name.startswith("blocks."):
            layer = int(name.split(".")[1])
            orders |= _orders_of_layer(config, importance.heads[layer], importance.hidden[layer])
        for axis, label in enumerate(axes[name]):
            if label in orders:
                tensor = tensor.index_select(axis, orders[label])
        result[name] = tensor
    return result


def _axes(config: HydraViTConfig) -> dict[str, tuple[str, ...]]:
    """Return what each axis of every parameter counts, also of those that kernels do not know by these names."""
    axes = {name: spec.axes for name, spec, _ in named_specs(config.depth, config.final_norm)}
    axes |= {f"head_dist.{kind}": axes[f"head.{kind}"] for kind in ("weight", "bias")}
    axes |= {f"norm_pre.{kind}": ("embed",) for kind in ("weight", "bias")}
    return axes | {"dist_token": axes["reg_token"]}


def _orders_of_layer(config: HydraViTConfig, heads: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    first = _order(heads, config.max_heads) * config.head_dim
    attended = (first[:, None] + torch.arange(config.head_dim, dtype=torch.int64, device=first.device)).flatten()
    qkv = torch.cat([attended + role * config.embed for role in range(3)])
    return {"attended": attended, "qkv": qkv, "hidden": _order(hidden, config.hidden)}


def _order(importance: Tensor, length: int) -> Tensor:
    """The indices of an axis: those that have an importance, in descending order of it, then the others."""
    active = importance.argsort(descending=True, stable=True)
    return torch.cat([active, torch.arange(len(active), length, dtype=torch.int64, device=active.device)])
