"""An inference engine: it packs the weights once for all widths, and makes all else that calls need beforehand."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor

import hydravit_kernels as kernels
from hydravit.inference.packable import Packable
from hydravit.inference.packed import PackedWeights
from hydravit.inference.staleness import Fingerprint
from hydravit.integers import plain_int
from hydravit.structure import Structure

# Dtypes of weights and activations per type of device, the default first. With 8-bit weights, activations are float16.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float8_e4m3fn)}


class Engine:
    """Computes ``engine(images, heads=k)``, the float32 logits of evaluation mode, at any width and batch.

    Calls may change the width and the batch at no cost: a call allocates the logits, copies no weights and makes no
    graph, but for the first call of a width at a batch above 8 on CUDA, which makes its graph. The engine notices when
    optimizer steps, ``load_state_dict``, in-place operations or replaced parameters change the model's weights, and
    packs them again. Of writes that torch cannot see, through ``.data`` or a NumPy view, it notices on the CPU in the
    next call those to a quarter of a tensor or more; after smaller ones, and on CUDA, call ``model.weights_changed()``.
    It refuses a model with hooks, or modules of another kind than its own, because it runs none; hooks on the model
    itself do not fire. A copy or a pickle of an engine packs anew.

    On the CPU it runs the packed inference of ``native``, in float32, from the packed copy that the model and all its
    engines share; threads may share an engine. Models in shared memory have none. On CUDA an engine serves one thread
    and one stream at a time: make one for each. There it was never run, only emulated. On the
    CPU an image's logits have the same bits at any batch. On CUDA large batches may be multiplied by another family of
    kernels (wgmma, where sm_90a has it), and their bits may then differ.

    Args:
        max_batch: the most images of one call.
        dtype: the dtype of weights and activations; None: bfloat16 on CUDA, float32 on the CPU. CUDA also has float16,
            and float8_e4m3fn, which is for the matrices, with float16 activations: it halves their bytes and changes
            the logits (``with_e4m3_weights`` shows how).
        loader: see ``hydravit_kernels.CudaNetwork``; on the CPU there is only "best".
    Raises:
        ValueError, RuntimeError: the kernels cannot compute the dtype or the model, or they were not built; on the CPU,
            the model is in shared memory.
    """

    def __init__(self, model: Packable, max_batch: int = 8, dtype: torch.dtype | None = None, loader: str = "best"):
        max_batch = plain_int(max_batch)
        if type(max_batch) is not int or max_batch < 1:
            raise ValueError(f"max_batch must be an integer of at least 1, not {max_batch!r}")
        self.model, self.max_batch = model, max_batch
        self.device = model.pos_embed.device
        possible = DTYPES.get(self.device.type, DTYPES["cuda"])
        self.dtype = possible[0] if dtype is None else dtype
        if self.dtype not in possible:
            raise ValueError(f"dtype must be {' or '.join(map(str, possible))} on {self.device.type}, not {dtype}")
        if loader != "best" and self.device.type == "cpu":
            raise ValueError(f"loader={loader!r} is for engines on CUDA only")
        self._loader, self._config = loader, model.config
        self._subnetworks = {heads: model.subnetwork(heads) for heads in model.allowed_heads}
        if self.dtype not in DTYPES["cuda"]:  # the CPU has float32 only, which CUDA lacks
            _check_widths(self._subnetworks)
            self._weights: PackedWeights | None = PackedWeights.of(model)
            self._packed(self._weights)
            return
        self._weights = None
        self._remember(self._parameters())  # before packing: a weight that is written meanwhile makes it stale
        self._network = make_network(model, self.dtype, max_batch, loader)

    def __reduce__(self):  # copies and pickles pack anew
        return Engine, (self.model, self.max_batch, self.dtype, self._loader)

    def __call__(self, images: Tensor, heads: int | None = None) -> Tensor:
        """Compute the logits ``(B, classes)`` of images ``(B, in_channels, height, width)``.

        Args:
            heads: active heads; None: ``model.heads``.
        Raises:
            TypeError, ValueError: images or heads that do not fit the model or the engine.
            RuntimeError: the model was moved to another device, or has another classifier.
        """
        model = self.model
        if model.pos_embed.device != self.device:
            raise RuntimeError(f"the model was moved from {self.device} to {model.pos_embed.device}: make a new engine")
        if model.config is not self._config and model.config.sizes != self._config.sizes:
            raise RuntimeError("the model's config has changed: make a new engine")
        images = model.check_images(images)
        if len(images) > self.max_batch:
            raise ValueError(f"images: at most max_batch={self.max_batch} expected, {len(images)} given")
        heads = model.heads if heads is None else plain_int(heads)
        if type(heads) is not int or heads not in self._subnetworks:
            model.subnetwork(heads)  # raises for what is no width of the model
            raise ValueError(f"heads={heads} was no width of the model when the engine was made")
        subnetworks = (self._subnetworks[heads],)
        if self._weights is not None:
            return self._packed(self._weights).run(images, subnetworks)
        logits = self._network.run(images, subnetworks)
        # The check comes after the launch, while a GPU computes: fresh weights cost no time, stale ones a second run.
        parameters = self._parameters()
        if self._declared_changes != model.declared_changes or not self._fingerprint.holds(parameters):
            self._remember(parameters)
            self._network.pack(model.network_parameters())
            logits = self._network.run(images, subnetworks)
        return logits

    def _parameters(self) -> list[Tensor | None]:
        """The model's parameters now; raise if modules would have to run."""
        return _check_packable(self.model).parameters()

    def _packed(self, weights: PackedWeights) -> kernels.CpuNetwork:
        """The model's packed copy, made anew if it is stale."""
        parameters = self._parameters()
        network = weights.fresh(self.model, parameters)
        return weights.renew(self.model, parameters) if network is None else network

    def _remember(self, parameters: list[Tensor | None]) -> None:
        """Note what is about to be packed."""
        self._declared_changes, self._fingerprint = self.model.declared_changes, Fingerprint(parameters)


def _check_widths(subnetworks: dict[int, kernels.Subnetwork]) -> None:
    for heads, subnetwork in subnetworks.items():
        if reason := kernels.CpuNetwork.why_not(subnetwork):
            raise ValueError(f"engine: packed weights cannot serve heads={heads}: {reason}")


def make_network(model: Packable, dtype: torch.dtype, max_batch: int, loader: str = "best") -> kernels.Network:
    """Make the network of the model's device, with every allowed width; raise what ``Engine`` raises."""
    _check_packable(model)
    parameters, sizes = model.network_parameters(), model.config.sizes
    subnetworks = {heads: model.subnetwork(heads) for heads in model.allowed_heads}
    if dtype in DTYPES["cuda"]:
        return kernels.CudaNetwork(parameters, sizes, subnetworks.values(), dtype, max_batch, loader)
    _check_widths(subnetworks)
    return kernels.CpuNetwork(parameters, sizes)


def _check_packable(model: Packable) -> Structure:
    """Return the structure of the model; raise if modules would have to run."""
    structure = model.structure()
    if reason := structure.fused.unpackable:
        raise ValueError(f"engine: it runs none of the model's modules, but {reason}")
    return structure


Model = TypeVar("Model", bound=Packable)


def with_e4m3_weights(model: Model) -> Model:
    """Copy the model, on any device, and round its matrices as an engine of dtype float8_e4m3fn does.

    Raises ``ValueError`` for a distilled model, of which there is no engine.
    """
    if model.config.distilled:
        _check_packable(model)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.network_parameters().flat():
            if parameter is not None and parameter.dim() in (2, 4):  # tokens and positions have three axes
                rows, scales = kernels.to_e4m3(parameter)
                parameter.copy_((rows.double() * scales.double()).view_as(parameter))
    return rounded
