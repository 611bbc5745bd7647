"""Memory for tensors as large as the parameters, of which training may write slices only."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def zeros_like(parameter: Tensor) -> Tensor:
    """Return zeros in a parameter's shape, strides, dtype and device.

    On the CPU of a POSIX system the first write to a page allocates it, so what narrow widths never write takes no
    memory.
    """
    if parameter.device.type != "cpu" or parameter.numel() == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros_like(parameter)
    like = torch.empty_like(parameter, device="meta")
    memory = mmap.mmap(-1, like.untyped_storage().nbytes(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())
