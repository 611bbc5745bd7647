"""AdamW and the moving average of the weights in one pass over rectangles of full-size parameters, in place.

AdamW is Adam with decoupled weight decay (arXiv 1711.05101). The numbers of a step are computed in double precision, as
in torch's fused AdamW. With the gradient ``g``, for every element::

    weight *= decay
    first += first_weight * (g - first)
    second = second_decay * second + second_weight * g * g
    weight -= step_size * first / (sqrt(second) / correction + eps)
    average += average_weight * (weight - average)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Interval = tuple[int, int]


class AdamWStep(NamedTuple):
    """The numbers of one step, in the order of a row of the ops' ``steps``."""

    decay: float
    first_weight: float
    second_decay: float
    second_weight: float
    correction: float
    eps: float
    step_size: float
    average_weight: float

    @classmethod
    def at(
        cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, average_decay: float
    ) -> AdamWStep:
        """The numbers of step ``step``, counted from 1."""
        beta1, beta2 = betas
        return cls(
            1 - lr * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            math.sqrt(1 - beta2**step),
            eps,
            lr / (1 - beta1**step),
            1 - average_decay,
        )


def adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    averages: Sequence[Tensor],
    rectangles: Tensor,
    steps: Sequence[AdamWStep],
    *,
    backend: str,
) -> None:
    """Take rectangles of parameters through one step; nothing outside them is read or written.

    On one backend an element gets the same bits whatever rectangle it is in. A backend without a kernel of its own uses
    the reference.

    Args:
        weights, gradients, firsts, seconds: the parameters, their gradients, and their first and second moments, with
            the same shapes, strides, dtype and device.
        averages: the moving averages, like the weights; or empty if there are none.
        rectangles: int64 ``(R, 6)`` on the CPU, disjoint. A row is the index of the tensor, the index of its step in
            ``steps``, and the four integers of ``rectangles_of``. Callers must not change it later, because a backend
            keeps what it derives from it for as long as the tensor lives.
        steps: the numbers of the steps. They differ for rectangles that have taken different numbers of steps.
    Raises:
        RuntimeError: tensors or rectangles do not fit (the reference does not check), or a CUDA graph is being
            captured, which would repeat the numbers of this step.
    """
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    numbers = torch.tensor(steps, dtype=dtype, device="cpu").view(-1, len(AdamWStep._fields))
    op = getattr(torch.ops.hydravit, f"adamw_{backend}", _reference)
    with torch.no_grad():
        op(weights, gradients, firsts, seconds, averages, rectangles, numbers)


def rectangles_of(tensor: Tensor, box: Sequence[Interval]) -> list[tuple[int, int, int, int]]:
    """The rectangles ``(offset, rows, row stride, columns)`` of memory that make up a box ``((start, length), ...)``.

    Axes that are contiguous in memory are joined, so that the rectangles are few.
    """
    offset = sum(start * stride for (start, _), stride in zip(box, tensor.stride(), strict=True))
    axes = [(stride, length) for (_, length), stride in zip(box, tensor.stride(), strict=True) if length > 1]
    joined: list[tuple[int, int]] = []  # (stride, length), innermost first
    for stride, length in sorted(axes):
        if joined and stride == joined[-1][0] * joined[-1][1]:
            joined[-1] = joined[-1][0], joined[-1][1] * length
        else:
            joined.append((stride, length))
    _, columns = joined.pop(0) if joined and joined[0][0] == 1 else (1, 1)
    stride, rows = joined.pop(0) if joined else (columns, 1)
    offsets = [offset]
    for outer, length in joined:
        offsets = [start + i * outer for start in offsets for i in range(length)]
    return [(start, rows, stride, columns) for start in offsets]


def _reference(weights, gradients, firsts, seconds, averages, rectangles, steps) -> None:
    """Take the step with torch's operations that round once, so that an element's bits do not depend on its place."""
    numbers = [AdamWStep(*row) for row in steps.tolist()]
    for index, step, *rectangle in rectangles.tolist():
        lists = (gradients, weights, firsts, seconds, averages)
        views = [_view(tensors[index], *rectangle) for tensors in lists if tensors]
        gradient, *values = (view.to(torch.promote_types(view.dtype, torch.float32)) for view in views)
        _advance(numbers[step], gradient, *values)
        for view, value in zip(views[1:], values, strict=True):
            view.copy_(value)


def _view(tensor: Tensor, offset: int, rows: int, row_stride: int, columns: int) -> Tensor:
    return tensor.data.as_strided((rows, columns), (row_stride, 1), tensor.storage_offset() + offset)


def _advance(step: AdamWStep, gradient: Tensor, weight, first, second, average=None) -> None:
    weight.mul_(step.decay)
    _interpolate(first, gradient, step.first_weight)
    second.mul_(step.second_decay).add_(gradient * step.second_weight * gradient)
    denominator = second.sqrt().div_(step.correction).add_(step.eps)
    weight.add_((first * -step.step_size).div_(denominator))
    if average is not None:
        _interpolate(average, weight, step.average_weight)


def _interpolate(start: Tensor, end: Tensor, weight: float) -> None:
    """``start + weight * (end - start)``, computed from the nearer end, so that a weight of 1 gives exactly ``end``."""
    difference = end - start
    if weight < 0.5:
        start.add_(difference.mul_(weight))
    else:
        start.copy_(difference.mul_(weight - 1.0).add_(end))
