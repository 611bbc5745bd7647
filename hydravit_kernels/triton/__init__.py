"""The blocks in Triton, for GPU training and throughput; never run on a GPU yet.

Tests run them on Triton's interpreter and compile them for GPUs that are not there.

One file per block; the arguments of the functions here are those of the ops in ``hydravit_kernels/ops.py``.
"""

from hydravit_kernels.triton.adamw import adamw
from hydravit_kernels.triton.attention import attention_block, attention_block_backward
from hydravit_kernels.triton.head import head, head_backward
from hydravit_kernels.triton.mlp import mlp_block, mlp_block_backward
from hydravit_kernels.triton.stem import stem, stem_backward

__all__ = [
    "adamw",
    "attention_block",
    "attention_block_backward",
    "head",
    "head_backward",
    "mlp_block",
    "mlp_block_backward",
    "stem",
    "stem_backward",
]
