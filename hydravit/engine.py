"""An inference engine: weights packed once for all widths, and everything else that a call needs, made beforehand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import hydravit_kernels as kernels
from hydravit.checks import check_batch
from hydravit.inference import Structure, in_order

if TYPE_CHECKING:
    from hydravit.model import HydraViT


# Of weights and activations, by the device's type; the first is the default. Beside 8-bit weights activations are fp16.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float8_e4m3fn)}


class Engine:
    """``engine(images, heads=k)``: float32 logits of evaluation mode, at any width and any batch up to ``max_batch``.

    Another width or batch in every call costs nothing: no allocation but the logits', no copy of weights, no graph to
    be made. The engine notices when the model's weights change, by optimizer steps, ``load_state_dict``, in-place
    operations and replaced parameters, and packs them again; writes that torch cannot see need
    ``model.weights_changed()``. It never runs hooks or other code of the model's modules. One engine serves one thread
    and one CUDA stream at a time: make one for each. On CUDA more than 8 images get their graph in their first call.

    On the CPU it runs the packed inference of ``native``, in float32, and an image's logits have the same bits at any
    batch. On CUDA it was never run, only emulated; there they have the same bits at any batches whose products are
    multiplied alike, all by mma or all by wgmma (README, limits).

    Args:
        max_batch: the most images of one call.
        dtype: of weights and activations; None: bfloat16 on CUDA, float32 on the CPU. CUDA also has float16, and
            float8_e4m3fn for the matrices beside float16 activations: half the bytes, and other logits
            (``with_e4m3_weights`` shows which).
        cuda: how CUDA does it: ``loader`` "best" (the default) or "async" (the way of sm_80, on any GPU).
    Raises:
        ValueError, RuntimeError: a dtype or a model that the kernels cannot compute, or kernels that were not built.
    """

    def __init__(self, model: HydraViT, max_batch: int = 8, dtype: torch.dtype | None = None, **cuda: str):
        if type(max_batch) is not int or max_batch < 1:
            raise ValueError(f"max_batch must be an integer of at least 1, not {max_batch!r}")
        self.model, self.max_batch = model, max_batch
        self.device = model.pos_embed.device
        possible = DTYPES.get(self.device.type, DTYPES["cuda"])
        self.dtype = possible[0] if dtype is None else dtype
        if self.dtype not in possible:
            raise ValueError(f"dtype must be {' or '.join(map(str, possible))} on {self.device.type}, not {dtype}")
        if cuda and self.device.type == "cpu":
            raise ValueError(f"{', '.join(cuda)}: for engines on CUDA only")
        self._network = (_CpuNetwork if self.device.type == "cpu" else _CudaNetwork)(self, **cuda)
        self._look()

    def __call__(self, images: Tensor, heads: int | None = None) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, in_channels, height, width)``; ``heads`` None: ``model.heads``."""
        model = self.model
        if model.pos_embed.device != self.device:
            raise RuntimeError(f"the model was moved from {self.device} to {model.pos_embed.device}: make a new engine")
        images = check_batch("images", images, (model.config.in_channels, *model.config.image_size), model.pos_embed)
        if len(images) > self.max_batch:
            raise ValueError(f"images: at most max_batch={self.max_batch} expected, {len(images)} given")
        heads = model.heads if heads is None else heads
        if type(heads) is not int or heads not in self._network.widths:
            model.geometry(heads)  # refuses what is no width of the model
            raise ValueError(f"heads={heads} was no width of the model when the engine was made")
        logits = self._network.run(images, heads)
        # Looked at behind the launch, where a GPU hides it: stale weights cost a second run, fresh ones no time.
        if self._changed():
            self._network.pack(in_order(model))
            self._look()
            logits = self._network.run(images, heads)
        return logits

    def _look(self) -> None:
        """Remember what the packed weights were made of."""
        self._structure = Structure(self.model)
        self._fingerprint = kernels.fingerprint(self._structure.parameters())
        self._unseen_writes = self.model.unseen_writes

    def _changed(self) -> bool:
        if self._unseen_writes != self.model.unseen_writes or not self._structure.holds():
            return True
        # Of what torch keeps no versions, only `weights_changed` tells.
        return self._fingerprint is not None and not self._fingerprint.holds(self._structure.parameters())


def with_e4m3_weights(model: HydraViT) -> HydraViT:
    """A copy of the model whose matrices are rounded as engines of dtype float8_e4m3fn round them, for any device."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in in_order(rounded):
            if parameter is not None and parameter.dim() in (2, 4):  # tokens and positions have three axes
                rows, scales = kernels.to_e4m3(parameter)
                parameter.copy_((rows.double() * scales.double()).view_as(parameter))
    return rounded


class _CpuNetwork:
    """The whole network as one op over packed weights; its workspace belongs to the calling thread."""

    def __init__(self, engine: Engine):
        model = engine.model
        kernels.select("native", engine.device, model.pos_embed.dtype)  # raises where it cannot run
        self._pool = model.pool_range
        self.widths: dict[int, tuple[kernels.NetworkSlices, float]] = {}
        for heads in model.allowed_heads:
            geometry = model.geometry(heads)
            of_width = (geometry.embed, geometry.attention, geometry.mlp, geometry.head)
            slices = kernels.slices_of_network(*([part] for part in of_width))
            if slices is None:
                raise ValueError(f"engine: packed weights cannot serve heads={heads}, which begins inside of a panel")
            self.widths[heads] = slices, geometry.eps
        self.pack(in_order(model))

    def pack(self, parameters: list[Tensor | None]) -> None:
        self._packed = kernels.pack(parameters)

    def run(self, images: Tensor, heads: int) -> Tensor:
        slices, eps = self.widths[heads]
        with torch.no_grad():
            return kernels.network(images, self._packed, slices, self._pool, eps)


class _CudaNetwork:
    def __init__(self, engine: Engine, **cuda: str):
        reason = kernels.cuda_network_why_not(engine.device)
        if reason:
            raise RuntimeError(f"engine: the CUDA network {reason}")
        self.widths = {heads: i for i, heads in enumerate(engine.model.allowed_heads)}
        self._network = cuda_network(engine.model, engine.dtype, engine.max_batch, **cuda)

    def pack(self, parameters: list[Tensor | None]) -> None:
        self._network.pack(parameters)

    def run(self, images: Tensor, heads: int) -> Tensor:
        return self._network.run(images, self.widths[heads])


def cuda_network(model: HydraViT, dtype: torch.dtype, max_batch: int, **cuda: str) -> kernels.CudaNetwork:
    """What computes on CUDA; its widths are numbered as in ``model.allowed_heads``."""
    geometries = [model.geometry(heads) for heads in model.allowed_heads]
    widths = [kernels.SubnetSlices(g.embed, g.attention, g.mlp, g.head, g.eps) for g in geometries]
    how = (model.config.image_size, model.pool_range, widths, dtype, max_batch)
    return kernels.CudaNetwork(in_order(model), *how, **cuda)
