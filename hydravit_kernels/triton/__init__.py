"""The blocks in Triton, for training and throughput on GPUs, one file per block.

The functions take the arguments of the ops in ``hydravit_kernels/ops.py``, with the parameters as one tuple and the
gradient buffers as another. They have never run on a GPU: tests run them on Triton's interpreter, and compile them for
GPUs that need not be there.
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
