"""The backends of this repository: a peer each, and further peers that leave work out or do it in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import hydravit_kernels as kernels
from bench.measuring.peer import Absent, Peer, Step
from bench.peers.training import OPTIONS, block_parameters, block_step, cut_block, train_steps, without_gradients
from hydravit import HydraViT
from hydravit.evaluation.latency import with_backend
from hydravit.inference import PackedInference
from hydravit.training import SliceAdamW, SliceGradients
from hydravit_kernels import backends


def _on(model: HydraViT, backend: str) -> HydraViT:
    """The model on a backend, its parameters shared. Raises ``Absent`` where the backend cannot run."""
    try:
        return with_backend(model, backend)
    except RuntimeError as error:
        raise Absent(str(error)) from error


def _inference(backend: str, pooled_only: bool, model: HydraViT, images: Tensor, heads: Sequence[int]):
    own = _on(model, backend)
    own.packed_inference = PackedInference(pooled_only)
    for _ in range(2):  # the second call packs the weights
        without_gradients(partial(own, images, heads=heads[0]))()
    return {k: without_gradients(partial(own, images, heads=k)) for k in heads}


def _engine(weights: str, model: HydraViT, images: Tensor, heads: Sequence[int]):
    if images.device.type == "cpu":
        raise Absent("same as native on a CPU")
    if images.dtype not in (torch.bfloat16, torch.float16):
        raise Absent(f"computes in bf16 or fp16, not in {images.dtype}")
    try:
        engine = model.engine(len(images), torch.float8_e4m3fn if weights == "e4m3" else images.dtype)
    except (RuntimeError, ValueError) as error:
        raise Absent(str(error)) from error
    return {k: partial(engine, images, heads=k) for k in heads}


def _mixed(backend: str, pooled_only: bool, model: HydraViT, images: Tensor, heads: Sequence[int]):
    widths = torch.tensor(heads, device=images.device)
    return _inference(backend, pooled_only, model, images, [widths])[widths]


def _block(backend: str, model: HydraViT, kind: str, heads: int, x: Tensor, grad: Tensor | None) -> Step:
    subnetwork, block = _on(model, backend).subnetwork(heads), model.blocks[0]
    if kind == "attention":
        function, own, slices = kernels.attention_block, block.attention_parameters(), subnetwork.attention[0]
    else:
        function, own, slices = kernels.mlp_block, block.mlp_parameters(), subnetwork.mlp[0]

    def forward(x: Tensor) -> Tensor:
        return function(x, own, None, [slices], subnetwork.eps, backend=backend)

    return block_step(forward, block_parameters(block, kind), x, grad, partial(cut_block, model=model, heads=heads))


def _training(
    backend: str,
    in_place: bool,
    pooled_only: bool,
    active: bool,
    model: HydraViT,
    images: Tensor,
    labels: Tensor,
    heads: Sequence[int],
    amp,
) -> dict[int, Step]:
    """``active``: AdamW on the slice only, else dense."""
    if amp is not None and backend == "native":
        raise Absent(f"{backend} computes in the parameters' dtype and undoes autocast")
    own = _on(copy.deepcopy(model).train(), backend)
    if not pooled_only:
        own.blocks[-1].register_forward_hook(lambda *_: None)  # a hook would see that tokens are missing, so none are
    clear = SliceGradients(own).zero_ if in_place else None
    optimizer = SliceAdamW(own.parameters(), own, **OPTIONS) if active else None
    return train_steps(own, lambda images, k: own(images, heads=k), images, labels, heads, amp, clear, optimizer)


def _peers(backend: str) -> list[Peer]:
    about = f"this repository's {backend} backend"
    ours = Peer("", "", ours=True, pooled_only=True, without=f"same as {backend}")
    plain = ours._replace(
        name=backend,
        about=about,
        inference=partial(_inference, backend, True),
        mixed=partial(_mixed, backend, True),
        block=partial(_block, backend),
        training=partial(_training, backend, False, True, False),
    )
    if backend == "reference":
        return [plain]
    packs = backend == "native"  # packed inference can compute every token
    all_tokens = ours._replace(
        name=f"{backend}-all-tokens",
        about=f"{about}, the last block computed for every token, as all others do",
        pooled_only=False,
        inference=partial(_inference, backend, False) if packs else None,
        mixed=partial(_mixed, backend, False) if packs else None,
        training=partial(_training, backend, False, False, False),
    )
    in_place = ours._replace(
        name=f"{backend}-inplace",
        about=f"{about}, gradients added in place (SliceGradients)",
        uncapturable="which gradients a step clears depends on the step before",
        without=f"measured in training only, see {backend}",
        training=partial(_training, backend, True, True, False),
    )
    active = in_place._replace(
        name=f"{backend}-active",
        about=f"{about}, gradients in place, AdamW on the slice only (SliceAdamW): weights outside the slice rest, "
        "unlike in all other peers; only inside the slice, which is compared, is it the same step",
        training=partial(_training, backend, True, True, True),
    )
    return [plain, all_tokens, in_place, active]


def _engine_peer(name: str, about: str, weights: str = "") -> Peer:
    return Peer(
        name,
        f"this repository's CUDA engine, {about}",
        ours=True,
        pooled_only=True,
        opaque=True,
        uncapturable="a call is one launch already",
        weights=weights,
        inference=partial(_engine, weights),
        without="an engine is for inference at one width",
    )


PEERS = [
    *(peer for backend in backends.BACKENDS for peer in _peers(backend)),
    _engine_peer("engine", "a chain of kernels in one graph"),
    _engine_peer("engine-e4m3", "as engine, its weights rounded to 8 bits, its activations fp16", weights="e4m3"),
]
