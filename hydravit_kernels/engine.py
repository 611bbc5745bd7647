"""The CUDA network behind an engine: one packed copy of the weights and one workspace for every width and batch.

``cuda_network_why_not`` says why there is none. It was never run on a GPU, only on the emulator of tests/cuda.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hydravit_kernels import _native
from hydravit_kernels.parameters import NetworkSizes
from hydravit_kernels.slices import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice

try:
    from hydravit_kernels import _cuda

    _import_error = ""
except ImportError as error:
    _cuda, _import_error = None, str(error)


class SubnetSlices(NamedTuple):
    """The slices of one width: one attention and one MLP slice for each block."""

    stem: EmbedSlice
    attention: Sequence[AttentionSlice]
    mlp: Sequence[MlpSlice]
    head: HeadSlice
    eps: float


class PhaseTime(NamedTuple):
    """``tile``: of a product, "32x64", rows and columns; ``count``: phases of a call that are alike; ``planned``: the
    plan has this tile; ``microseconds``: of one phase, the mean of all layers'."""

    name: str
    tile: str
    count: int
    planned: bool
    blocks: int
    microseconds: float


def cuda_network_why_not(device: torch.device) -> str:
    """Why there is no CUDA network on this device, or ""."""
    if device.type != "cuda":
        return f"has no kernels for device {device.type!r}"
    if _cuda is None:
        return f"was not built: {_native.build_info.get('cuda_why_not') or _import_error}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"needs compute capability 8.0 or newer, {device} has {major}.{minor}"


def to_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8_e4m3fn and their float scales ``(rows, 1)``, bit for bit what a network of that dtype packs.

    The largest weight of a row becomes the largest number of the dtype. The row is that of the full matrix, so that
    every width has the same weights. NaN and infinite weights become NaN and do not count for the scale.
    """
    rows = weight.detach().flatten(1).float()
    finite = rows.isfinite()
    largest = rows.abs().where(finite, 0.0).amax(1, keepdim=True)
    highest = rows.new_full((), torch.finfo(torch.float8_e4m3fn).max)  # a tensor: by numbers CUDA does not quite divide
    scales = (largest / highest).clamp(min=torch.finfo(torch.float32).tiny)
    # What becomes of an infinite number differs between versions of PyTorch.
    return (rows / scales).where(finite, torch.nan).to(torch.float8_e4m3fn), scales


class CudaNetwork:
    """Every width of a network on one device, in bf16 or fp16 with float accumulation; the residual stream is float.

    Of float8_e4m3fn are only the matrices, each row with a float scale; activations are then fp16.

    Args:
        parameters: in the order of ``NetworkSizes.parameters``, on the device, in any floating dtype of 16 or 32 bits.
        image_size, pool: of the model; ``pool`` is the first token whose mean the head takes and the first behind.
        widths: the subnetworks that calls will name by their index.
        loader: "best" for the device, or "async": the way of sm_80, on a newer device too.

    Products are multiplied by mma, or by wgmma where a device of compute capability 9.0 has many rows to multiply.
    Within each of the two an image has the same bits at any batch size; the bits of mma and wgmma may differ. With
    ``loader="async"`` there is mma only.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor | None],
        image_size: tuple[int, int],
        pool: tuple[int, int],
        widths: Sequence[SubnetSlices],
        dtype: torch.dtype,
        most_images: int,
        loader: str = "best",
    ):
        n = NetworkSizes.of(parameters)
        grid = image_size[0] // n.patch_height, image_size[1] // n.patch_width
        sizes = {
            "depth": n.depth, "embed": n.embed, "hidden": n.hidden, "classes": n.classes, "channels": n.channels,
            "grid_height": grid[0], "grid_width": grid[1],
            "patch_height": n.patch_height, "patch_width": n.patch_width,
            "cls_tokens": n.cls_tokens, "reg_tokens": n.reg_tokens,
            "pos_on_prefix": int(n.positions != grid[0] * grid[1]),
            "pool_start": pool[0], "pool_stop": pool[1],
        }  # fmt: skip
        self.device = parameters[0].device
        self.most_images = most_images
        self._classes = [width.head.classes for width in widths]
        self._streams: set[torch.cuda.Stream] = set()
        with self._current():
            self._network = _cuda.CudaNetwork(sizes, _name(dtype), most_images, self.device.index or 0, loader)
            for width in widths:
                self._add(width)
            sizes = (self._network.packed_bytes, self._network.workspace_bytes)
            self._memory = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # other streams may still use what this memory held before
            self._network.use_memory(*(memory.data_ptr() for memory in self._memory))
        self.pack(parameters)

    def _add(self, width: SubnetSlices) -> None:
        for a in width.attention:
            if a.heads and not a.head_dim == a.value_dim == a.pitch == 64:
                raise ValueError(f"the CUDA network needs heads of 64 channels side by side, not {a}")
        self._network.add_subnetwork(
            tuple(width.stem),
            [(a.query_row, a.key_row, a.value_row, a.proj_column, a.heads, a.scale) for a in width.attention],
            [(m.hidden_offset, m.hidden) for m in width.mlp],
            (width.head.class_offset, width.head.classes),
            width.eps,
        )

    def pack(self, parameters: Sequence[Tensor | None]) -> None:
        """Read the parameters again, on the current stream."""
        rows = [None if p is None else _rows(p.detach()) for p in parameters]
        table = [(0, "float32", 0) if r is None else (r.data_ptr(), _name(r.dtype), r.stride(0)) for r in rows]
        with self._current():
            self._network.pack(table, self._stream())

    def run(self, images: Tensor, width: int) -> Tensor:
        """Images ``(B, C, height, width)`` of 16 or 32 bits to float32 logits, on the current stream."""
        images = images.contiguous()
        logits = torch.empty(images.shape[0], self._classes[width], device=self.device)
        if len(images):
            ends = (images.data_ptr(), _name(images.dtype), logits.data_ptr())
            with self._current():
                self._network.run(width, len(images), *ends, self._stream())
        return logits

    def time_phases(self, images: Tensor, width: int, repeats: int = 20) -> list[PhaseTime]:
        """How long each phase of a chain takes by itself, in every shape that its tiles can have; waits for it."""
        images = images.contiguous()
        logits = torch.empty(images.shape[0], self._classes[width], device=self.device)
        ends = (images.data_ptr(), _name(images.dtype), logits.data_ptr())
        with self._current():
            times = self._network.time_phases(width, len(images), *ends, repeats, self._stream())
        return [PhaseTime(*time) for time in times]

    def _current(self) -> AbstractContextManager:
        """The engine makes its device the current one, for torch too: within this, and no longer."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self.device)
        if stream not in self._streams:  # whoever drops the network may do so while this stream still runs it
            self._streams.add(stream)
            for memory in self._memory:
                memory.record_stream(stream)
        return stream.cuda_stream


def _rows(parameter: Tensor) -> Tensor:
    """As a vector, or a matrix whose rows are contiguous: a view wherever that is possible."""
    if parameter.dim() == 3:  # tokens: (1, count, channels)
        parameter = parameter[0]
    if parameter.dim() > 2:
        parameter = parameter.flatten(1)
    return parameter if parameter.stride(-1) == 1 else parameter.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
