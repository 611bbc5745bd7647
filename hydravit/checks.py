"""What a model checks of the tensors that it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_batch(name: str, tensor: Tensor, shape: tuple[int, ...], parameter: Tensor) -> Tensor:
    """``tensor`` in the dtype of ``parameter``: autocast's low precision is undone, as parameters are not cast.

    Raises ``TypeError`` or ``ValueError`` unless it is ``(B, *shape)`` with ``B > 0``, on the device of ``parameter``.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dim() != len(shape) + 1 or tensor.shape[1:] != shape or tensor.shape[0] == 0:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be (B, {sizes}) with B > 0, not {tuple(tensor.shape)}")
    device, dtype = parameter.device, parameter.dtype
    if tensor.device != device:
        raise ValueError(f"{name} are on {tensor.device}, the model on {device}")
    if tensor.dtype != dtype:
        if not tensor.dtype.is_floating_point or not torch.is_autocast_enabled(device.type):
            raise TypeError(f"{name} are {tensor.dtype}, the model is {dtype}")
        tensor = tensor.to(dtype)
    return tensor
