"""AdamW and the moving average of the weights in one pass over rectangles of full-size parameters, in place.

AdamW is Adam with decoupled weight decay (arXiv 1711.05101); the numbers of a step are made as torch's fused AdamW
makes them, in double precision. With the gradient ``g``, for every element::

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
    """The numbers of one step: a row of the ops' ``steps``."""

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
        """Of step ``step``, counted from 1."""
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
    programs: Sequence[Sequence[AdamWStep]],
    *,
    backend: str,
) -> None:
    """Take rectangles of parameters through one or several steps; nothing outside of them is read or written.

    On one backend an element gets the same bits whatever rectangle it is in, and whether its steps come in one call or
    in several. A backend without this kernel leaves it to the reference.

    Args:
        weights, firsts, seconds: parameters and their moments, alike in shape, strides, dtype and device.
        gradients: theirs, which only the last step of a program sees, the others see zero; or empty: all see zero.
        averages: the moving averages; or empty: there are none.
        rectangles: int64 ``(R, 6)`` on the CPU: which tensor, which program, then as ``rectangles_of``; disjoint. It
            must not be changed later: a backend keeps what it made of it for as long as it lives.
        programs: lists of steps.
    Raises:
        RuntimeError: tensors or rectangles do not fit (the reference does not check); a CUDA graph is being captured,
            which would repeat the numbers of these steps.
    """
    bounds = [0]
    for program in programs:
        bounds.append(bounds[-1] + len(program))
    rows = [step for program in programs for step in program]
    steps = torch.tensor(rows, dtype=torch.promote_types(weights[0].dtype, torch.float32)).view(-1, 8)
    op = getattr(torch.ops.hydravit, f"adamw_{backend}", _reference)
    with torch.no_grad():
        op(weights, gradients, firsts, seconds, averages, rectangles, bounds, steps)


def rectangles_of(tensor: Tensor, box: Sequence[Interval]) -> list[tuple[int, int, int, int]]:
    """``(offset, rows, row stride, columns)`` in the tensor's memory: what a box ``((start, length), ...)`` covers.

    As few as possible: axes that lie one behind the other in memory become one.
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


def _reference(weights, gradients, firsts, seconds, averages, rectangles, bounds, steps) -> None:
    """Every operation is one of torch's that round once, so that an element's bits do not depend on its place."""
    steps = [AdamWStep(*row) for row in steps.tolist()]
    for index, program, *rectangle in rectangles.tolist():
        state = [tensors[index] for tensors in (weights, firsts, seconds, averages) if tensors]
        gradient = gradients[index] if gradients else None
        views = [_view(tensor, *rectangle) for tensor in state]
        begin, end = bounds[program : program + 2]
        for i in range(begin, end):
            seen = gradient is not None and i == end - 1
            values = [view.to(torch.promote_types(view.dtype, torch.float32)) for view in views]
            _advance(steps[i], _view(gradient, *rectangle).to(values[0].dtype) if seen else 0.0, *values)
            for view, value in zip(views, values, strict=True):
                view.copy_(value)


def _view(tensor: Tensor, offset: int, rows: int, row_stride: int, columns: int) -> Tensor:
    return tensor.data.as_strided((rows, columns), (row_stride, 1), tensor.storage_offset() + offset)


def _advance(step: AdamWStep, gradient: Tensor | float, weight, first, second, average=None) -> None:
    weight.mul_(step.decay)
    _interpolate(first, gradient, step.first_weight)
    second.mul_(step.second_decay).add_(gradient * step.second_weight * gradient)
    denominator = second.sqrt().div_(step.correction).add_(step.eps)
    weight.add_((first * -step.step_size).div_(denominator))
    if average is not None:
        _interpolate(average, weight, step.average_weight)


def _interpolate(start: Tensor, end: Tensor | float, weight: float) -> None:
    """``start + weight * (end - start)``, from the end that is nearer: with a weight of 1 it is ``end``, exactly."""
    difference = end - start
    if weight < 0.5:
        start.add_(difference.mul_(weight))
    else:
        start.copy_(difference.mul_(weight - 1.0).add_(end))
