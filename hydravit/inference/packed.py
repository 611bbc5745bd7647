"""Inference of ordinary calls of a model from one packed copy of the weights, which serves every width."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

import hydravit_kernels as kernels
from hydravit.geometry import Selection
from hydravit.inference.packable import Packable
from hydravit.inference.staleness import Fingerprint


class PackedInference:
    """Runs a model's whole forward as one op, wherever that changes nothing but the time it takes.

    The packed copy is as large as the parameters. It is made in the second call that finds the same parameters, so that
    a model which is trained between its calls, or called by ``torch.func.functional_call``, packs nothing in vain. It
    is dropped in the first call that finds them changed. Several threads may use it.

    Args:
        pooled_only: whether the last block computes only the tokens that the head pools. The logits have the same bits.
    """

    def __init__(self, pooled_only: bool = True):
        self.pooled_only = pooled_only
        self._lock = threading.Lock()
        self._seen: Fingerprint | None = None
        self._packed: tuple[Fingerprint, kernels.CpuNetwork] | None = None

    def __reduce__(self):  # copies and pickles start without a packed copy
        return PackedInference, (self.pooled_only,)

    @property
    def network(self) -> kernels.CpuNetwork | None:
        """The packed copy, which may be stale; None where there is none."""
        kept = self._packed
        return None if kept is None else kept[1]

    def drop(self) -> None:
        """Forget the packed copy."""
        with self._lock:
            self._seen = self._packed = None

    def run(self, model: Packable, images: Tensor, selection: Selection) -> Tensor | None:
        """Compute the logits; return None if the blocks must run one by one, or the weights are not packed yet."""
        if model.backend != "native" or model.training or torch.compiler.is_compiling() or kernels.exporting():
            return None
        parameters = model.structure().parameters()
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (images, *parameters)):
            return None
        if any(kernels.CpuNetwork.why_not(s) for s in selection.subnetworks):
            return None
        network = self._fresh(model, parameters)
        if network is None:
            return None
        return network.run(images, selection.subnetworks, selection.width_index, pooled_only=self.pooled_only)

    def _fresh(self, model: Packable, parameters: list[Tensor | None]) -> kernels.CpuNetwork | None:
        """Return the packed copy if it is up to date, or make it if the last call found the same parameters."""
        kept = self._packed
        if kept is not None and kept[0].holds(parameters):
            return kept[1]
        with self._lock:
            if self._packed is not None and self._packed[0].holds(parameters):  # another thread was faster
                return self._packed[1]
            self._packed = None
            if self._seen is None or not self._seen.holds(parameters):
                self._seen = Fingerprint.take(parameters)
                return None
            network = kernels.CpuNetwork(model.network_parameters(), model.config.sizes)
            self._packed = self._seen, network
            return network
