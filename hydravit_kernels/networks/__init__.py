"""Whole networks for inference, one class per kind of device: ``CpuNetwork`` and ``CudaNetwork``.

A network packs a model's weights once, in the layout that its kernels read; the packed weights serve every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hydravit_kernels.networks.cpu import CpuNetwork
from hydravit_kernels.networks.cuda import CudaNetwork, PhaseTime, to_e4m3
from hydravit_kernels.parameters import NetworkParameters
from hydravit_kernels.subnetwork import Subnetwork


class Network(Protocol):
    """The interface that both have."""

    def pack(self, parameters: NetworkParameters) -> None:
        """Pack the parameters anew, after they have changed."""

    def run(self, images: Tensor, subnetworks: Sequence[Subnetwork], width_index: Tensor | None = None) -> Tensor:
        """The logits ``(B, classes)`` of images ``(B, C, height, width)``.

        ``width_index (B,)``, int64, is the index of each image's subnetwork; None if there is one subnetwork.
        """
        ...


__all__ = ["CpuNetwork", "CudaNetwork", "Network", "PhaseTime", "to_e4m3"]
