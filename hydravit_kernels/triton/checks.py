"""Checks of the ops' arguments, because a kernel that got a wrong pointer or size would read whatever lies there.

All raise ``RuntimeError`` in the words of the native backend: what was expected, and what was given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hydravit_kernels.parameters import BlockParameters
from hydravit_kernels.triton.launch import INTERPRETED, Batch
from hydravit_kernels.triton.slices import ProductSlices

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def batch_of(x: Tensor, channels: int, width_index: Tensor | None, count: int) -> tuple[Batch, Tensor]:
    """Check ``x (B, N, channels)`` and the ``count`` slices; return the batch, and ``x`` as rows."""
    check_activation("x", x)
    if x.dim() != 3 or x.shape[2] != channels or x.shape[1] == 0:
        raise RuntimeError(f"x: shape (B, N, {channels}) with a token at least expected, {tuple(x.shape)} given")
    if channels > 1 and x.stride(2) != 1 and x.numel():
        raise RuntimeError(f"x: innermost stride 1 expected, {x.stride(2)} given")
    check_width_index(width_index, x, count)
    return Batch(x.shape[0], x.shape[1], width_index), as_rows(x)


def rows_like(x: Tensor, name: str, tensor: Tensor, *shape: int) -> Tensor:
    """Check an activation's shape, and that its dtype and device are those of ``x``; return it as rows."""
    if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise RuntimeError(f"{name}: {x.dtype} {shape} on {x.device} expected, {given} given")
    if shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel():
        raise RuntimeError(f"{name}: innermost stride 1 expected, {tensor.stride(-1)} given")
    return as_rows(tensor)


def as_rows(tensor: Tensor) -> Tensor:
    """``(rows, columns)``: all axes but the last joined. It is a view where the strides allow one.

    Rows far apart are copied too, because kernels count in 32 bits inside a tile.
    """
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return rows if rows.stride(0) < 2**24 else rows.contiguous()


def check_activation(name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise RuntimeError(f"{name}: dtype float32, bfloat16 or float16 expected, {x.dtype} given")
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise RuntimeError(f"{name}: Triton's interpreter computes wrongly in bfloat16")


def check_width_index(width_index: Tensor | None, x: Tensor, count: int) -> None:
    """Check the images' indices into ``count`` slices; None means that there is one slice."""
    if width_index is None:
        if count != 1:
            raise RuntimeError(f"slices: one expected where width_index is not given, {count} given")
        return
    if width_index.dtype != torch.int64 or width_index.shape != x.shape[:1] or width_index.device != x.device:
        given = f"{width_index.dtype} {tuple(width_index.shape)} on {width_index.device}"
        raise RuntimeError(f"width_index: int64 ({x.shape[0]},) on {x.device} expected, {given} given")
    possible = ((width_index >= 0) & (width_index < count)).all()
    torch._assert_async(possible, f"width_index: an index below {count} expected for every image")


def check_tensor(name: str, tensor: Tensor, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Check that kernels can read a parameter of this shape in place; None stands for any size.

    It must lie on the device of ``x``. Its rows may lie any number of elements apart, but there are no gaps inside a
    row. Tokens ``(1, count, channels)`` have their rows behind the first axis.
    """
    expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if tensor.dim() != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
        raise RuntimeError(f"{name}: shape {expected} expected, {tuple(tensor.shape)} given")
    if tensor.device != x.device:
        raise RuntimeError(f"{name}: device {x.device} expected, {tensor.device} given")
    if tensor.dtype not in _FLOATS:
        raise RuntimeError(f"{name}: dtype float32, bfloat16 or float16 expected, {tensor.dtype} given")
    row = tensor if len(shape) == 1 or not tensor.numel() else tensor[0]
    if not (row[0] if len(shape) == 3 and row.numel() else row).is_contiguous():
        raise RuntimeError(f"{name}: innermost stride 1 expected, strides {tensor.stride()} given")
    if tensor.shape[0] * tensor.stride(0) >= 2**31:
        raise RuntimeError(f"{name}: less than 2**31 elements from the first to the last expected")


def check_vectors(x: Tensor, size: int, parameters: BlockParameters, *names: str) -> None:
    """Check the named parameters, each a vector of ``size`` or None."""
    for name in names:
        if (vector := getattr(parameters, name)) is not None:
            check_tensor(name, vector, x, (size,))


def check_weight(name: str, weight: Tensor, x: Tensor, slices: ProductSlices, shape: tuple[int | None, ...]) -> None:
    """Check a weight, and that it contains the slices."""
    check_tensor(name, weight, x, shape)
    rows, columns = slices.reach()
    if rows > weight.shape[0]:
        raise RuntimeError(f"{name}: rows up to {rows} expected, {weight.shape[0]} given")
    if columns > weight[:1].numel():
        raise RuntimeError(f"{name}: columns up to {columns} expected, {weight[:1].numel()} given")


def check_buffers(x: Tensor, parameters: BlockParameters, buffers: BlockParameters) -> None:
    """Check the buffers to which the gradients of ``parameters`` are added."""
    for name, parameter, buffer in zip(parameters._fields, parameters, buffers, strict=True):
        if buffer is None:
            continue
        if parameter is None:
            raise RuntimeError(f"grad_{name}: None expected, as {name} is")
        check_tensor(f"grad_{name}", buffer, x, tuple(parameter.shape))
