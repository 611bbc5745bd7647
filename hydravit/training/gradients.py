"""Gradients in place: backward adds into the slice of a persistent buffer, and later passes touch that slice only.

Ordinary PyTorch allocates and fills a full-size gradient per parameter and step, whatever the width. Here every
trainable parameter has one full-size ``.grad`` for good. Outside the slices used since the last ``zero_`` it is exactly
zero, so clearing it and its norm need those slices only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydravit.geometry import parameter_slices
from hydravit.layers import Parameters
from hydravit.training.memory import zeros_like
from hydravit_kernels import Intervals, Subnetwork

# Unions of widths whose views are kept. Per-image widths make many different unions.
_CACHED_UNIONS = 64


class LiveSlices(NamedTuple):
    """The part of one parameter's gradient that may be other than zero: disjoint views of ``parameter.grad``."""

    name: str
    parameter: nn.Parameter
    views: list[Tensor]


class SliceGradients:
    """Switches ``model`` to gradients in place, until ``close``.

    Use it in place of ``optimizer.zero_grad`` and ``clip_grad_norm_``::

        gradients = SliceGradients(model)
        gradients.zero_(); loss(model(images, heads=k)).backward(); gradients.clip_norm_(1.0); optimizer.step()

    The gradients equal the ordinary ones. What autograd would do with them does not happen, because it never sees them:
    tensor hooks and post-accumulate hooks on parameters are refused in the next forward; ``torch.autograd.grad`` for
    parameters and double backward raise with compiled backends; ``DistributedDataParallel`` around the model would
    never be told: ranks call ``average_`` instead. A deep copy or a pickle of the model is in ordinary mode.

    Raises:
        RuntimeError: if the model is already in this mode.
    """

    def __init__(self, model: nn.Module):
        if model.slice_gradients is not None:
            raise RuntimeError("the model already has its gradients in place; close the other SliceGradients first")
        self.model = model
        self._buffers: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = zeros_like(parameter)
                self._buffers[name] = parameter, parameter.grad
        self._marked: set[Subnetwork] = set()
        self._forward: tuple[Subnetwork, ...] = ()
        self._views: dict[frozenset[Subnetwork], list[LiveSlices]] = {}
        self._hook = model.register_forward_hook(_mark_in_backward)
        model.slice_gradients = self

    def __reduce__(self):
        return type(None), ()

    def close(self) -> None:
        """Back to ordinary gradients; what was accumulated stays in ``.grad``."""
        self._hook.remove()
        if self.model.slice_gradients is self:
            self.model.slice_gradients = None

    def mark(self, subnetworks: Iterable[Subnetwork]) -> None:
        """Note that these subnetworks' slices are about to receive gradients. The model calls it in every forward.

        Raises:
            RuntimeError: if a parameter has hooks, which would never fire, or its buffer was taken away.
        """
        for name, (parameter, _) in self._buffers.items():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f"parameter {name!r} has a gradient hook, which never fires with gradients in place; "
                    "remove it, or close SliceGradients"
                )
        self._check_buffers()
        if torch.compiler.is_compiling():  # a set of symbolic widths would make a graph for each: all is live
            subnetworks = [self.model.subnetwork(self.model.config.max_heads)]
        self._forward = tuple(subnetworks)
        self._marked.update(self._forward)

    @property
    def marked(self) -> frozenset[Subnetwork]:
        """The subnetworks whose slices may hold gradients: those of the forward passes since the last ``zero_``.

        Raises:
            RuntimeError: if a parameter's buffer was taken away.
        """
        self._check_buffers()
        return frozenset(self._marked)

    def buffers_of(self, parameters: Parameters) -> Parameters:
        """The tensors to which backward adds the gradients of a tuple of ``hydravit_kernels``' parameters."""
        return type(parameters)(*(None if p is None else self.buffer(p) for p in parameters))

    def buffer(self, parameter: Tensor) -> Tensor | None:
        """The tensor to which the gradient of a parameter, or of a view of one, is added; None if it is frozen.

        It is a view of ``.grad``.

        Raises:
            RuntimeError: if the buffer was taken away.
        """
        if not parameter.requires_grad:
            return None
        base = parameter if parameter._base is None else parameter._base
        if base.grad is None:
            raise RuntimeError(_GONE.format(name=f"of shape {tuple(base.shape)}"))
        if base is parameter:
            return base.grad
        # The buffer has its parameter's strides (zeros_like keeps them), so any view carries over.
        offset = parameter.storage_offset() - base.storage_offset()
        return base.grad.as_strided(parameter.size(), parameter.stride(), base.grad.storage_offset() + offset)

    def live(self) -> Iterator[LiveSlices]:
        """Every parameter with a gradient since the last ``zero_``, and where: no entry outside is other than zero.

        Per axis the union of the marked subnetworks' intervals; the rectangles are their products. Parameters of
        skipped branches are left out.
        """
        marked = self.marked
        if marked not in self._views:
            if len(self._views) >= _CACHED_UNIONS:
                self._views.clear()
            self._views[marked] = list(self._make_views(marked))
        return iter(self._views[marked])

    def zero_(self) -> None:
        """Set every gradient to zero, by clearing the live part, and forget what was live."""
        views = self._live_views()
        if views:
            torch._foreach_zero_(views)
        self._marked.clear()

    @torch.no_grad()
    def average_(self, group: dist.ProcessGroup | None = None) -> None:
        """Make every gradient the mean over the ranks of a process group; only the live part travels.

        All ranks call it, after their backward passes and before clipping. Each must have used the same subnetworks
        since the last ``zero_``, as with one ``WidthSampler`` seed and rank for all.
        """
        views = self._live_views()
        for dtype in dict.fromkeys(view.dtype for view in views):
            alike = [view for view in views if view.dtype == dtype]
            joined = torch.cat([view.flatten() for view in alike])
            joined /= dist.get_world_size(group)  # before they are added, so that no sum overflows that need not
            dist.all_reduce(joined, group=group)
            parts = joined.split([view.numel() for view in alike])
            torch._foreach_copy_(alike, [part.view(view.shape) for part, view in zip(parts, alike, strict=True)])

    def clip_norm_(self, max_norm: float) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over the live part: scales it, returns the norm it had, a scalar."""
        views = self._live_views()
        norm = torch.nn.utils.get_total_norm(views)
        if views:
            torch._foreach_mul_(views, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _live_views(self) -> list[Tensor]:
        return [view for slices in self.live() for view in slices.views]

    def _check_buffers(self) -> None:
        for name, (parameter, buffer) in self._buffers.items():
            if parameter.grad is not buffer:
                raise RuntimeError(_GONE.format(name=repr(name)))

    def _make_views(self, marked: frozenset[Subnetwork]) -> Iterator[LiveSlices]:
        slices = [parameter_slices(self.model.config, subnetwork) for subnetwork in marked]
        for name, (parameter, buffer) in self._buffers.items():
            used = [s.get(name, ()) for s in slices]
            used = [axes for axes in used if all(axes)]  # an axis without intervals: the branch is skipped
            if not used:
                continue
            union = [merge(interval for axes in used for interval in axes[axis]) for axis in range(len(used[0]))]
            views = []
            for rectangle in itertools.product(*union):
                view = buffer
                for axis, (offset, length) in enumerate(rectangle):
                    view = view.narrow(axis, offset, length)
                views.append(view)
            yield LiveSlices(name, parameter, views)


def _mark_in_backward(model, inputs, output) -> None:
    """So that ``zero_`` between a forward and its backward does not forget what that backward will write.

    A forward hook; not a method, so that the model can be copied and pickled with it.
    """
    gradients = model.slice_gradients
    if gradients is None or torch.compiler.is_compiling() or not (isinstance(output, Tensor) and output.requires_grad):
        return
    subnetworks = gradients._forward
    output.register_hook(lambda _: gradients._marked.update(subnetworks))


_GONE = (
    "the gradient buffer of parameter {name} is gone: optimizer.zero_grad() sets .grad to None by default, autograd "
    "with create_graph=True and model.to() replace it. With gradients in place call SliceGradients.zero_() instead"
)


def merge(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The union of ``(offset, length)`` intervals as ascending, disjoint ones that do not touch."""
    merged: list[list[int]] = []
    for offset, length in sorted(intervals):
        if merged and offset <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], offset + length)
        else:
            merged.append([offset, offset + length])
    return tuple((start, stop - start) for start, stop in merged)
