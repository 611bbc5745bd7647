"""Inference on the CPU from one packed copy of the weights, which serves every width, every engine and every thread."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

import hydravit_kernels as kernels
from hydravit.geometry import Selection
from hydravit.inference.packable import Packable
from hydravit.inference.staleness import Fingerprint, glance, in_shared_memory


class _Copy(NamedTuple):
    """Packed weights, and what was known of the model before they were packed."""

    network: kernels.CpuNetwork
    fingerprint: Fingerprint
    declared_changes: int


class PackedWeights:
    """The packed copy of a model's weights, which is as large as they are. Threads may share it.

    The model's own calls and its engines get the same object from ``of``, and it lives as long as one of them keeps it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copy: _Copy | None = None

    @staticmethod
    def of(model: Packable) -> PackedWeights:
        """Return the object of this model: the one that somebody keeps, or a new one without a copy."""
        with _of_models_lock:
            reference = _of_models.get(model)
            kept = None if reference is None else reference()
            if kept is None:
                kept = PackedWeights()
                _of_models[model] = weakref.ref(kept)
            return kept

    @property
    def network(self) -> kernels.CpuNetwork | None:
        """The packed copy, which may be stale; None where there is none."""
        copy = self._copy
        return None if copy is None else copy.network

    def fresh(self, model: Packable, parameters: list[Tensor | None]) -> kernels.CpuNetwork | None:
        """Return the packed copy if it is up to date, or None.

        Args:
            parameters: those of the model now, in the order of its structure.
        """
        copy = self._copy
        if copy is None or copy.declared_changes != model.declared_changes:
            return None
        return copy.network if copy.fingerprint.holds(parameters) else None

    def renew(self, model: Packable, parameters: list[Tensor | None]) -> kernels.CpuNetwork:
        """Return the packed copy after packing again, unless another thread was faster.

        Raises:
            RuntimeError: the weights lie in shared memory, or have not the shapes of the model's config.
        """
        with self._lock:
            network = self.fresh(model, parameters)
            if network is not None:
                return network
            self._copy = None  # first, so that memory never holds two
            if in_shared_memory(parameters):
                raise RuntimeError(
                    "packed weights: the model's are in shared memory, where other processes change them unseen; call "
                    "the model, which reads them in place, or make an engine of copy.deepcopy(model)"
                )
            # All of this comes before packing: a weight that is written meanwhile makes the copy stale.
            declared_changes, fingerprint = model.declared_changes, Fingerprint(parameters)
            network = kernels.CpuNetwork(model.network_parameters(), model.config.sizes)
            self._copy = _Copy(network, fingerprint, declared_changes)
            return network


# Kept beside the models, so that copies and pickles of a model have none.
_of_models: weakref.WeakKeyDictionary[Packable, weakref.ref[PackedWeights]] = weakref.WeakKeyDictionary()
_of_models_lock = threading.Lock()


class PackedInference:
    """Runs a model's whole forward as one op, wherever that changes nothing but the time it takes.

    The packed copy is made in the second call that finds the same parameters, so that a model which is trained between
    its calls, or called by ``torch.func.functional_call``, packs nothing in vain. An engine's copy serves at once. It
    is dropped in the first call that finds them changed. Parameters in shared memory are never packed. Several threads
    may use it.

    Args:
        pooled_only: whether the last block computes only the tokens that the head pools. The logits have the same bits.
    """

    def __init__(self, pooled_only: bool = True):
        self.pooled_only = pooled_only
        self._lock = threading.Lock()
        self._seen: tuple | None = None
        self._weights: PackedWeights | None = None

    def __reduce__(self):  # copies and pickles start without a packed copy
        return PackedInference, (self.pooled_only,)

    @property
    def network(self) -> kernels.CpuNetwork | None:
        """The packed copy, which may be stale; None where there is none."""
        weights = self._weights
        return None if weights is None else weights.network

    def drop(self) -> None:
        """Forget the packed copy; engines keep it as long as it is not stale."""
        with self._lock:
            self._seen = self._weights = None

    def run(self, model: Packable, images: Tensor, selection: Selection) -> Tensor | None:
        """Compute the logits; return None if the blocks must run one by one, or the weights are not packed yet."""
        if model.backend != "native" or model.training or torch.compiler.is_compiling() or kernels.exporting():
            return None
        parameters = model.structure(look=False).parameters()  # the forward has looked
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (images, *parameters)):
            return None
        if kernels.transformed(images, *parameters):  # torch.func, or a tangent of forward-mode differentiation
            return None
        if any(kernels.CpuNetwork.why_not(s) for s in selection.subnetworks):
            return None
        network = self._fresh(model, parameters)
        if network is None:
            return None
        return network.run(images, selection.subnetworks, selection.width_index, pooled_only=self.pooled_only)

    def _fresh(self, model: Packable, parameters: list[Tensor | None]) -> kernels.CpuNetwork | None:
        """Return the packed copy if it is up to date, or make it if the last call found the same parameters."""
        weights = self._weights
        network = None if weights is None else weights.fresh(model, parameters)
        if network is not None:
            return network
        with self._lock:
            weights = PackedWeights.of(model)
            network = weights.fresh(model, parameters)  # packed by a thread that was faster, or by an engine
            if network is None:
                self._weights = None
                before, self._seen = self._seen, glance(parameters)
                if self._seen is None or self._seen != before or in_shared_memory(parameters):
                    return None
                network = weights.renew(model, parameters)
            self._weights = weights
            return network
