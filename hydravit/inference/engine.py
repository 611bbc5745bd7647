"""An inference engine: weights packed once for all widths, and everything else that a call needs, made beforehand."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor

import hydravit_kernels as kernels
from hydravit.inference.packable import Packable
from hydravit.inference.staleness import Fingerprint, Structure

# Dtypes of weights and activations, per type of device; the first is the default. Beside 8-bit weights activations are
# fp16.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float8_e4m3fn)}


class Engine:
    """``engine(images, heads=k)``: float32 logits of evaluation mode, at any width and any batch up to ``max_batch``.

    Another width or batch in every call costs nothing: no allocation but the logits', no copy of weights, no graph to
    be made. The engine notices when the model's weights change, by optimizer steps, ``load_state_dict``, in-place
    operations and replaced parameters, and packs them again; writes that torch cannot see need
    ``model.weights_changed()``. It never runs hooks or other code of the model's modules. One engine serves one thread
    and one CUDA stream at a time: make one for each. On CUDA a batch of more than 8 images gets its graph in its first
    call.

    On the CPU it runs the packed inference of ``native``, in float32. On CUDA it was never run, only emulated. An
    image's logits have the same bits at any batch that the same kernel family serves.

    Args:
        max_batch: the most images of one call.
        dtype: of weights and activations; None: bfloat16 on CUDA, float32 on the CPU. CUDA also has float16, and
            float8_e4m3fn for the matrices beside float16 activations: half the bytes, and other logits
            (``with_e4m3_weights`` shows which).
        cuda: options of ``hydravit_kernels.CudaNetwork``, for CUDA only.
    Raises:
        ValueError, RuntimeError: a dtype or a model that the kernels cannot compute, or kernels that were not built.
    """

    def __init__(self, model: Packable, max_batch: int = 8, dtype: torch.dtype | None = None, **cuda: str):
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
        self._subnetworks = {heads: model.subnetwork(heads) for heads in model.allowed_heads}
        self._network = make_network(model, self.dtype, max_batch, **cuda)
        self._remember()

    def __call__(self, images: Tensor, heads: int | None = None) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, in_channels, height, width)``; ``heads`` None: ``model.heads``."""
        model = self.model
        if model.pos_embed.device != self.device:
            raise RuntimeError(f"the model was moved from {self.device} to {model.pos_embed.device}: make a new engine")
        images = model.check_images(images)
        if len(images) > self.max_batch:
            raise ValueError(f"images: at most max_batch={self.max_batch} expected, {len(images)} given")
        heads = model.heads if heads is None else heads
        if type(heads) is not int or heads not in self._subnetworks:
            model.subnetwork(heads)  # refuses what is no width of the model
            raise ValueError(f"heads={heads} was no width of the model when the engine was made")
        subnetworks = (self._subnetworks[heads],)
        logits = self._network.run(images, subnetworks)
        # Checked after the launch, where a GPU hides it: stale weights cost a second run, fresh ones no time.
        if self._is_stale():
            self._network.pack(model.network_parameters())
            self._remember()
            logits = self._network.run(images, subnetworks)
        return logits

    def _remember(self) -> None:
        """Note what the packed weights were made of."""
        self._structure = Structure(self.model)
        self._fingerprint = Fingerprint.take(self._structure.parameters())
        self._unseen_writes = self.model.unseen_writes

    def _is_stale(self) -> bool:
        if self._unseen_writes != self.model.unseen_writes or not self._structure.holds():
            return True
        # Without a fingerprint torch sees no changes, and only `weights_changed` tells of them.
        return self._fingerprint is not None and not self._fingerprint.holds(self._structure.parameters())


def make_network(model: Packable, dtype: torch.dtype, max_batch: int, **cuda: str) -> kernels.Network:
    """The network of the model's device, with every allowed width; raises what ``Engine`` does."""
    parameters, sizes = model.network_parameters(), model.config.sizes
    subnetworks = {heads: model.subnetwork(heads) for heads in model.allowed_heads}
    if dtype in DTYPES["cuda"]:  # the CPU has float32 only, which CUDA lacks
        return kernels.CudaNetwork(parameters, sizes, subnetworks.values(), dtype, max_batch, **cuda)
    for heads, subnetwork in subnetworks.items():
        if reason := kernels.CpuNetwork.why_not(subnetwork):
            raise ValueError(f"engine: packed weights cannot serve heads={heads}: {reason}")
    return kernels.CpuNetwork(parameters, sizes)


Model = TypeVar("Model", bound=Packable)


def with_e4m3_weights(model: Model) -> Model:
    """A copy of the model whose matrices are rounded as engines of dtype float8_e4m3fn round them, for any device."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.network_parameters().flat():
            if parameter is not None and parameter.dim() in (2, 4):  # tokens and positions have three axes
                rows, scales = kernels.to_e4m3(parameter)
                parameter.copy_((rows.double() * scales.double()).view_as(parameter))
    return rounded
