"""Calls that are recorded for other tools, by ``torch.jit.trace``, ``torch.export`` and all that build on them.

Other tools know PyTorch's own operators only, so models then run the formulas of ``reference``.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether this call is recorded."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape as integers for decisions of Python; while ``torch.jit.trace`` records, it holds tensors."""
    if not torch.jit.is_tracing():
        return tensor.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in tensor.shape)
