"""Whole networks for inference, one per kind of device: ``CpuNetwork`` and ``CudaNetwork``.

A network packs a model's weights once, in the layout its kernels read, and one packed copy serves every width.
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
    """What the two have in common."""

    def pack(self, parameters: NetworkParameters) -> None:
        """Read the parameters again."""

    def run(self, images: Tensor, subnetworks: Sequence[Subnetwork], subnet: Tensor | None = None) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, C, height, width)``; ``subnet (B,)``: each image's subnetwork."""
        ...


__all__ = ["CpuNetwork", "CudaNetwork", "Network", "PhaseTime", "to_e4m3"]
