"""The whole network as one op on the CPU, from packed weights.

Packing lays out every weight in panels of some output channels, input channel by input channel, all in one tensor. The
slice of a width is the beginning of some panels, so one copy serves every width whose slices begin on a panel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydravit_kernels import backends, flops
from hydravit_kernels.parameters import NetworkParameters, NetworkSizes
from hydravit_kernels.ranges import annotate
from hydravit_kernels.subnetwork import Subnetwork
from hydravit_kernels.transforms import refuse_transforms

# kPanelMultiple of csrc/hydravit.h: the rows of a panel, which depend on the instruction set, divide it.
PANEL_MULTIPLE = 32

# How many subnetworks keep their plan. A model has a dozen widths, but callers may bring any subnetwork.
_MOST_KEPT = 256


class _Packed(NamedTuple):
    """The packed weights, and what belongs to this copy of them.

    ``offsets`` says where each parameter begins in ``weights``, or -1 if it is absent. ``panel`` counts the rows of a
    panel. A plan is a subnetwork's slices, resolved to addresses in ``weights``.
    """

    weights: Tensor
    offsets: list[int]
    panel: int
    plans: dict[Subnetwork, Tensor]


class CpuNetwork:
    """A network in float32, computed by the native kernels. Threads may share it: each has a workspace of its own.

    Args:
        parameters: tensors on the CPU, which are copied; weights of products in float32.
        sizes: the sizes of the full network.
    Raises:
        RuntimeError: the native kernels cannot run here, or a parameter has not the shape that ``sizes`` demands.
        ValueError: a parameter is missing.
    """

    def __init__(self, parameters: NetworkParameters, sizes: NetworkSizes):
        backends.select("native", "cpu", torch.float32)
        self.sizes = sizes
        self.pack(parameters)

    @staticmethod
    @functools.lru_cache(_MOST_KEPT)
    def why_not(subnetwork: Subnetwork) -> str:
        """Return why packed weights cannot serve the subnetwork, or "".

        They serve slices whose rows begin at a multiple of ``PANEL_MULTIPLE`` and follow each other without gaps.
        """
        starts = [subnetwork.embed.embed_offset, subnetwork.head.class_offset]
        for layer, s in enumerate(subnetwork.attention):
            if s.heads > 1 and not s.pitch == s.head_dim == s.value_dim:
                return f"the heads of layer {layer} do not lie side by side"
            starts += [s.query_row, s.key_row, s.value_row] if s.heads else []
        starts += [s.hidden_offset for s in subnetwork.mlp if s.hidden]
        others = [start for start in starts if start % PANEL_MULTIPLE]
        return f"its rows begin at {others[0]}, which is no multiple of {PANEL_MULTIPLE}" if others else ""

    def pack(self, parameters: NetworkParameters) -> None:
        """Copy the parameters anew. A call that runs in another thread finishes with the copy it began with."""
        self.sizes.check(parameters)
        with torch.no_grad():
            weights, offsets, panel = torch.ops.hydravit.pack_network_native(parameters.flat(), self.sizes)
        self._packed = _Packed(weights, offsets, panel, {})

    @annotate("network")
    def run(
        self,
        images: Tensor,
        subnetworks: Sequence[Subnetwork],
        width_index: Tensor | None = None,
        *,
        pooled_only: bool = True,
    ) -> Tensor:
        """Compute the logits ``(B, classes)`` of images ``(B, C, height, width)``, without gradients.

        Args:
            width_index: ``(B,)`` int64, the index of each image's subnetwork; None if there is one subnetwork.
            pooled_only: the last block computes only the tokens that the head pools, which gives the same bits with
                less work. False computes all tokens, for comparisons.
        Returns:
            Without a classifier the pooled features ``(B, Dk)``, zero beyond an image's own channels.
        """
        refuse_transforms("packed inference", images)
        packed = self._packed
        plans = [self._plan(packed, s) for s in subnetworks]
        columns = max(s.head.classes if self.sizes.classes else s.embed.embed for s in subnetworks)
        with torch.no_grad():
            return torch.ops.hydravit.network_native.default(
                images, packed.weights, plans, columns, width_index, pooled_only
            )

    def _plan(self, packed: _Packed, subnetwork: Subnetwork) -> Tensor:
        plan = packed.plans.get(subnetwork)
        if plan is None:
            if len(packed.plans) >= _MOST_KEPT:
                packed.plans.clear()
            plan = torch.ops.hydravit.plan_network_native(
                packed.weights, packed.offsets, packed.panel, self.sizes, *subnetwork.flat(), subnetwork.eps
            )
            flops.remember_plan(plan, self.sizes, subnetwork)
            packed.plans[subnetwork] = plan
        return plan
