"""Every parameter of a network in one tensor, laid out for inference by the native kernels on a CPU.

A weight lies there in panels of ``PANEL`` output channels, input channel by input channel. The slice of a narrower
width is the beginning of some panels, so this one copy serves every width that begins on a panel.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from hydravit_kernels.parameters import NetworkSizes
from hydravit_kernels.ranges import annotate
from hydravit_kernels.slices import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, flatten

PANEL = 32  # kPanel of csrc/hydravit.h


class Packed(NamedTuple):
    """``offsets``: where every parameter begins, -1 where it is absent. ``plans``: those made so far."""

    tensor: Tensor
    offsets: list[int]
    sizes: list[int]
    plans: dict[tuple, Tensor]


class SubnetworkIntegers(NamedTuple):
    """One subnetwork as ``plan_network_native`` takes it, and the columns of its result with and without classifier."""

    integers: tuple[int, ...]
    scales: tuple[float, ...]
    classes: int
    embed: int


def pack(parameters: Sequence[Tensor | None], image_size: tuple[int, int], pool: tuple[int, int]) -> Packed:
    """Copy a network's float32 parameters, in the order of ``NetworkSizes.parameters``; raises what that does."""
    sizes = [*NetworkSizes.of(parameters), *image_size, *pool]
    detached = [None if p is None else p.detach() for p in parameters]
    return Packed(*torch.ops.hydravit.pack_network_native(detached, sizes), sizes, {})


class Fingerprint:
    """What a packed copy was made of."""

    def __init__(self, parameters: Sequence[Tensor | None]):
        self._optimizer_steps = _optimizer_steps
        # By identity: another tensor may get the memory of one that is gone.
        self._tensors = [_nothing if p is None else weakref.ref(p) for p in parameters]
        self._states = _states(parameters)

    def holds(self, parameters: Sequence[Tensor | None]) -> bool:
        """Whether these are the same, unchanged as far as torch can see."""
        same = self._optimizer_steps == _optimizer_steps and len(self._tensors) == len(parameters)
        same = same and all(tensor() is p for tensor, p in zip(self._tensors, parameters, strict=True))
        return same and self._states == _states(parameters)


def _nothing() -> None:
    return None


def _states(parameters: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    present = [p for p in parameters if p is not None]
    return [p.data_ptr() for p in present], [p._version for p in present]


_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change parameters without a trace in their version.
register_optimizer_step_post_hook(_count_step)


def fingerprint(parameters: Sequence[Tensor | None]) -> Fingerprint | None:
    """None where changes go unseen, as of tensors made under ``torch.inference_mode``, or where there is no memory to
    copy, as of fake tensors and inside ``torch.func.vmap``.
    """
    if any(p is not None and type(p) not in (Tensor, Parameter) for p in parameters):
        return None
    try:
        return Fingerprint(parameters)
    except RuntimeError:
        return None


def slices_of_network(
    stem: Sequence[EmbedSlice],
    attention: Sequence[Sequence[AttentionSlice]],
    mlp: Sequence[Sequence[MlpSlice]],
    head: Sequence[HeadSlice],
) -> list[SubnetworkIntegers] | None:
    """The slices of every width; of attention and MLP per width one for each block.

    None if packed weights cannot serve: they do for rows that begin on a panel and lie side by side.
    """
    in_attention, in_mlp = ([s for width in widths for s in width] for widths in (attention, mlp))
    for s in in_attention:
        starts = (s.embed_offset, s.query_row, s.key_row, s.value_row)
        apart = s.heads > 1 and not s.pitch == s.head_dim == s.value_dim
        if s.heads and (apart or any(start % PANEL for start in starts)):
            return None
    starts = [s.embed_offset for s in stem] + [s.hidden_offset for s in in_mlp if s.hidden]
    starts += [s.class_offset for s in head]
    if any(start % PANEL for start in starts):
        return None
    return [_integers(*width) for width in zip(stem, attention, mlp, head, strict=True)]


def _integers(stem, attention, mlp, head) -> SubnetworkIntegers:
    layers = [part for layer in zip(attention, mlp, strict=True) for part in layer]
    integers = tuple(flatten([stem, *layers, head]))
    return SubnetworkIntegers(integers, tuple(s.scale for s in attention), head.classes, head.embed)


def plan(packed: Packed, subnetwork: SubnetworkIntegers, eps: float) -> Tensor:
    key = (subnetwork, eps)
    found = packed.plans.get(key)
    if found is None:
        rest = (packed.sizes, subnetwork.integers, subnetwork.scales, eps)
        found = packed.plans[key] = torch.ops.hydravit.plan_network_native(packed.tensor, packed.offsets, *rest)
    return found


@annotate("network")
def network(
    images: Tensor,
    packed: Packed,
    subnetworks: Sequence[SubnetworkIntegers],
    eps: float,
    subnet: Tensor | None = None,
    *,
    pooled_only: bool = True,
) -> Tensor:
    """All blocks in one call, without gradients: images ``(B, C, height, width)`` to logits ``(B, classes)``.

    ``subnet`` and the result as in ``head``. ``pooled_only``: the last block computes only the tokens that the head
    pools, which gives the same bits with less work; False computes all, for comparisons.
    """
    plans = [plan(packed, subnetwork, eps) for subnetwork in subnetworks]
    columns = max(s.classes if packed.sizes[9] else s.embed for s in subnetworks)
    return torch.ops.hydravit.network_native.default(images, packed.tensor, plans, columns, subnet, pooled_only)
