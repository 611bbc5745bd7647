"""Kernels of a nested Vision Transformer, which read a subnetwork's slice of the full weights in place."""

from hydravit_kernels import forking  # noqa: F401  (its import is its effect)
from hydravit_kernels.adamw import AdamWStep, adamw, rectangles_of
from hydravit_kernels.backends import available_backends, check_backend, select
from hydravit_kernels.export import exporting, sizes
from hydravit_kernels.flops import network_macs
from hydravit_kernels.functional import attention_block, head, mlp_block, stem
from hydravit_kernels.networks import CpuNetwork, CudaNetwork, Network, PhaseTime, to_e4m3
from hydravit_kernels.parameters import (
    AttentionParameters,
    HeadParameters,
    MlpParameters,
    NetworkParameters,
    NetworkSizes,
    StemParameters,
    named_specs,
)
from hydravit_kernels.ranges import annotate
from hydravit_kernels.reference import layer_norm, per_image
from hydravit_kernels.sample import ContentSample
from hydravit_kernels.subnetwork import (
    AttentionSlice,
    EmbedSlice,
    HeadSlice,
    Intervals,
    MlpSlice,
    Subnetwork,
    widest,
)
from hydravit_kernels.transforms import transformed

__all__ = [
    "AdamWStep",
    "AttentionParameters",
    "AttentionSlice",
    "ContentSample",
    "CpuNetwork",
    "CudaNetwork",
    "EmbedSlice",
    "HeadParameters",
    "HeadSlice",
    "Intervals",
    "MlpParameters",
    "MlpSlice",
    "Network",
    "NetworkParameters",
    "NetworkSizes",
    "PhaseTime",
    "StemParameters",
    "Subnetwork",
    "adamw",
    "annotate",
    "attention_block",
    "available_backends",
    "check_backend",
    "exporting",
    "head",
    "layer_norm",
    "mlp_block",
    "named_specs",
    "network_macs",
    "per_image",
    "rectangles_of",
    "select",
    "sizes",
    "stem",
    "to_e4m3",
    "transformed",
    "widest",
]
