"""AdamW and the moving average of the weights in one launch; arguments as in ``hydravit_kernels/adamw.py``.

The kernel reads and writes every element once. The host plans a table of rectangles once: it copies to the device where
the rectangles lie and which program takes which tile of them. A call then copies only the numbers of its steps, some
hundred bytes, and waits for nothing. No captured graph can contain a call, because these numbers differ from call to
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hydravit_kernels.adamw import AdamWStep
from hydravit_kernels.triton.launch import INTERPRETED, launch

_TILE, _WARPS = 1024, 8  # elements per program, which are four per thread: one vector of float32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How many plans a table keeps. One is needed; two serve a caller who alternates between two sets of tensors.
_MOST_PLANS = 2


class _Rectangle(NamedTuple):
    """A rectangle on the device, a row of int64.

    The first five are addresses of its first element in each array; an ``average`` of 0 means that there is none.
    ``step`` is the index of its step, and ``first_tile`` is the program that takes its first tile.
    """

    weight: int
    gradient: int
    first: int
    second: int
    average: int
    step: int
    rows: int
    row_stride: int
    columns: int
    first_tile: int


_INTEGERS = tl.constexpr(len(_Rectangle._fields))
_NUMBERS = tl.constexpr(len(AdamWStep._fields))


@triton.jit
def _interpolate(start, end, weight):
    """``start + weight * (end - start)``, computed from the nearer end, so that a weight of 1 gives exactly ``end``."""
    near_start = weight < 0.5
    return tl.fma(end - start, tl.where(near_start, weight, weight - 1.0), tl.where(near_start, start, end))


@triton.jit
def _pointer(address, like, ALIGN: tl.constexpr):
    """The address as a pointer of the type of ``like``, a multiple of ``ALIGN`` elements."""
    return tl.multiple_of(address.to(like.dtype), ALIGN * (like.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit(do_not_specialize=["like"])
def _adamw_kernel(like, tiles, rectangles, steps, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """Take ``TILE`` elements of one rectangle, counted row by row, through their step.

    Grid: (tiles,)

    like: any of the arrays, for its dtype
    tiles: (tiles,) int32, per program the index of its rectangle
    rectangles: (rectangles, fields) int64; ALIGN elements divide all addresses, strides and columns
    steps: (steps, fields) float32, rows as ``AdamWStep``
    """
    row = rectangles + tl.load(tiles + tl.program_id(0)) * _INTEGERS
    average_address = tl.load(row + 4)
    rectangle = _Rectangle(
        _pointer(tl.load(row), like, ALIGN),
        _pointer(tl.load(row + 1), like, ALIGN),
        _pointer(tl.load(row + 2), like, ALIGN),
        _pointer(tl.load(row + 3), like, ALIGN),
        _pointer(average_address, like, ALIGN),
        tl.load(row + 5),
        tl.load(row + 6).to(tl.int32),
        tl.multiple_of(tl.load(row + 7).to(tl.int32), ALIGN),
        tl.multiple_of(tl.load(row + 8).to(tl.int32), ALIGN),
        tl.load(row + 9).to(tl.int32),
    )
    i = (tl.program_id(0) - rectangle.first_tile) * TILE + tl.arange(0, TILE)
    here = i < rectangle.rows * rectangle.columns
    averaged = here & (average_address != 0)
    place = i // rectangle.columns * rectangle.row_stride + i % rectangle.columns

    weight = tl.load(rectangle.weight + place, mask=here, other=0.0).to(tl.float32)
    gradient = tl.load(rectangle.gradient + place, mask=here, other=0.0).to(tl.float32)
    first = tl.load(rectangle.first + place, mask=here, other=0.0).to(tl.float32)
    second = tl.load(rectangle.second + place, mask=here, other=0.0).to(tl.float32)
    average = tl.load(rectangle.average + place, mask=averaged, other=0.0).to(tl.float32)
    number = steps + rectangle.step * _NUMBERS
    step = AdamWStep(
        tl.load(number),
        tl.load(number + 1),
        tl.load(number + 2),
        tl.load(number + 3),
        tl.load(number + 4),
        tl.load(number + 5),
        tl.load(number + 6),
        tl.load(number + 7),
    )
    weight *= step.decay
    first = _interpolate(first, gradient, step.first_weight)
    second = tl.fma(step.second_weight * gradient, gradient, second * step.second_decay)
    denominator = tl.div_rn(tl.sqrt_rn(second), step.correction) + step.eps
    weight += tl.div_rn(first * -step.step_size, denominator)
    average = _interpolate(average, weight, step.average_weight)
    dtype = like.dtype.element_ty
    tl.store(rectangle.weight + place, weight.to(dtype), mask=here)
    tl.store(rectangle.first + place, first.to(dtype), mask=here)
    tl.store(rectangle.second + place, second.to(dtype), mask=here)
    tl.store(rectangle.average + place, average.to(dtype), mask=averaged)


class _Launch(NamedTuple):
    """The arguments of a launch that stay the same from call to call; the kernel documents them.

    With an ``align`` of more than one element, memory is read and written in vectors.
    """

    align: int
    tiles: Tensor
    rectangles: Tensor


# Per table, and then per number of steps and addresses of the tensors, the launches.
_plans = WeakTensorKeyDictionary()


def adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    averages: Sequence[Tensor],
    rectangles: Tensor,
    steps: Tensor,
) -> None:
    like = weights[0]
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("adamw cannot be captured in a graph, which would repeat this step's numbers for ever")
    arrays = (weights, gradients, firsts, seconds, averages)
    addresses = tuple(tuple(t.data_ptr() for t in array) for array in arrays)
    plans, key = _plans.setdefault(rectangles, {}), (len(steps), addresses)
    if key not in plans:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        _check_arrays(*arrays)
        _check_rectangles(weights, rectangles, len(steps))
        plans[key] = _make_plan(like, addresses, rectangles)
    _check_steps(steps)
    numbers = _on_device(steps, like)
    for planned in plans[key]:
        launch(
            _adamw_kernel, (len(planned.tiles),), like, like, planned.tiles, planned.rectangles, numbers,
            ALIGN=planned.align, TILE=_TILE,
            # The compiler must not fuse on its own: both variants of the kernel compute the same bits.
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _make_plan(like: Tensor, addresses: Sequence[Sequence[int]], rectangles: Tensor) -> list[_Launch]:
    """One launch for rectangles that can be read in vectors and one for the others, of which one is mostly empty."""
    size = like.element_size()
    tensor, step, offset, rows, row_stride, columns = rectangles.unbind(1)
    starts = [
        torch.tensor(a, dtype=torch.int64, device="cpu")[tensor] + offset * size if a else torch.zeros_like(offset)
        for a in addresses
    ]
    tile_counts = (rows * columns + _TILE - 1) // _TILE
    table = torch.stack([*starts, step, rows, row_stride, columns, tile_counts], 1)
    in_vectors = ((torch.stack([*starts, row_stride * size, columns * size]) % 16) == 0).all(0)
    launches = []
    for align, chosen in ((16 // size, in_vectors), (1, ~in_vectors)):
        chosen_table, counts = table[chosen], tile_counts[chosen]
        chosen_table[:, -1] = counts.cumsum(0) - counts  # first_tile
        tiles = torch.repeat_interleave(counts).to(torch.int32)
        launches.append(_Launch(align, _on_device(tiles, like), _on_device(chosen_table, like)))
    return launches


def _on_device(tensor: Tensor, like: Tensor) -> Tensor:
    """Copy to the device of ``like`` from pinned memory, so that the host does not wait."""
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor


def _check_arrays(weights, gradients, firsts, seconds, averages) -> None:
    like = weights[0]
    if like.dtype not in _DTYPES:
        raise RuntimeError(f"weights: dtype float32, bfloat16 or float16 expected, {like.dtype} given")
    if INTERPRETED and like.device.type != "cpu":
        raise RuntimeError(f"weights: device cpu expected by Triton's interpreter, {like.device} given")
    for i, weight in enumerate(weights):
        if _reach(weight) >= 2**30:  # the kernel counts in 32 bits, and masked elements lie behind the last one
            raise RuntimeError(f"weights[{i}]: less than 2**30 elements from the first to the last expected")
    _check_like("weights", weights, weights)
    _check_like("gradients", gradients, weights)
    _check_like("firsts", firsts, weights)
    _check_like("seconds", seconds, weights)
    if averages:
        _check_like("averages", averages, weights)


def _check_like(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Check that all tensors have the weights' dtype and device, and each the shape and strides of its weight."""
    if len(tensors) != len(weights):
        raise RuntimeError(f"{name}: as many tensors as weights expected, {len(tensors)} for {len(weights)} given")
    dtype, device = weights[0].dtype, weights[0].device
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if tensor.dtype != dtype or tensor.device != device:
            given = f"{tensor.dtype} on {tensor.device}"
            raise RuntimeError(f"{name}: dtype {dtype} on {device} expected, {given} given")
        if tensor.shape != weight.shape or tensor.stride() != weight.stride():
            expected = f"shape {tuple(weight.shape)} and strides {weight.stride()}"
            given = f"{tuple(tensor.shape)} and {tensor.stride()}"
            raise RuntimeError(f"{name}[{i}]: {expected} of the weight expected, {given} given")


def _reach(tensor: Tensor) -> int:
    """How many elements of memory the tensor spans, from its first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 if tensor.numel() else 0


def _check_rectangles(weights: Sequence[Tensor], rectangles: Tensor, steps: int) -> None:
    if rectangles.dtype != torch.int64 or rectangles.device.type != "cpu":
        raise RuntimeError(f"rectangles: dtype int64 on the CPU expected, {rectangles.dtype} given")
    if rectangles.dim() != 2 or rectangles.shape[1] != 6 or not rectangles.is_contiguous():
        given = tuple(rectangles.shape)
        raise RuntimeError(f"rectangles: a contiguous tensor of shape (any, 6) expected, {given} given")
    reaches = [_reach(weight) for weight in weights]
    for tensor, step, offset, rows, stride, columns in rectangles.tolist():
        if not 0 <= tensor < len(weights) or not 0 <= step < steps:
            expected = f"tensor in [0, {len(weights)}) and step in [0, {steps})"
            raise RuntimeError(f"rectangles: {expected} expected, {tensor} and {step} given")
        possible = offset >= 0 and rows > 0 and columns > 0 and (rows == 1 or stride >= columns)
        if not possible or offset + (rows - 1) * stride + columns > reaches[tensor]:
            raise RuntimeError(
                f"rectangles: rows of columns inside the {reaches[tensor]} elements of tensor {tensor} expected; "
                f"offset {offset}, {rows} rows {stride} apart, {columns} columns given"
            )


def _check_steps(steps: Tensor) -> None:
    numbers = len(AdamWStep._fields)
    if steps.dtype != torch.float32 or steps.dim() != 2 or steps.shape[1] != numbers or not steps.is_contiguous():
        given = f"{steps.dtype} {tuple(steps.shape)}"
        raise RuntimeError(f"steps: a contiguous float32 tensor of shape (any, {numbers}) expected, {given} given")
