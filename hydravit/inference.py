"""Inference through one packed copy of the weights, which serves every width; never in training."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import hydravit_kernels as kernels
from hydravit.geometry import Geometry, Widths
from hydravit.layers import hooks_of, is_ours

if TYPE_CHECKING:
    from hydravit.model import HydraViT


class PackedInference:
    """Runs a model's whole forward as one op where nobody could tell but by the clock.

    The packed copy is as large as the parameters. It is made when a second call finds the parameters as the first did,
    so that turns with training, or ``torch.func.functional_call``, pack nothing in vain; and dropped as soon as a call
    finds them changed. Safe to use from several threads.

    Args:
        pooled_only: the last block computes only the tokens that the head pools. The logits are the same, bit for bit.
    """

    def __init__(self, pooled_only: bool = True):
        self.pooled_only = pooled_only
        self._lock = threading.Lock()
        self._structure: Structure | None = None
        self._seen: kernels.Fingerprint | None = None
        self._packed: tuple[kernels.Fingerprint, kernels.Packed] | None = None
        self._slices: dict[tuple[Geometry, ...], list[kernels.SubnetworkIntegers] | None] = {}

    def __reduce__(self):  # copies and pickles start without a packed copy
        return PackedInference, (self.pooled_only,)

    def drop(self) -> None:
        with self._lock:
            self._seen = self._packed = None

    def run(self, model: HydraViT, images: Tensor, widths: Widths) -> Tensor | None:
        """The logits; or None where this way is not possible, or not yet."""
        if model.backend != "native" or model.training or torch.compiler.is_compiling():
            return None
        structure = self._structure
        if structure is None or not structure.holds():
            structure = self._structure = Structure(model)
        if structure.seen_from_outside():
            return None
        parameters = structure.parameters()
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (images, *parameters)):
            return None
        slices = self._slices_of(widths.geometries)
        packed = None if slices is None else self._fresh(model, parameters)
        if packed is None:
            return None
        return kernels.network(images, packed, slices, widths.eps, widths.subnet, pooled_only=self.pooled_only)

    def _fresh(self, model: HydraViT, parameters: list[Tensor | None]) -> kernels.Packed | None:
        kept = self._packed
        if kept is not None and kept[0].holds(parameters):
            return kept[1]
        with self._lock:
            if self._packed is not None and self._packed[0].holds(parameters):  # another thread was faster
                return self._packed[1]
            self._packed = None
            if self._seen is None or not self._seen.holds(parameters):
                self._seen = kernels.fingerprint(parameters)
                return None
            self._packed = self._seen, kernels.pack(in_order(model), model.config.image_size, model.pool_range)
            return self._packed[1]

    def _slices_of(self, geometries: tuple[Geometry, ...]) -> list[kernels.SubnetworkIntegers] | None:
        try:
            return self._slices[geometries]
        except KeyError:
            columns = zip(*((g.embed, g.attention, g.mlp, g.head) for g in geometries), strict=True)
            slices = kernels.slices_of_network(*columns)
        if len(self._slices) >= 256:  # per-image widths make many different tables
            self._slices.clear()  # perhaps also what another thread has just put there
        self._slices[geometries] = slices
        return slices


class Structure:
    """The modules of a model, kept so that a call can look at all parameters without walking through them."""

    def __init__(self, model: HydraViT):
        modules = list(model.modules())
        self._parameters = [module._parameters for module in modules]
        self._children = [(module._modules, list(module._modules.values())) for module in modules]
        # The op calls no module: one whose forward could be seen, or be another, must not be passed over.
        self._blocks = list(model.blocks)
        tables = {id(hooks): hooks for block in self._blocks for hooks in hooks_of(block)}
        self._hooks = list(tables.values())

    def holds(self) -> bool:
        """Whether the modules are still these."""
        return all(list(now.values()) == then for now, then in self._children)

    def seen_from_outside(self) -> bool:
        return any(self._hooks) or not all(map(is_ours, self._blocks))

    def parameters(self) -> list[Tensor | None]:
        return [parameter for of_module in self._parameters for parameter in of_module.values()]


def in_order(model: HydraViT) -> list[Tensor | None]:
    """Every parameter in the order that ``hydravit_kernels.pack`` takes."""
    of_blocks = [p for block in model.blocks for p in (*block.attention_parameters(), *block.mlp_parameters())]
    norm = model.norm if model.config.pool == "token" else model.fc_norm
    return [*model.stem_parameters(), *of_blocks, *model.head_parameters(norm, model.num_classes > 0)]
