"""The backends of this repository: a peer each, and more where work can be left out or done in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import hydravit_kernels as kernels
from bench.peers import Absent, Peer, Step
from bench.peers.training import OPTIONS, block_parameters, block_step, cut_block, train_steps, without_gradients
from hydravit import HydraViT
from hydravit.evaluation.latency import with_backend
from hydravit.inference import PackedInference
from hydravit.training import SliceAdamW, SliceGradients
from hydravit_kernels import backends


def _on(model: HydraViT, backend: str) -> HydraViT:
    """The model on a backend, its parameters shared; raises ``Absent`` where the backend cannot run."""
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
        dtype = torch.float8_e4m3fn if weights == "e4m3" else images.dtype
        engine = model.engine(len(images), dtype)
    except (RuntimeError, ValueError) as error:
        raise Absent(str(error)) from error
    return {k: partial(engine, images, heads=k) for k in heads}


def _mixed(backend: str, pooled_only: bool, model: HydraViT, images: Tensor, heads: Sequence[int]):
    widths = torch.tensor(heads, device=images.device)
    return _inference(backend, pooled_only, model, images, [widths])[widths]


def _block_forward(backend: str, model: HydraViT, kind: str, heads: int, x: Tensor, buffers=None) -> Tensor:
    geometry, block = model.geometry(heads), model.blocks[0]
    if kind == "attention":
        function, parameters, slices = kernels.attention_block, block.attention_parameters(), geometry.attention[0]
    else:
        function, parameters, slices = kernels.mlp_block, block.mlp_parameters(), geometry.mlp[0]
    return function(x, *parameters, None, [slices], geometry.eps, backend=backend, buffers=buffers)


def _block(backend: str, model: HydraViT, kind: str, heads: int, x: Tensor, grad: Tensor | None) -> Step:
    _on(model, backend)
    forward = partial(_block_forward, backend, model, kind, heads)
    parameters = block_parameters(model.blocks[0], kind)
    return block_step(forward, parameters, x, grad, partial(cut_block, model=model, heads=heads))


def _block_in_place(backend: str, model: HydraViT, kind: str, heads: int, x: Tensor, grad: Tensor | None) -> Step:
    if grad is None:
        raise Absent(f"same as {backend}")
    own = copy.deepcopy(_on(model, backend)).requires_grad_(False)
    parameters = block_parameters(own.blocks[0], kind)
    for parameter in parameters.values():
        parameter.requires_grad = True  # these alone get buffers
    gradients = SliceGradients(own)
    geometry, block = own.geometry(heads), own.blocks[0]
    in_order = block.attention_parameters() if kind == "attention" else block.mlp_parameters()
    buffers = [None if p is None else gradients.buffer(p) for p in in_order]
    x = x.detach().requires_grad_()

    def run() -> Tensor:
        x.grad = None
        gradients.zero_()
        gradients.mark([geometry])  # as the model does in every forward
        y = _block_forward(backend, own, kind, heads, x, buffers)
        y.backward(grad)
        return y

    def outputs() -> dict[str, Tensor]:
        y = run()
        summed = {name: parameter.grad for name, parameter in parameters.items()}
        return {"y": y.detach(), "x": x.grad, **cut_block(summed, own, heads)}

    return Step(run, outputs)


def _training(
    backend: str,
    in_place: bool,
    pooled_only: bool,
    optimizer: str,
    model: HydraViT,
    images: Tensor,
    labels: Tensor,
    heads: Sequence[int],
    amp,
) -> dict[int, Step]:
    """``optimizer``: ``"dense"`` or ``"active"``, as in a recipe."""
    if amp is not None and backend == "native":
        raise Absent(f"{backend} computes in the parameters' dtype and undoes autocast")
    own = _on(copy.deepcopy(model).train(), backend)
    if not pooled_only:
        own.blocks[-1].register_forward_hook(lambda *_: None)  # somebody who would see that tokens are missing
    clear = SliceGradients(own).zero_ if in_place else None
    stepper = None if optimizer == "dense" else SliceAdamW(own.parameters(), own, **OPTIONS)
    return train_steps(own, lambda images, k: own(images, heads=k), images, labels, heads, amp, clear, stepper)


def _peers(backend: str) -> list[Peer]:
    about = f"this repository's {backend} backend"
    plain = Peer(
        backend,
        about,
        ours=True,
        pooled_only=True,
        inference=partial(_inference, backend, True),
        mixed=partial(_mixed, backend, True),
        block=partial(_block, backend),
        training=partial(_training, backend, False, True, "dense"),
    )
    if backend == "reference":
        return [plain]
    all_tokens = Peer(
        f"{backend}-all-tokens",
        f"{about}, the last block computed for every token, as all others do",
        ours=True,
        inference=partial(_inference, backend, False) if backend == "native" else None,  # packed inference can do it
        mixed=partial(_mixed, backend, False) if backend == "native" else None,
        training=partial(_training, backend, False, False, "dense"),
        without=f"same as {backend}",
    )
    in_place = Peer(
        f"{backend}-inplace",
        f"{about}, gradients added in place (SliceGradients)",
        uncapturable="which gradients a step clears depends on the step before",
        ours=True,
        pooled_only=True,
        block=partial(_block_in_place, backend),
        training=partial(_training, backend, True, True, "dense"),
        without=f"same as {backend}",
    )
    active = Peer(
        f"{backend}-active",
        f"{about}, gradients in place, AdamW on the slice only (SliceAdamW): weights outside rest, unlike all others': "
        "only inside the slice, which is compared, is it the same step",
        uncapturable="which gradients a step clears depends on the step before",
        ours=True,
        pooled_only=True,
        training=partial(_training, backend, True, True, "active"),
        without=f"same as {backend}",
    )
    return [plain, all_tokens, in_place, active]


def _engine_peer(name: str, how: str, weights: str = "") -> Peer:
    return Peer(
        name,
        f"this repository's CUDA engine, {how}",
        ours=True,
        pooled_only=True,
        opaque=True,
        uncapturable="a call is one launch already",
        weights=weights,
        inference=partial(_engine, weights),
        without="an engine is for inference at one width",
    )


PEERS = [peer for backend in backends.BACKENDS for peer in _peers(backend)]
PEERS += [
    _engine_peer("engine", "a kernel for each phase in one graph"),
    _engine_peer("engine-e4m3", "as engine, its weights rounded to 8 bits, its activations fp16", weights="e4m3"),
]
