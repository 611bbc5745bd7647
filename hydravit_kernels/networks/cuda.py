"""The whole network as one call on CUDA. The packed weights and a workspace serve every width and batch.

It has never run on a GPU, only on the emulator of tests/cuda.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hydravit_kernels import _native
from hydravit_kernels.parameters import NetworkParameters, NetworkSizes
from hydravit_kernels.subnetwork import Subnetwork
from hydravit_kernels.transforms import refuse_transforms

try:
    from hydravit_kernels import _cuda  # type: ignore[attr-defined]  # a library without annotations

    _import_error = ""
except ImportError as error:
    _cuda, _import_error = None, str(error)


class PhaseTime(NamedTuple):
    """How long one phase of a call takes with one shape of its tiles.

    Attributes:
        tile: rows and columns of a product's tile, as in "32x64".
        count: how many phases of a call are alike.
        planned: whether calls use this tile.
        microseconds: for one phase, the mean over all layers.
    """

    name: str
    tile: str
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    planned: bool
    blocks: int
    microseconds: float


def to_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Convert rows to float8_e4m3fn and their float scales ``(rows, 1)``, bit for bit as a network of that dtype packs.

    The scale maps the largest weight of a row to the largest number of the dtype. It is taken over the full row, so
    that every width has the same weights. NaN and infinite weights become NaN and do not count for the scale.
    """
    rows = weight.detach().flatten(1).float()
    finite = rows.isfinite()
    largest = rows.abs().where(finite, 0.0).amax(1, keepdim=True)
    highest = rows.new_full((), torch.finfo(torch.float8_e4m3fn).max)  # a tensor: CUDA does not divide by it exactly
    scales = (largest / highest).clamp(min=torch.finfo(torch.float32).tiny)
    # Versions of PyTorch convert infinity differently, so it is replaced first.
    return (rows / scales).where(finite, torch.nan).to(torch.float8_e4m3fn), scales


class CudaNetwork:
    """A network in bf16 or fp16 with float accumulation and a float residual.

    With float8_e4m3fn only the matrices have that dtype, with a float scale per row; activations are then fp16.
    A network serves one thread and one CUDA stream at a time.

    Args:
        parameters: tensors on one CUDA device, in any floating dtype of 16 or 32 bits, which are copied.
        sizes: the sizes of the full network.
        subnetworks: the ones that calls may name.
        dtype: of weights and activations: bfloat16, float16 or float8_e4m3fn.
        max_batch: the most images of one call.
        loader: how tiles are loaded: "best" for the device, or "async", which is sm_80's way on newer devices too.
    Raises:
        RuntimeError: the kernels cannot run there, or a parameter has not the shape that ``sizes`` demands.
        ValueError: the kernels cannot compute the model, a subnetwork or the dtype, or a parameter is missing.
    """

    def __init__(
        self,
        parameters: NetworkParameters,
        sizes: NetworkSizes,
        subnetworks: Iterable[Subnetwork],
        dtype: torch.dtype,
        max_batch: int,
        loader: str = "best",
    ):
        self.device = parameters.stem.weight.device
        if reason := self.why_not(self.device):
            raise RuntimeError(f"the CUDA network {reason}")
        sizes.check(parameters)
        self.sizes = sizes
        self._index = {subnetwork: i for i, subnetwork in enumerate(subnetworks)}
        self._streams: set[torch.cuda.Stream] = set()
        with self._current():
            self._network = _cuda.CudaNetwork(sizes, _name(dtype), max_batch, self.device.index or 0, loader)
            for subnetwork in self._index:
                self._network.add_subnetwork(*sizes.validate(subnetwork).flat(), subnetwork.eps)
            bytes_wanted = (self._network.packed_bytes, self._network.workspace_bytes)
            self._memory = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in bytes_wanted]
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # the network writes at once, and earlier work may still use this memory
            self._network.use_memory(*(memory.data_ptr() for memory in self._memory))
        self.pack(parameters)

    @staticmethod
    def why_not(device: torch.device) -> str:
        """Return why there is no CUDA network on this device, or ""."""
        if device.type != "cuda":
            return f"has no kernels for device {device.type!r}"
        if _cuda is None:
            return f"was not built: {_native.build_info.get('cuda_why_not') or _import_error}"
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"needs compute capability 8.0 or newer, {device} has {major}.{minor}"

    @property
    def packed(self) -> Tensor:
        """The packed weights of all widths: bytes, laid out as csrc/cuda/phase.h says."""
        return self._memory[0]

    def pack(self, parameters: NetworkParameters) -> None:
        """Pack the parameters anew, on the current stream."""
        self.sizes.check(parameters)
        rows = [None if p is None else _rows(p.detach()) for p in parameters.flat()]
        table = [(0, "float32", 0) if r is None else (r.data_ptr(), _name(r.dtype), r.stride(0)) for r in rows]
        with self._current():
            self._network.pack(table, self._stream())

    def run(self, images: Tensor, subnetworks: Sequence[Subnetwork], width_index: Tensor | None = None) -> Tensor:
        """Compute the float32 logits of images ``(B, C, height, width)`` of 16 or 32 bits, on the current stream.

        Raises ``ValueError`` for more than one subnetwork, because a call on CUDA has one width.
        """
        refuse_transforms("the CUDA network", images)
        images = images.contiguous()  # a copy has to live until the call is launched
        index, ends, logits = self._ends(images, subnetworks)
        if len(images):
            with self._current():
                self._network.run(index, len(images), *ends, self._stream())
        return logits

    def time_phases(self, images: Tensor, subnetwork: Subnetwork, repeats: int = 20) -> list[PhaseTime]:
        """Measure how long each phase of a call takes by itself, with every shape of its tiles; wait for the result."""
        images = images.contiguous()
        index, ends, _logits = self._ends(images, [subnetwork])
        with self._current():
            times = self._network.time_phases(index, len(images), *ends, repeats, self._stream())
        return [PhaseTime(*time) for time in times]

    def _ends(self, images: Tensor, subnetworks: Sequence[Subnetwork]) -> tuple[int, tuple[int, str, int], Tensor]:
        """The subnetwork's index, where a call reads contiguous images and writes logits, and these logits."""
        if len(subnetworks) != 1:
            raise ValueError(f"subnetworks: one for all images expected on CUDA, {len(subnetworks)} given")
        (subnetwork,) = subnetworks
        columns = subnetwork.head.classes if self.sizes.classes else subnetwork.embed.embed
        logits = torch.empty(images.shape[0], columns, dtype=torch.float32, device=self.device)
        return self._index[subnetwork], (images.data_ptr(), _name(images.dtype), logits.data_ptr()), logits

    def _current(self) -> AbstractContextManager:
        """A context in which the network may make its device the current one; afterwards torch has its own again."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self.device)
        if stream not in self._streams:  # the network may be dropped while this stream still runs it
            self._streams.add(stream)
            for memory in self._memory:
                memory.record_stream(stream)
        return stream.cuda_stream


def _rows(parameter: Tensor) -> Tensor:
    """The parameter as a vector or as a matrix with contiguous rows, as a view if possible."""
    if parameter.dim() == 3:  # tokens: (1, count, channels)
        parameter = parameter[0]
    if parameter.dim() > 2:
        parameter = parameter.flatten(1)
    return parameter if parameter.stride(-1) == 1 else parameter.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
