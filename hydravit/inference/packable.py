"""The part of a model that inference sees."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.config import HydraViTConfig
from hydravit.structure import Structure


class Packable(Protocol):
    """A model as packed inference and engines see it; ``hydravit.HydraViT`` is one."""

    config: HydraViTConfig
    backend: str
    training: bool
    heads: int
    pos_embed: nn.Parameter
    declared_changes: int  # how often `weights_changed` was called

    @property
    def allowed_heads(self) -> tuple[int, ...]: ...

    def check_images(self, images: Tensor) -> Tensor: ...

    def subnetwork(self, heads: int) -> kernels.Subnetwork: ...

    def network_parameters(self) -> kernels.NetworkParameters: ...

    def structure(self, look: bool = True) -> Structure: ...
