"""Blocks of a sliced Vision Transformer that read one subnetwork's part of the full weights, in place."""

from hydravit_kernels.adamw import AdamWStep, adamw, rectangles_of
from hydravit_kernels.backends import available_backends, check_backend, select
from hydravit_kernels.engine import CudaNetwork, PhaseTime, SubnetSlices, cuda_network_why_not, to_e4m3
from hydravit_kernels.functional import attention_block, head, mlp_block, stem
from hydravit_kernels.packed import (
    Fingerprint,
    Packed,
    SubnetworkIntegers,
    fingerprint,
    network,
    pack,
    slices_of_network,
)
from hydravit_kernels.ranges import annotate
from hydravit_kernels.reference import attention_map, layer_norm
from hydravit_kernels.slices import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, widest

__all__ = [
    "AdamWStep",
    "AttentionSlice",
    "CudaNetwork",
    "EmbedSlice",
    "Fingerprint",
    "HeadSlice",
    "MlpSlice",
    "Packed",
    "PhaseTime",
    "SubnetSlices",
    "SubnetworkIntegers",
    "adamw",
    "annotate",
    "attention_block",
    "attention_map",
    "available_backends",
    "check_backend",
    "cuda_network_why_not",
    "fingerprint",
    "head",
    "layer_norm",
    "mlp_block",
    "network",
    "pack",
    "rectangles_of",
    "select",
    "slices_of_network",
    "stem",
    "to_e4m3",
    "widest",
]
