"""Eager PyTorch: slicing as the authors write it, slicing at its best, and the width as a network of its own.

The sliced peers compute the networks of the paper: class token, biases, one classifier, no registers, no layer scale.
With another config their logits differ from the reference, and the run refuses them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measuring.peer import Peer, Step
from bench.peers.training import (
    block_parameters,
    block_step,
    cut_block,
    train_steps,
    without_gradients,
)
from hydravit import HydraViT
from hydravit.checkpoint import extract, extract_config

# Slicing as the authors write it: https://github.com/ds-kiel/HydraViT, timm/models/hydravit.py at 45a78ae. ------------


def authors_network(model: HydraViT, images: Tensor, heads: int) -> Tensor:
    """Logits: every weight is sliced in every call, and the rows of ``qkv`` are gathered by a list."""
    width = heads * model.config.head_dim
    stem = model.patch_embed.proj
    x = F.conv2d(images, stem.weight[:width], stem.bias[:width], stem.stride).flatten(2).transpose(1, 2)
    x = torch.cat((model.cls_token[:, :, :width].expand(x.shape[0], -1, -1), x), dim=1)
    x = x + model.pos_embed[:, :, :width]
    for block in model.blocks:
        x = _authors_attention(block, x, heads)
        x = _authors_mlp(block, x, model.config.hidden_of(heads))
    x = _authors_norm(model.norm, x, width)
    return _authors_linear(model.head, x[:, 0], width, model.num_classes)


def _authors_attention(block: nn.Module, x: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    y = _authors_qkv(block.attn.qkv, _authors_norm(block.norm1, x, width), width)
    query, key, value = y.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
    return x[:, :, :width] + _authors_linear(block.attn.proj, y, width, width)


def _authors_mlp(block: nn.Module, x: Tensor, hidden: int) -> Tensor:
    width = x.shape[-1]
    y = _authors_linear(block.mlp.fc1, _authors_norm(block.norm2, x, width), width, hidden)
    return x[:, :, :width] + _authors_linear(block.mlp.fc2, F.gelu(y), hidden, width)


def _authors_qkv(layer: nn.Linear, x: Tensor, width: int) -> Tensor:
    full = layer.out_features // 3
    query = [row for row in range(width)]  # the authors too build these lists in every layer of every call
    key = [row for row in range(full, full + width)]
    value = [row for row in range(2 * full, 2 * full + width)]
    weight = layer.weight[query + key + value, :width]
    return F.linear(x[:, :, :width], weight, layer.bias[query + key + value])


def _authors_linear(layer: nn.Module, x: Tensor, columns: int, rows: int) -> Tensor:
    return F.linear(x[..., :columns], layer.weight[:rows, :columns], layer.bias[:rows])


def _authors_norm(layer: nn.LayerNorm, x: Tensor, width: int) -> Tensor:
    return F.layer_norm(x[:, :, :width], (width,), layer.weight[:width], layer.bias[:width], layer.eps)


# Slicing at its best. -------------------------------------------------------------------------------------------------


class _Views(NamedTuple):
    """One width of a model as views of the parameters, without a copy. Per block: attention, MLP."""

    stem: tuple[Tensor, ...]
    blocks: list[tuple[tuple, tuple]]
    head: tuple[Tensor, ...]


def _views(model: HydraViT, heads: int) -> _Views:
    width = heads * model.config.head_dim
    stem, norm, head = model.patch_embed.proj, model.norm, model.head
    tokens = model.cls_token[..., :width], model.pos_embed[..., :width]
    return _Views(
        (stem.weight[:width], stem.bias[:width], *tokens),
        [(_attention_views(model, block, heads), _mlp_views(model, block, heads)) for block in model.blocks],
        (norm.weight[:width], norm.bias[:width], head.weight[:, :width], head.bias),
    )


def _attention_views(model: HydraViT, block: nn.Module, heads: int) -> tuple:
    full, width = model.config.embed, heads * model.config.head_dim
    norm, qkv, proj = block.norm1, block.attn.qkv, block.attn.proj
    # One cut for query, key and value: its backward fills one full-size gradient; three cuts would fill three and add
    # them.
    weights = qkv.weight.unflatten(0, (3, full))[:, :width, :width].unbind(0)
    biases = qkv.bias.unflatten(0, (3, full))[:, :width].unbind(0)
    return norm.weight[:width], norm.bias[:width], weights, biases, proj.weight[:width, :width], proj.bias[:width]


def _mlp_views(model: HydraViT, block: nn.Module, heads: int) -> tuple:
    width, hidden = heads * model.config.head_dim, model.config.hidden_of(heads)
    norm, fc1, fc2 = block.norm2, block.mlp.fc1, block.mlp.fc2
    return (
        *(norm.weight[:width], norm.bias[:width]),
        *(fc1.weight[:hidden, :width], fc1.bias[:hidden]),
        *(fc2.weight[:width, :hidden], fc2.bias[:width]),
    )


def _attention(x: Tensor, views: tuple, heads: int, eps: float, in_place: bool) -> Tensor:
    norm_weight, norm_bias, qkv_weights, qkv_biases, proj_weight, proj_bias = views
    y = F.layer_norm(x, norm_bias.shape, norm_weight, norm_bias, eps)
    query, key, value = (
        F.linear(y, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight, bias in zip(qkv_weights, qkv_biases, strict=True)
    )
    y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return _add(F.linear(y, proj_weight, proj_bias), x, in_place)


def _mlp(x: Tensor, views: tuple, eps: float, in_place: bool) -> Tensor:
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = views
    y = F.layer_norm(x, norm_bias.shape, norm_weight, norm_bias, eps)
    y = F.linear(y, fc1_weight, fc1_bias)
    y = torch.ops.aten.gelu_(y) if in_place else F.gelu(y)
    return _add(F.linear(y, fc2_weight, fc2_bias), x, in_place)


def _add(new: Tensor, old: Tensor, in_place: bool) -> Tensor:
    return new.add_(old) if in_place else new + old


def _network(model: HydraViT, views: _Views, images: Tensor, heads: int, in_place: bool) -> Tensor:
    """``in_place``: sums and GELU overwrite what was just computed. Gradients would read it again, so not with them."""
    weight, bias, cls_token, pos_embed = views.stem
    eps = model.config.norm_eps
    patches = F.conv2d(images, weight, bias, model.config.patch_size).flatten(2).mT
    x = _add(torch.cat((cls_token.expand(images.shape[0], -1, -1), patches), dim=1), pos_embed, in_place)
    for attention, mlp in views.blocks:
        x = _attention(x, attention, heads, eps, in_place)
        x = _mlp(x, mlp, eps, in_place)
    norm_weight, norm_bias, weight, bias = views.head
    return F.linear(F.layer_norm(x[:, 0], norm_bias.shape, norm_weight, norm_bias, eps), weight, bias)


def views_network(model: HydraViT, images: Tensor, heads: int) -> Tensor:
    """Logits of one width, from views of the full parameters that this call makes."""
    return _network(model, _views(model, heads), images, heads, in_place=False)


def views_block(model: HydraViT, kind: str, x: Tensor, heads: int) -> Tensor:
    """Block 0's attention or MLP, from views of the full parameters that this call makes."""
    block, eps = model.blocks[0], model.config.norm_eps
    if kind == "attention":
        return _attention(x, _attention_views(model, block, heads), heads, eps, in_place=False)
    return _mlp(x, _mlp_views(model, block, heads), eps, in_place=False)


# Without gradients the set-up makes the views: they hold no weights, and making them would slow a narrow call.


def _views_inference(model: HydraViT, images: Tensor, heads: Sequence[int]) -> dict[int, Callable[[], Tensor]]:
    with torch.no_grad():
        views = {k: _views(model, k) for k in heads}
    return {k: without_gradients(partial(_network, model, views[k], images, k, in_place=True)) for k in heads}


def _views_block(model: HydraViT, kind: str, heads: int, x: Tensor, grad: Tensor | None) -> Step:
    if grad is not None:
        parameters, finish = block_parameters(model.blocks[0], kind), partial(cut_block, model=model, heads=heads)
        return block_step(lambda x: views_block(model, kind, x, heads), parameters, x, grad, finish)
    with torch.no_grad():
        attention, mlp = _views(model, heads).blocks[0]
    eps = model.config.norm_eps
    if kind == "attention":
        return block_step(lambda x: _attention(x, attention, heads, eps, in_place=True), {}, x, None)
    return block_step(lambda x: _mlp(x, mlp, eps, in_place=True), {}, x, None)


# Set-ups of both.


def _sliced_inference(network: Callable, model: HydraViT, images: Tensor, heads: Sequence[int]):
    return {k: without_gradients(partial(network, model, images, k)) for k in heads}


def _sliced_training(network: Callable, model: HydraViT, images: Tensor, labels: Tensor, heads: Sequence[int], amp):
    own = copy.deepcopy(model).train()
    return train_steps(own, partial(network, own), images, labels, heads, amp)


# A network of its own for every width. --------------------------------------------------------------------------------

TIMM = find_spec("timm") is not None
_PLAIN = f"{'timm' if TIMM else 'our reference'}'s plain ViT"
_PLAIN_VERSION = f"timm {version('timm')}" if TIMM else ""


def plain_vit(model: HydraViT, heads: int) -> nn.Module:
    """One width as a plain ViT that shares nothing with ``model``: timm's, or ours where timm is not installed."""
    if TIMM:
        from hydravit.timm_models import timm

        with torch.device("meta"):  # the weights are assigned, so none needs initialising
            vit = timm.models.vision_transformer.VisionTransformer(**extract_config(model, heads))
        for block in vit.blocks:
            block.attn.fused_attn = True  # timm's default, which an environment variable can change
    else:
        config = dataclasses.replace(model.config, max_heads=heads, separate_classifiers=())
        vit = HydraViT(config, backend="reference", device="meta")
    vit.load_state_dict(extract(model, heads), assign=True)
    return vit


def _extracted_inference(model: HydraViT, images: Tensor, heads: Sequence[int]):
    return {k: without_gradients(partial(plain_vit(model, k).eval(), images)) for k in heads}


PEERS = [
    Peer(
        "authors",
        "eager PyTorch as the authors of HydraViT slice: rows of qkv gathered by Python lists in every layer",
        uncapturable="its lists of rows are copied from the host in every layer",
        inference=partial(_sliced_inference, authors_network),
        training=partial(_sliced_training, authors_network),
    ),
    Peer(
        "views",
        "eager PyTorch at its best: views of the weights, made once for inference, where sums and GELU are in place",
        inference=_views_inference,
        block=_views_block,
        training=partial(_sliced_training, views_network),
    ),
    Peer(
        "extracted",
        f"the width copied out, {_PLAIN} in eager PyTorch",
        version=_PLAIN_VERSION,
        inference=_extracted_inference,
        without="a width that is copied out is nested no more",
    ),
]
