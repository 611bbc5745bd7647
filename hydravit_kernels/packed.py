"""Every parameter of a network in one tensor, laid out for inference by the native kernels on a CPU.

A weight lies there in panels of ``PANEL`` output channels, input channel by input channel. The slice of a narrower
width is the beginning of some panels, so this one copy serves every width that begins on a panel.
"""

from __future__ import annotations

import itertools
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
    """``offsets``: where every parameter begins, -1 where it is absent."""

    tensor: Tensor
    offsets: list[int]
    sizes: NetworkSizes


class NetworkSlices(NamedTuple):
    """The slices of one call, block after block and within a block width after width, flat as the op takes them."""

    stem: list[int]
    attention: list[int]
    mlp: list[int]
    head: list[int]
    scales: list[float]


def pack(parameters: Sequence[Tensor | None]) -> Packed:
    """Copy a network's float32 parameters, in the order of ``NetworkSizes.parameters``; raises what that does."""
    network = NetworkSizes.of(parameters)
    weights = [expected.weight for expected in network.parameters()]
    sizes = [_size(p, w) for p, w in zip(parameters, weights, strict=True)]
    starts = itertools.accumulate(sizes, initial=0)
    offsets = [-1 if p is None else start for p, start in zip(parameters, starts, strict=False)]
    packed = torch.empty(sum(sizes))
    for parameter, weight, offset, size in zip(parameters, weights, offsets, sizes, strict=True):
        if parameter is None:
            continue
        place = packed[offset : offset + size]
        if weight:
            torch.ops.hydravit.pack_weight_native(parameter.detach(), place)
        else:
            place[: parameter.numel()].view(parameter.shape).copy_(parameter.detach())
    return Packed(packed, offsets, network)


def _size(parameter: Tensor | None, weight: bool) -> int:
    """Floats; every parameter begins on a cache line."""
    if parameter is None:
        return 0
    if not weight:
        return -(-parameter.numel() // 16) * 16
    rows = -(-parameter.shape[0] // PANEL) * PANEL
    return rows * (parameter.numel() // parameter.shape[0])


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
) -> NetworkSlices | None:
    """The slices of every width; of attention and MLP per width one for each block.

    None if packed weights cannot serve: they do for rows that begin on a panel and lie side by side.
    """
    in_attention, in_mlp = ([s for block in zip(*widths, strict=True) for s in block] for widths in (attention, mlp))
    for s in in_attention:
        starts = (s.embed_offset, s.query_row, s.key_row, s.value_row)
        apart = s.heads > 1 and not s.pitch == s.head_dim == s.value_dim
        if s.heads and (apart or any(start % PANEL for start in starts)):
            return None
    starts = [s.embed_offset for s in stem] + [s.hidden_offset for s in in_mlp if s.hidden]
    starts += [s.class_offset for s in head]
    if any(start % PANEL for start in starts):
        return None
    scales = [s.scale for s in in_attention]
    return NetworkSlices(flatten(stem), flatten(in_attention), flatten(in_mlp), flatten(head), scales)


@annotate("network")
def network(
    images: Tensor,
    packed: Packed,
    slices: NetworkSlices,
    pool: tuple[int, int],
    eps: float,
    subnet: Tensor | None = None,
    *,
    pooled_only: bool = True,
) -> Tensor:
    """All blocks in one call, without gradients: images ``(B, C, height, width)`` to logits ``(B, classes)``.

    ``pool``, ``subnet`` and the result as in ``head``. ``pooled_only``: the last block computes only the tokens that
    the head pools, which gives the same bits with less work; False computes all, for comparisons.
    """
    rest = (*pool, *slices, eps, subnet, pooled_only)
    return torch.ops.hydravit.network_native.default(images, *packed, *rest)
