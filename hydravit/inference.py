"""Inference through one packed copy of the weights, which serves every width; never in training."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.geometry import Geometry, Widths
from hydravit.layers import Block

if TYPE_CHECKING:
    from hydravit.model import HydraViT

_MODULE = nn.modules.module  # where hooks on all modules are kept


class PackedInference:
    """Runs a model's whole forward as one op where nobody could tell but by the clock.

    The packed copy is as large as the parameters. It is made when a second call finds the parameters as the first did,
    so that turns with training, or ``torch.func.functional_call``, pack nothing in vain; and dropped as soon as a call
    finds them changed. Safe to use from several threads.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._seen: kernels.Fingerprint | None = None
        self._packed: tuple[kernels.Fingerprint, kernels.Packed] | None = None
        self._slices: dict[tuple[Geometry, ...], kernels.NetworkSlices | None] = {}

    def __reduce__(self):  # copies and pickles start without a packed copy
        return PackedInference, ()

    def drop(self) -> None:
        with self._lock:
            self._seen = self._packed = None

    def run(self, model: HydraViT, images: Tensor, widths: Widths) -> Tensor | None:
        """The logits; or None where this way is not possible, or not yet."""
        if not _applies(model):
            return None
        slices = self._slices_of(widths.geometries)
        if slices is None:
            return None
        packed = self._fresh(model)
        if packed is None:
            return None
        return kernels.network(images, packed, slices, model.pool_range, widths.eps, widths.subnet)

    def _fresh(self, model: HydraViT) -> kernels.Packed | None:
        parameters = _parameters(model)
        now = kernels.fingerprint(parameters)
        kept = self._packed
        if kept is not None and kept[0] == now:
            return kept[1]
        with self._lock:
            if self._packed is not None and self._packed[0] == now:  # another thread was faster
                return self._packed[1]
            self._packed = None
            if now is None or now != self._seen:
                self._seen = now
                return None
            packed = kernels.pack(parameters)
            self._packed = now, packed
            return packed

    def _slices_of(self, geometries: tuple[Geometry, ...]) -> kernels.NetworkSlices | None:
        if geometries not in self._slices:
            if len(self._slices) >= 256:  # per-image widths make many different tables
                self._slices.clear()
            columns = zip(*((g.embed, g.attention, g.mlp, g.head) for g in geometries), strict=True)
            self._slices[geometries] = kernels.slices_of_network(*columns)
        return self._slices[geometries]


def _applies(model: HydraViT) -> bool:
    """Not where a gradient is wanted, a graph is traced or a module's own forward could be seen or be another."""
    if model.backend != "native" or model.training or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in _parameters(model)):
        return False
    if _MODULE._global_forward_hooks or _MODULE._global_forward_pre_hooks:
        return False
    return all(type(b) is Block and not b._forward_hooks and not b._forward_pre_hooks for b in model.blocks)


def _parameters(model: HydraViT) -> list[Tensor | None]:
    """Every parameter in the order of ``hydravit_kernels.pack``."""
    parameters = [*model._stem_parameters()]
    for block in model.blocks:
        parameters += (*block.attention_parameters(), *block.mlp_parameters())
    norm = model.norm if model.config.pool == "token" else model.fc_norm
    return [*parameters, *model._head_parameters(norm, model.num_classes > 0)]
