"""Finds the config of a checkpoint's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from hydravit.checkpoint.files import Checkpoint, named_tensors
from hydravit.config import HydraViTConfig, check_image_size, resolve_config


def model_config(checkpoint: Checkpoint, config: str | HydraViTConfig | None = None, **overrides) -> HydraViTConfig:
    """Return the checkpoint's own config; if it has none, ``config``; without either, that of ``infer_config``.

    Args:
        config: a name or a config.
        overrides: fields that replace those of the config.
    Raises:
        ValueError: ``config`` differs from the checkpoint's in a field that ``overrides`` does not settle, or the
            shapes of the weights leave no single answer. The message names the file, if there is one.
    """
    if checkpoint.config is None:
        if config is not None:
            return resolve_config(config, **overrides)
        try:
            return infer_config(checkpoint.state_dict, **overrides)
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


def infer_config(state_dict: Mapping[str, Tensor], *, head_dim: int = 64, **known) -> HydraViTConfig:
    """Infer the config of a plain ViT from the shapes of its weights.

    Args:
        state_dict: names as in timm's ``VisionTransformer``; wrappers and prefixes as in ``read_checkpoint``.
        known: fields of the config. Shapes tell neither drop-path rate nor the epsilon of norms nor a non-square grid.
    Raises:
        ValueError: these are not the weights of a ViT, or the shapes leave no single answer.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(state_dict).items()}
    _check_shapes(shapes, head_dim)
    embed, in_channels, patch, _ = shapes["patch_embed.proj.weight"]
    class_token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    values = {
        "patch_size": patch,
        "in_channels": in_channels,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "depth": count_blocks(shapes),
        "max_heads": embed // head_dim,
        "head_dim": head_dim,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / embed,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "class_token": class_token,
        "register_tokens": registers,
        "pool": "token" if class_token and "fc_norm.weight" not in shapes else "avg",
        "layer_scale": 1e-5 if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(shapes) else None,
        **known,
    }
    grids, prefix = [], class_token + registers
    if "image_size" in known:
        height, width = check_image_size(known["image_size"], patch)
        grids = [(height // patch, width // patch)]
    covered, grid = position_layout(shapes["pos_embed"][1], [prefix, 0], grids)
    values.setdefault("image_size", (grid[0] * patch, grid[1] * patch))
    values.setdefault("no_embed_class", prefix > 0 and covered == 0)
    return HydraViTConfig.from_dict(values)


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
    reason = f"no square grid, nor one of {grids}" if grids else "no square grid; pass the image_size"
    raise ValueError(f"pos_embed has {positions} tokens, {max(prefixes)} of them before the patches: {reason}")


def _check_shapes(shapes: dict[str, tuple[int, ...]], head_dim: int) -> None:
    """Raise ``ValueError`` unless these are the weights of one plain ViT with heads of ``head_dim`` channels."""
    expected = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
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
    if type(head_dim) is not int or head_dim < 1 or embed % head_dim:
        raise ValueError(f"width {embed} is not a multiple of head_dim {head_dim}; pass the head_dim of these weights")
    classifier = shapes.get("head.weight", (0, embed))
    if len(classifier) not in (2, 3):
        raise ValueError(f"head.weight has shape {classifier}; expected (classes, {embed})")
    if len(classifier) == 3 or any(re.match(r"heads?\.\d+\.", name) for name in shapes):
        raise ValueError("separate classifiers do not say which widths they serve: pass a config")


def count_blocks(names: Iterable[str]) -> int:
    """Count the layers in a state dict of these names."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})
