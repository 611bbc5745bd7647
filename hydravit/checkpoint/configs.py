"""Finds the config of a checkpoint's weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hydravit.checkpoint.files import Checkpoint
from hydravit.checkpoint.names import named_tensors, plain_names, reason, refuse_other_libraries, without_distillation
from hydravit.config import HydraViTConfig, check_image_size, resolve_config

# Channels of a head in every published ViT of a width, under timm's names and with arithmetic that is ours. Other
# widths are missing: 1536 channels are 24 heads in DINOv2's and 16 in SigLIP's.
_HEAD_DIMS = {
    **dict.fromkeys((192, 256, 320, 384, 512, 640, 768, 832, 896, 1024), 64),
    **{1152: 72, 1280: 80, 1408: 88, 1664: 104},
}


def model_config(
    checkpoint: Checkpoint, config: str | HydraViTConfig | None = None, *, strict: bool = True, **overrides
) -> HydraViTConfig:
    """Return the checkpoint's own config; if it has none, ``config``; without either, that of ``infer_config``.

    Args:
        config: a name or a config.
        strict: as in ``infer_config``.
        overrides: fields that replace those of the config.
    Raises:
        ValueError: ``config`` differs from the checkpoint's in a field that ``overrides`` does not settle, or the
            shapes of the weights leave no single answer. The message names the file, if there is one.
    """
    if checkpoint.config is None:
        if config is not None:
            return resolve_config(config, **overrides)
        try:
            known = dict(checkpoint.known)
            if not any(re.match(r"heads?\.\d+\.", name) for name in checkpoint.state_dict):
                known.pop("separate_classifiers", None)
            return infer_config(checkpoint.state_dict, strict=strict, **{**known, **overrides})
        except ValueError as error:
            raise ValueError(f"{checkpoint.where}{error}") from error
    if config is not None:
        asked, has = resolve_config(config).to_dict(), checkpoint.config.to_dict()
        differ = [name for name in asked if asked[name] != has[name] and name not in overrides]
        if differ:
            label = repr(config) if isinstance(config, str) else "given"
            fields = ", ".join(f"{name} {asked[name]!r} (checkpoint: {has[name]!r})" for name in differ)
            raise ValueError(
                f"{checkpoint.where}config {label} is not that of the checkpoint: {fields}; "
                "leave config out, and override fields by name"
            )
    return resolve_config(checkpoint.config, **overrides)


def infer_config(
    state_dict: Mapping[str, Tensor], *, head_dim: int | None = None, strict: bool = True, **known
) -> HydraViTConfig:
    """Infer the config of a plain ViT from the shapes of its weights.

    Shapes do not tell everything. What is not given is assumed, with a warning that names it: the head dim of published
    ViTs of that width, epsilon 1e-6, a square grid, and pooling of the class token, or of the mean where there is no
    class token or the norm is ``fc_norm``. ``config_of`` assumes nothing, but needs the model.

    Args:
        state_dict: names as in timm's ``VisionTransformer``; wrappers and prefixes as in ``read_checkpoint``.
        head_dim: channels of an attention head; None: that of the published ViTs.
        strict: whether to raise if names belong to arithmetic that the model does not have.
        known: fields of the config.
    Raises:
        ValueError: these are not the weights of a ViT, its arithmetic is not the model's, or the shapes leave no single
            answer. The message names what differs or what has to be given.
    """
    named = named_tensors(state_dict)
    tensors, _ = plain_names(named)
    refuse_other_libraries(tensors)
    if strict and (words := reason(tensors)):
        raise ValueError(f"the weights are of a model with {words}, which this package does not compute")
    distilled = known.get("distilled", "dist_token" in tensors)
    if not distilled:
        tensors, _ = without_distillation(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    classifier = _check_shapes(shapes, "separate_classifiers" in known)
    embed, in_channels, patch, _ = shapes["patch_embed.proj.weight"]
    class_token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    if head_dim is not None and (type(head_dim) is not int or head_dim < 1 or embed % head_dim):
        raise ValueError(f"width {embed} is not a multiple of head_dim {head_dim}; pass the head_dim of these weights")
    grids, prefix = [], class_token + distilled + registers
    if "image_size" in known:
        height, width = check_image_size(known["image_size"], patch)
        grids = [(height // patch, width // patch)]
    covered, grid = position_layout(shapes["pos_embed"][1], [prefix, 0], grids)
    usual: dict[str, Any] = {
        "norm_eps": 1e-6,
        "pool": "token" if class_token and "fc_norm.weight" not in shapes else "avg",
        "image_size": (grid[0] * patch, grid[1] * patch),
    }
    pre_norm = "norm_pre.weight" in shapes
    if pre_norm and not {"act_layer", "norm_eps"} <= set(known):
        raise ValueError(
            "weights with a norm before the blocks do not tell the activation, nor epsilon: pass act_layer and "
            "norm_eps, or timm's model instead of its weights"
        )
    assumed = {name: value for name, value in usual.items() if name not in known}
    if head_dim is None:
        head_dim = _usual_head_dim(shapes, eva="blocks.0.gamma_1" in named)
        assumed = {"head_dim": head_dim, **assumed}
    if assumed:
        gelu = "" if "act_layer" in known else "exact GELU, "
        values = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
        warnings.warn(
            f"weights do not tell everything; assumed: {values}, {gelu}norms before the branches (pass these "
            "fields, or timm's model instead of its weights)",
            stacklevel=2,
        )
    return HydraViTConfig.from_dict({
        "patch_size": patch,
        "in_channels": in_channels,
        "num_classes": classifier,
        "depth": count_blocks(shapes),
        "max_heads": embed // head_dim,
        "head_dim": head_dim,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / embed,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "pre_norm": pre_norm,
        "class_token": class_token,
        "distilled": distilled,
        "register_tokens": registers,
        "no_embed_class": prefix > 0 and covered == 0,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        "fc_norm": "fc_norm.weight" in shapes,
        **usual,
        **known,
    })  # fmt: skip


def _usual_head_dim(shapes: dict[str, tuple[int, ...]], eva: bool) -> int:
    """Return the head dim of the published ViTs of these shapes; raise ``ValueError`` where they have several.

    ``eva``: whether layer scales have the names of DeiT III, which timm's ViTs with rotary positions share.
    """
    embed = shapes["patch_embed.proj.weight"][0]
    ask = ""
    if embed not in _HEAD_DIMS:
        ask = f"{embed} channels have no usual number of heads: pass the head_dim"
    elif not {"cls_token", "reg_token"} & set(shapes):  # timm's vit_base_patch16_gap_224 and ..._rpn_224
        ask = "published ViTs without class and register tokens have norms before or after the branches, which weights "
        ask += "do not tell either: if they are before, pass the head_dim"
    elif eva:
        ask = (
            "gamma_1 is a name of DeiT III and of timm's vit_*_rope_ape, whose rotary positions are not computed here: "
        )
        ask += "if it is DeiT III, pass the head_dim"
    if ask:
        raise ValueError(f"weights do not tell the heads; {ask}, or timm's model instead of its weights")
    return _HEAD_DIMS[embed]


def position_layout(positions: int, prefixes: list[int], grids: list[tuple[int, int]]) -> tuple[int, tuple[int, int]]:
    """Return how many positions belong to tokens before the patches, and the grid of the others.

    Every grid is tried with all ``prefixes``: those of ``grids`` in order, then a square. The first that fits is the
    answer. Raises ``ValueError`` if none fits.
    """
    for grid in (*grids, None):
        for prefix in prefixes:
            side = math.isqrt(max(positions - prefix, 0))
            height, width = grid or (side, side)
            if positions - prefix == height * width > 0:
                return prefix, (height, width)
    problem = f"no square grid, nor one of {grids}" if grids else "no square grid; pass the image_size"
    raise ValueError(f"pos_embed has {positions} tokens, {max(prefixes)} of them before the patches: {problem}")


def _check_shapes(shapes: dict[str, tuple[int, ...]], separate: bool) -> int:
    """Return the number of classes; raise ``ValueError`` unless these are the weights of one plain ViT.

    ``separate``: whether it is known which widths have classifiers of their own.
    """
    expected = {
        "patch_embed.proj.weight": 4,
        "pos_embed": 3,
        "blocks.0.mlp.fc1.weight": 2,
        "blocks.0.mlp.fc2.weight": 2,
    }
    if "reg_token" in shapes:
        expected["reg_token"] = 3
    for name, axes in expected.items():
        if len(shapes.get(name, ())) != axes:
            raise ValueError(
                f"these are not the weights of a Vision Transformer: {name} is {shapes.get(name, 'missing')}"
            )
        if 0 in shapes[name]:
            raise ValueError(f"the weights are damaged: {name} has shape {shapes[name]}, which is empty")
    embed, _, patch, patch_width = shapes["patch_embed.proj.weight"]
    if patch != patch_width:
        raise ValueError(f"patch_embed.proj.weight has patches of {patch} x {patch_width} pixels; expected squares")
    if shapes["blocks.0.mlp.fc1.weight"][0] == 2 * shapes["blocks.0.mlp.fc2.weight"][1]:
        raise ValueError("the weights are of a model with a gated MLP (SwiGLU), which this package does not compute")
    if not {"norm.weight", "fc_norm.weight"} & set(shapes):
        raise ValueError("the weights are of a model with no norm before the classifier, or are damaged")
    listed = [name for name in shapes if re.fullmatch(r"heads?\.\d+\.weight", name)]
    classifier = shapes.get(listed[0] if listed else "head.weight", (0, embed))
    if len(classifier) not in (2, 3):
        raise ValueError(f"head.weight has shape {classifier}; expected (classes, {embed})")
    if (listed or len(classifier) == 3) and not separate:
        raise ValueError("separate classifiers do not say which widths they serve: pass a config")
    return classifier[-2]


def count_blocks(names: Iterable[str]) -> int:
    """Count the layers in a state dict of these names."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})
