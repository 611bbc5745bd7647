"""Gradients in place: backward adds to the slice of a persistent buffer, and what follows touches that slice only.

Ordinary PyTorch allocates and fills a full-size gradient per parameter and step, whatever the width. Here every
trainable parameter keeps one full-size ``.grad``. It is exactly zero outside the slices that were used since the last
``zero_``, so clearing it and computing its norm take those slices only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hydravit.geometry import parameter_slices
from hydravit.layers import Parameters
from hydravit.model import HydraViT
from hydravit.training.memory import zeros_like
from hydravit_kernels import Intervals, Subnetwork

# How many unions of widths keep their views. One width per image makes many different unions.
_CACHED_UNIONS = 64


class LiveSlices(NamedTuple):
    """The part of one parameter's gradient that may be nonzero, as disjoint views of ``parameter.grad``."""

    name: str
    parameter: nn.Parameter
    views: list[Tensor]


class SliceGradients:
    """Switches ``model`` to gradients in place, until ``close``.

    Use it in place of ``optimizer.zero_grad`` and ``clip_grad_norm_``::

        gradients = SliceGradients(model)
        gradients.zero_(); loss(model(images, heads=k)).backward(); gradients.clip_norm_(1.0); optimizer.step()

    The gradients equal the ordinary ones, but autograd never sees them. So the next forward refuses parameters with
    tensor hooks or post-accumulate hooks, and with compiled backends ``torch.autograd.grad`` for parameters and
    ``create_graph=True`` raise. ``DistributedDataParallel`` would wait for the gradients in vain: ranks call
    ``average_`` instead. A deep copy or a pickle of the model is in ordinary mode.

    Raises:
        RuntimeError: the model is already in this mode.
    """

    model: HydraViT
    _hook: RemovableHandle

    def __init__(self, model: HydraViT):
        if model.slice_gradients is not None:
            raise RuntimeError("the model already has its gradients in place; close the other SliceGradients first")
        self.model = model
        self._buffers: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = zeros_like(parameter)
                self._buffers[name] = parameter, parameter.grad
        self._marked: set[Subnetwork] = set()
        self._last_forward: tuple[Subnetwork, ...] = ()
        self._views: dict[frozenset[Subnetwork], list[LiveSlices]] = {}
        self._hook = model.register_forward_hook(_mark_in_backward)
        model.slice_gradients = self

    def __reduce__(self):
        return type(None), ()

    def close(self) -> None:
        """Return to ordinary gradients; the sums so far stay in ``.grad``."""
        self._hook.remove()
        if self.model.slice_gradients is self:
            self.model.slice_gradients = None

    def mark(self, subnetworks: Iterable[Subnetwork]) -> None:
        """Note that these subnetworks' slices are about to receive gradients. The model calls it in every forward.

        Raises:
            RuntimeError: a parameter has hooks, which would never fire, or its buffer was taken away.
        """
        for name, (parameter, _) in self._buffers.items():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f"parameter {name!r} has a gradient hook, which never fires with gradients in place; "
                    "remove it, or close SliceGradients"
                )
        self._check_buffers()
        if torch.compiler.is_compiling():  # symbolic widths would each need a graph: mark all
            subnetworks = [self.model.subnetwork(self.model.config.widths)]
        self._last_forward = tuple(subnetworks)
        self._marked.update(self._last_forward)

    @property
    def marked(self) -> frozenset[Subnetwork]:
        """The subnetworks whose slices may hold gradients: those of the forward passes since the last ``zero_``.

        Raises:
            RuntimeError: a parameter's buffer was taken away.
        """
        self._check_buffers()
        return frozenset(self._marked)

    def grads_of(self, parameters: Parameters) -> Parameters:
        """Return the buffers of ``StemParameters``, ``AttentionParameters``, ... in a tuple of the same kind."""
        return type(parameters)(*(None if p is None else self.grad_of(p) for p in parameters))  # type: ignore[arg-type]

    def grad_of(self, parameter: Tensor) -> Tensor | None:
        """Return the tensor to which backward adds the gradient of a parameter or of a view of one; None if frozen.

        It is the parameter's ``.grad``, or the same view of it.

        Raises:
            RuntimeError: the buffer was taken away.
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
        """Iterate over the parameters that have got gradients since the last ``zero_``; outside the views all is zero.

        The views are the products of intervals, which are per axis the union of what the marked subnetworks read.
        Parameters of skipped branches are left out.
        """
        marked = self.marked
        if marked not in self._views:
            if len(self._views) >= _CACHED_UNIONS:
                self._views.clear()
            self._views[marked] = list(self._make_views(marked))
        return iter(self._views[marked])

    def zero_(self) -> None:
        """Set every gradient to zero, by clearing its live part, and forget what was marked."""
        views = self._live_views()
        if views:
            torch._foreach_zero_(views)
        self._marked.clear()

    @torch.no_grad()
    def average_(self, group: dist.ProcessGroup | None = None) -> None:
        """Make every gradient the mean over the ranks of a process group; the ranks exchange its live part only.

        All ranks must call it, after their backward passes and before clipping. Since the last ``zero_`` all must have
        used the same subnetworks, which they do if their ``WidthSampler`` has the same seed and rank.
        """
        views = self._live_views()
        for dtype in dict.fromkeys(view.dtype for view in views):
            alike = [view for view in views if view.dtype == dtype]
            joined = torch.cat([view.flatten() for view in alike])
            joined /= dist.get_world_size(group)  # before the sum, which could overflow
            dist.all_reduce(joined, group=group)
            parts = joined.split([view.numel() for view in alike])
            torch._foreach_copy_(alike, [part.view(view.shape) for part, view in zip(parts, alike, strict=True)])

    def clip_norm_(self, max_norm: float) -> Tensor:
        """Do what ``torch.nn.utils.clip_grad_norm_`` does, on the live part; return the norm before, a scalar."""
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
    """Mark a forward's subnetworks again in its backward, because ``zero_`` may come between the two.

    This forward hook is not a method, so that the model can be copied and pickled with it.
    """
    gradients = model.slice_gradients
    if gradients is None or torch.compiler.is_compiling() or not (isinstance(output, Tensor) and output.requires_grad):
        return
    subnetworks = gradients._last_forward
    output.register_hook(lambda _: gradients._marked.update(subnetworks))


_GONE = (
    "the gradient buffer of parameter {name} is gone: optimizer.zero_grad() sets .grad to None by default, autograd "
    "with create_graph=True and model.to() replace it. With gradients in place call SliceGradients.zero_() instead"
)


def merge(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Return the union of ``(offset, length)`` intervals as ascending intervals that neither overlap nor touch."""
    merged: list[list[int]] = []
    for offset, length in sorted(intervals):
        if merged and offset <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], offset + length)
        else:
            merged.append([offset, offset + length])
    return tuple((start, stop - start) for start, stop in merged)
