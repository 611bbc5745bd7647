"""One width as a plain Vision Transformer, for tools that do not know slices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hydravit.checkpoint.own import described
from hydravit.geometry import parameter_slices
from hydravit.model import HydraViT
from hydravit_kernels import Intervals, Subnetwork


def extract(model: HydraViT, heads: int | Subnetwork) -> dict[str, Tensor]:
    """Extract the weights of one width as a standalone ViT of that width, under timm's names.

    Args:
        heads: a width, or any subnetwork that is a plain ViT: the same slices in every layer, no branch skipped, and
            heads that together have as many channels as the residual.
    Returns:
        Contiguous copies in the model's dtype, on its device; of a parametrized weight, what it computes. An attention
        scale other than ``head_dim ** -0.5`` is folded into the query rows of ``qkv``. They load strictly into a
        ``VisionTransformer(**extract_config(...))``, or a ``VisionTransformerDistilled`` if the model is distilled.
    Raises:
        ValueError: no plain ViT computes the same; the message says why.
    """
    subnetwork, (_, weights) = _plain(model, heads), described(model)
    slices = parameter_slices(model.config, subnetwork)
    attention = subnetwork.attention[0]
    queries = attention.heads * attention.head_dim
    fold = attention.scale / attention.head_dim**-0.5
    result = {}
    for name, tensor in weights.items():
        if name not in slices:  # it would come out in full size
            raise ValueError(f"parameter {name} is no part of a plain Vision Transformer")
        tensor = take(tensor, slices[name]).clone(memory_format=torch.contiguous_format)
        if ".qkv." in name and fold != 1.0:
            tensor[:queries] *= fold
        if name.startswith("head.") and model.config.separate_classifiers:
            tensor = tensor[0]  # the width's own classifier
        result[name] = tensor
    return result


def take(tensor: Tensor, axes: Sequence[Intervals]) -> Tensor:
    """Copy the part of a full parameter, or of its gradient, that ``hydravit.geometry.parameter_slices`` names."""
    for axis, intervals in enumerate(axes):
        tensor = torch.cat([tensor.narrow(axis, *interval) for interval in intervals], axis)
    return tensor


def extract_config(model: HydraViT, heads: int | Subnetwork) -> dict:
    """Return the keyword arguments of timm's ``VisionTransformer`` for the result of ``extract``; raise as it does.

    They are those of ``VisionTransformerDistilled`` if the model is distilled.
    """
    subnetwork, (config, _) = _plain(model, heads), described(model)
    # A subnetwork's own epsilon counts where it is not the usual one.
    eps = config.norm_eps if subnetwork.eps == model.config.norm_eps else subnetwork.eps
    width, hidden = subnetwork.embed.embed, subnetwork.mlp[0].hidden
    ratio = hidden / width
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "global_pool": config.pool,
        "fc_norm": config.final_norm == "fc_norm",
        "embed_dim": width,
        "depth": config.depth,
        "num_heads": subnetwork.attention[0].heads,
        # timm rounds width * ratio down, so a quotient just below the true ratio would lose a channel
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "qkv_bias": config.qkv_bias,
        "proj_bias": config.proj_bias,
        "init_values": config.layer_scale,
        "act_layer": config.act_layer,
        "pre_norm": config.pre_norm,
        "class_token": config.class_token,
        "reg_tokens": config.register_tokens,
        "no_embed_class": config.no_embed_class,
        "norm_layer": partial(nn.LayerNorm, eps=eps),
    }


def _plain(model: HydraViT, heads: int | Subnetwork) -> Subnetwork:
    """Return the subnetwork of ``heads``; raise ``ValueError`` unless a plain ViT has its shape."""
    subnetwork = model.config.sizes.validate(heads) if isinstance(heads, Subnetwork) else model.subnetwork(heads)
    attention, mlp, width = subnetwork.attention[0], subnetwork.mlp[0], subnetwork.embed.embed
    reason = ""
    if len(set(subnetwork.attention)) > 1 or len(set(subnetwork.mlp)) > 1:
        reason = "its layers differ"
    elif not attention.heads or not mlp.hidden:
        reason = "it skips a branch"
    elif attention.head_dim != attention.value_dim:
        reason = f"its heads have {attention.head_dim} query and {attention.value_dim} value channels"
    elif attention.heads * attention.head_dim != width:
        reason = f"{attention.heads} heads of {attention.head_dim} channels are not as wide as its residual, {width}"
    if reason:
        raise ValueError(f"heads={subnetwork.heads} cannot be extracted as a plain Vision Transformer: {reason}")
    return subnetwork
