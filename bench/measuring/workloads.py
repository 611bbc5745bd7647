"""The workloads: one list for all peers, with the inputs, operations and bytes of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.measuring.dtypes import DTYPES
from hydravit import HydraViT
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.evaluation.cost import cost
from hydravit.geometry import every_width
from hydravit_kernels import Subnetwork
from hydravit_kernels.flops import attention_macs, mlp_macs


class Part(NamedTuple):
    """A part of a run, which ``--parts`` can name, and the tasks of its workloads."""

    about: str
    tasks: tuple[str, ...]


# A run goes through the parts in this order. The most informative come first, so that a deadline costs the least.
PARTS = {
    "inference": Part("the whole network, every width and batch", ("inference",)),
    "switching": Part("another width in every call, beside the same calls without switching", ("switching",)),
    "mixed": Part("one batch whose images differ in width, beside their shares of batches of one width", ("mixed",)),
    "memory": Part("what it takes to hold all widths ready; one process per peer", ("memory",)),
    "copies": Part("weight bytes that a call copies", ("copies",)),
    "cold": Part("one image, with the processor's caches flushed before every call", ("inference",)),
    "blocks": Part(
        "attention and MLP alone, forward, and forward and backward",
        ("attention", "mlp", "attention_backward", "mlp_backward"),
    ),
    "training": Part(
        "forward, backward and AdamW, every width and all in turn; large batches take minutes on a CPU", ("training",)
    ),
    "training_memory": Part("the most that such a step needs; one process per peer", ("training_memory",)),
}


class Workload(NamedTuple):
    """One thing to measure. ``heads`` is one width, or the widths that take turns or are held ready together.

    Tasks: ``inference``, the whole network; ``attention`` and ``mlp``, one block forward, and with ``_backward``
    forward and backward; ``training``, forward, backward and AdamW on everything; ``switching``, inference with
    another width in every call; ``mixed``, inference of a batch whose images have the widths in turn; ``memory``, all
    widths held ready; ``training_memory``, the most that a training step needs; ``copies``, weight bytes that one call
    copies. ``dtype`` is a key of ``DTYPES``; in training the parameters stay in float32 and the dtype is autocast's.
    ``cold``: the processor's caches are flushed before every call.
    """

    task: str
    heads: tuple[int, ...]
    batch: int
    dtype: str = "fp32"
    config: str | HydraViTConfig = "base"
    cold: bool = False

    @property
    def model(self) -> str:
        """The name of the full model."""
        return self.config if isinstance(self.config, str) else "custom"

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast in training, None without it."""
        return DTYPES[self.dtype] if self.dtype in ("bf16", "fp16") else None

    def __str__(self) -> str:
        cold = ", cold caches" if self.cold else ""
        return f"{self.task} k={','.join(map(str, self.heads))} batch {self.batch} {self.dtype} {self.model}{cold}"


def default_heads(config: HydraViTConfig) -> str:
    """The widths of ViT-Ti, ViT-S and ViT-B that the model has, as text for ``parse_heads``."""
    return ",".join(str(k) for k in (3, 6, 12) if k <= config.max_heads)


def workloads(
    parts: Sequence[str], heads: Sequence[int], batches: Sequence[int], dtypes: Sequence[str], config: str
) -> list[Workload]:
    """The workloads of ``parts`` (keys of ``PARTS``), the most informative first. ``heads``: the widths, ascending.

    Widths and batches come in the order smallest, largest, others. Parts about all widths together come once per
    dtype, at batch 1. All widths in turn are one more training workload.
    """
    every = tuple(heads)
    order, batches = (list(dict.fromkeys([min(v), max(v), *sorted(v)])) for v in (heads, batches))
    result = []
    for part in (part for part in PARTS if part in parts):
        for dtype in dtypes:
            if part in ("switching", "memory"):
                result.append(Workload(part, every, 1, dtype, config))
            elif part == "mixed":
                result.extend(
                    Workload(part, every, batch, dtype, config) for batch in batches if batch >= len(every) > 1
                )
            elif part in ("copies", "cold"):
                (task,), cold = PARTS[part].tasks, part == "cold"
                result.extend(Workload(task, (k,), 1, dtype, config, cold) for k in order)
            else:
                tasks = PARTS[part].tasks
                result.extend(
                    Workload(t, (k,), batch, dtype, config) for t in tasks for batch in batches for k in order
                )
                if part == "training" and len(every) > 1:
                    result.extend(Workload("training", every, batch, dtype, config) for batch in batches)
    return result


def images_of(workload: Workload, heads: int) -> slice:
    """Which images of a mixed batch have this width; in any other task all of them."""
    if workload.task != "mixed":
        return slice(None)
    return slice(workload.heads.index(heads), workload.batch, len(workload.heads))


class Needs(NamedTuple):
    """``flops``: floating-point operations of the matrix products (two per multiply-accumulate), nothing else.
    ``bytes``: compulsory traffic, every operand read once and every result written once, from and to memory.
    """

    flops: int
    bytes: int


@functools.cache
def needs(workload: Workload, pooled_only: bool = False, weight_bytes: int | None = None) -> Needs:
    """The least that one call of the workload takes; with several widths, one call of each.

    ``pooled_only``: see ``bench.measuring.peer.Peer``. ``weight_bytes``: size of a weight in inference, where it
    differs from the dtype's.
    """
    config = resolve_config(workload.config)
    parts = [_needs_of_width(workload, config, k, pooled_only, weight_bytes) for k in workload.heads]
    return Needs(sum(flops for flops, _ in parts), sum(moved for _, moved in parts))


def _needs_of_width(
    workload: Workload, config: HydraViTConfig, heads: int, pooled_only: bool, weight_bytes: int | None
) -> Needs:
    subnetworks = every_width(config)
    subnetwork = subnetworks[heads]
    params, macs = cost(config, subnetwork, pooled_only)
    batch = len(range(workload.batch)[images_of(workload, heads)])
    size = DTYPES[workload.dtype].itemsize
    images = batch * math.prod(config.image_shape)
    if workload.task.startswith("training"):
        stepped = cost(config, subnetworks[config.max_heads]).params
        stem = math.prod(config.grid) * subnetwork.embed.embed * config.in_channels * config.patch_size**2
        # Forward, and backward for the input and the weights; images need no gradient. AdamW reads four
        # values of float32 and writes three.
        return Needs(2 * batch * (3 * macs - stem), images * size + 7 * 4 * stepped)
    if workload.task.startswith(("attention", "mlp")):
        return _needs_of_block(workload, config, subnetwork)
    return Needs(2 * batch * macs, size * (images + batch * subnetwork.head.classes) + (weight_bytes or size) * params)


def _needs_of_block(workload: Workload, config: HydraViTConfig, subnetwork: Subnetwork) -> Needs:
    tokens, embed = config.tokens, subnetwork.embed.embed
    if workload.task.startswith("attention"):
        macs = sum(attention_macs(tokens, subnetwork.attention[0]))
        weights = embed * 4 * subnetwork.attention[0].heads * subnetwork.attention[0].head_dim
    else:
        macs = sum(mlp_macs(tokens, subnetwork.mlp[0]))
        weights = embed * 2 * subnetwork.mlp[0].hidden
    residual, size = workload.batch * tokens * embed, DTYPES[workload.dtype].itemsize
    if workload.task.endswith("backward"):  # also gradients of the residual and the weights
        return Needs(6 * workload.batch * macs, size * (4 * residual + 2 * weights))
    return Needs(2 * workload.batch * macs, size * (2 * residual + weights))


def make_model(workload: Workload, device: torch.device) -> HydraViT:
    """The workload's model with the same weights every time, large enough that an error in any block shows.

    With the usual initialisation a block adds so little to the residual that an error in it would hardly change the
    logits.
    """
    dtype = torch.float32 if workload.task.startswith("training") else DTYPES[workload.dtype]
    model = HydraViT(resolve_config(workload.config), backend="reference").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() in (2, 4) else 0
            parameter.normal_(0.0, fan_in**-0.5 if fan_in else 0.1, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    return model.to(device, dtype)


def make_images(workload: Workload, device: torch.device) -> Tensor:
    """Images ``(B, C, height, width)`` in the workload's dtype, the same every time."""
    shape = resolve_config(workload.config).image_shape
    images = torch.randn(workload.batch, *shape, generator=_generator(1))
    return images.to(device, torch.float32 if workload.task.startswith("training") else DTYPES[workload.dtype])


def make_labels(workload: Workload, device: torch.device) -> Tensor:
    """Classes ``(B,)``, the same every time."""
    classes = resolve_config(workload.config).num_classes
    return torch.randint(classes, (workload.batch,), generator=_generator(2)).to(device)


def make_residual(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """A residual ``(B, N, Dk)`` and the gradient of a block's output, the same every time."""
    config = resolve_config(workload.config)
    shape = (2, workload.batch, config.tokens, workload.heads[0] * config.head_dim)
    x, grad = torch.randn(shape, generator=_generator(3)).to(device, DTYPES[workload.dtype])
    return x, grad


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
