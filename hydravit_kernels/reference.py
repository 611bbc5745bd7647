"""Every block in plain PyTorch on views of the full weights.

This is the oracle of all other backends, the documentation of the maths, and the backend for any device. It is
differentiable to any order. Shapes are those of ``ops.py``; a block takes its parameters as a tuple of
``parameters.py`` and its slices as a sequence. The maths is that of ViT (arXiv 2010.11929) with pre-norm blocks, exact
GELU and an explicit attention scale, sliced as in HydraViT (arXiv 2409.17978).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hydravit_kernels.export import exporting, sizes
from hydravit_kernels.parameters import AttentionParameters, HeadParameters, MlpParameters, StemParameters
from hydravit_kernels.subnetwork import widest
from hydravit_kernels.transforms import transformed


def stem(images, p: StemParameters, slices, width_index=None) -> Tensor:
    """Patches, class and register tokens, position embedding: images ``(B, C, height, width)`` to ``(B, N, Dk)``."""

    def single(images, _, s):
        def channels(parameter, dim):
            return None if parameter is None else parameter.narrow(dim, s.embed_offset, s.embed)

        weight, bias = channels(p.weight, 0), channels(p.bias, 0)
        patches = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
        prefix = [channels(t, 2).expand(images.shape[0], -1, -1) for t in (p.cls_token, p.reg_token) if t is not None]
        position = channels(p.pos_embed, 2)
        if position is not None and sizes(position)[1] == sizes(patches)[1]:
            patches, position = patches + position, None
        tokens = torch.cat([t.to(patches.dtype) for t in prefix] + [patches], dim=1)
        return tokens if position is None else tokens + position

    return per_image(single, images, None, slices, width_index)


def attention_block(x, p: AttentionParameters, branch_scale, slices, eps, width_index=None, queries=None) -> Tensor:
    """``x + branch_scale * layer_scale * proj(softmax(q k^T * scale) v)`` with ``q, k, v = qkv(norm(x))``.

    With ``queries`` the result has only the first ``queries`` tokens, which still attend to all.
    """

    def single(x, branch_scale, s):
        if s.heads == 0:
            return x[:, :queries]
        query, key, value = _query_key_value(x, p, s, eps)
        query = query[:, :, :queries]
        # PyTorch's fused kernels have neither a second derivative nor one of forward mode; an exported graph does not
        # depend on the mode.
        if (torch.is_grad_enabled() or transformed(query)) and not exporting():
            attended = _attention(query, key, s.scale) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, scale=s.scale)
        attended = attended.transpose(1, 2).flatten(2)
        columns = _head_rows(p.proj_weight.t(), s.proj_column, s.value_dim, s).t()
        return _add_branch(x[:, :queries], attended, columns, p.proj_bias, p.layer_scale, branch_scale, s)

    return per_image(single, x, branch_scale, slices, width_index)


def mlp_block(x, p: MlpParameters, branch_scale, slices, eps, width_index=None) -> Tensor:
    """``x + branch_scale * layer_scale * fc2(gelu(fc1(norm(x))))``."""

    def single(x, branch_scale, s):
        if s.hidden == 0:
            return x
        normed = _norm(x, p.norm_weight, p.norm_bias, s, eps)
        rows = p.fc1_weight.narrow(0, s.hidden_offset, s.hidden).narrow(1, s.embed_offset, s.embed)
        bias = None if p.fc1_bias is None else p.fc1_bias.narrow(0, s.hidden_offset, s.hidden)
        hidden = F.gelu(F.linear(normed, rows, bias))
        columns = p.fc2_weight.narrow(1, s.hidden_offset, s.hidden)
        return _add_branch(x, hidden, columns, p.fc2_bias, p.layer_scale, branch_scale, s)

    return per_image(single, x, branch_scale, slices, width_index)


def head(x, p: HeadParameters, pool_start, pool_stop, slices, eps, width_index=None) -> Tensor:
    """Mean of tokens ``[pool_start, pool_stop)``, norm, classifier: ``(B, N, Dk)`` to ``(B, classes)``.

    If ``norm_weight`` is None the norm is left out. If ``weight`` is None the result is the features ``(B, Dk)``.
    """

    def single(x, _, s):
        pooled = x[:, pool_start:pool_stop].mean(dim=1)
        if p.norm_weight is not None:
            pooled = _norm(pooled, p.norm_weight, p.norm_bias, s, eps)
        if p.weight is None:
            return pooled
        rows = p.weight.narrow(0, s.class_offset, s.classes).narrow(1, s.embed_offset, s.embed)
        return F.linear(pooled, rows, None if p.bias is None else p.bias.narrow(0, s.class_offset, s.classes))

    return per_image(single, x, None, slices, width_index, pad=p.weight is None)


def layer_norm(x, norm_weight, norm_bias, slices, eps, width_index=None) -> Tensor:
    """The norm alone, over the slice's channels, for every token of ``x (B, N, Dk)``."""
    return per_image(lambda x, _, s: _norm(x, norm_weight, norm_bias, s, eps), x, None, slices, width_index)


def _attention(query, key, scale):
    return (query @ key.transpose(-2, -1) * scale).softmax(dim=-1)


def _norm(x, weight, bias, s, eps):
    weight, bias = (p.narrow(0, s.embed_offset, s.embed) for p in (weight, bias))
    return F.layer_norm(x, (s.embed,), weight, bias, eps)


def _query_key_value(x, p, s, eps):
    """Yield query, key and value, each ``(B, heads, N, channels)`` from its own rows of the fused weight."""
    normed = _norm(x, p.norm_weight, p.norm_bias, s, eps)
    columns = p.qkv_weight.narrow(1, s.embed_offset, s.embed)
    roles = ((s.query_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim))
    for row, length in roles:
        bias = None if p.qkv_bias is None else _head_rows(p.qkv_bias, row, length, s)
        projected = F.linear(normed, _head_rows(columns, row, length, s), bias)
        yield projected.unflatten(-1, (s.heads, length)).transpose(1, 2)


def _head_rows(parameter, start, length, s):
    """Rows ``[start + h * pitch, ... + length)`` of all heads ``h``: a view if heads touch, else a copy."""
    if s.pitch == length:
        return parameter.narrow(0, start, s.heads * length)
    rows = parameter.narrow(0, start, (s.heads - 1) * s.pitch + length).unfold(0, length, s.pitch)
    return rows.movedim(-1, 1).flatten(0, 1)


def _add_branch(x, inner, columns, bias, layer_scale, branch_scale, s):
    """``x + branch_scale * layer_scale * (inner @ columns.T + bias)``: the end of a block."""
    bias, layer_scale = (None if p is None else p.narrow(0, s.embed_offset, s.embed) for p in (bias, layer_scale))
    branch = F.linear(inner, columns.narrow(0, s.embed_offset, s.embed), bias)
    if layer_scale is not None:
        branch = branch * layer_scale
    if branch_scale is not None:
        branch = branch * branch_scale.view(-1, 1, 1)
    return x + branch


def per_image(single, x, branch_scale, slices, width_index, pad=True):
    """Apply ``single(x, branch_scale, s)`` to the batch, or to each group of images that share a slice.

    ``pad`` fills the results of narrow images with zeros up to the widest.
    """
    if width_index is None:
        return single(x, branch_scale, slices[0])
    possible = (width_index >= 0).all() & (width_index < len(slices)).all()
    torch._assert_async(possible, "width_index: an image's width is not possible")
    activations = x.dim() == 3
    order, results = [], []
    for index, s in enumerate(slices):
        group = (width_index == index).nonzero().squeeze(1)
        own = x[group, :, : s.embed] if activations else x[group]
        result = single(own, None if branch_scale is None else branch_scale[group], s)
        if pad:
            result = F.pad(result, (0, widest(slices) - s.embed))
        order.append(group)
        results.append(result)
    return torch.cat(results)[torch.cat(order).argsort()]
