"""Memory for what is as large as the parameters, but mostly written in slices."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def zeros_like(parameter: Tensor) -> Tensor:
    """Zeros in a parameter's shape, strides, dtype and device.

    On a CPU of a POSIX system every page is there from the first write to it on: where narrow widths are trained, the
    rest of the full size is only addresses.
    """
    if parameter.device.type != "cpu" or parameter.numel() == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros_like(parameter)
    like = torch.empty_like(parameter, device="meta")
    memory = mmap.mmap(-1, like.untyped_storage().nbytes(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())
