"""The config of a model of timm: its modules tell what weights alone do not, such as heads, epsilon and pooling.

The modules tell it all, so this file needs no timm. A model is accepted only if every module has its expected kind and
every option its expected value. Whoever widens what the model computes changes a row of a table below.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from hydravit.checkpoint.files import Checkpoint
from hydravit.checkpoint.own import described
from hydravit.config import POOLS, HydraViTConfig
from hydravit.model import HydraViT
from hydravit.preprocessing import INTERPOLATIONS, Preprocessing

_NORM = ("LayerNorm", "LayerNormFp32")

# The kinds of the modules that timm's ViT may have, by their names; `#` is the number of a block. Dropout and drop-path
# act in training only.
_KINDS: dict[str, tuple[str, ...]] = {
    "": ("VisionTransformer", "VisionTransformerDistilled"),
    "patch_embed": ("PatchEmbed",),
    "patch_embed.proj": ("Conv2d",),
    "patch_embed.norm": ("Identity",),
    "pos_drop": ("Dropout", "Identity"),
    "patch_drop": ("Identity", "PatchDropout"),
    "norm_pre": (*_NORM, "Identity"),
    "blocks": ("Sequential", "ModuleList"),
    "blocks.#": ("Block",),
    "blocks.#.norm1": _NORM,
    "blocks.#.attn": ("Attention",),
    "blocks.#.attn.qkv": ("Linear",),
    "blocks.#.attn.q_norm": ("Identity",),
    "blocks.#.attn.k_norm": ("Identity",),
    "blocks.#.attn.attn_drop": ("Dropout", "Identity"),
    "blocks.#.attn.norm": ("Identity",),
    "blocks.#.attn.proj": ("Linear",),
    "blocks.#.attn.proj_drop": ("Dropout", "Identity"),
    "blocks.#.ls1": ("Identity", "LayerScale"),
    "blocks.#.drop_path1": ("Identity", "DropPath"),
    "blocks.#.norm2": _NORM,
    "blocks.#.mlp": ("Mlp",),
    "blocks.#.mlp.fc1": ("Linear",),
    "blocks.#.mlp.act": ("GELU", "GELUTanh", "QuickGELU"),
    "blocks.#.mlp.drop1": ("Dropout", "Identity"),
    "blocks.#.mlp.norm": ("Identity",),
    "blocks.#.mlp.fc2": ("Linear",),
    "blocks.#.mlp.drop2": ("Dropout", "Identity"),
    "blocks.#.ls2": ("Identity", "LayerScale"),
    "blocks.#.drop_path2": ("Identity", "DropPath"),
    "norm": (*_NORM, "Identity"),
    "fc_norm": (*_NORM, "Identity"),
    "head_drop": ("Dropout", "Identity"),
    "head": ("Linear", "Identity"),
    "head_dist": ("Linear", "Identity"),
}

# What a module of another kind, or under another name, means.
_MEANINGS = {
    "Eva": "rotary positions",
    "VisionTransformerRelPos": "relative positions",
    "ResPostBlock": "norms after the branches",
    "ParallelScalingBlock": "attention and MLP in parallel",
    "DiffParallelScalingBlock": "attention and MLP in parallel",
    "ParallelThingsBlock": "several branches in parallel",
    "DiffAttention": "differential attention",
    "GluMlp": "a gated MLP (SwiGLU)",
    "SwiGLU": "a gated MLP",
    "HybridEmbed": "a convolutional network before the blocks",
    "patch_embed.norm": "a norm in the patch embedding",
    "blocks.#.attn.q_norm": "norms of queries and keys (qk_norm)",
    "blocks.#.attn.k_norm": "norms of queries and keys (qk_norm)",
    "blocks.#.attn.norm": "a norm in the attention (scale_attn_norm)",
    "blocks.#.attn.gate": "gated attention",
    "blocks.#.mlp.norm": "a norm in the MLP (scale_mlp_norm)",
    "attn_pool": "attention pooling",
}


def _final_norm(vit: Any) -> str:
    """Where the norm before the classifier stands: "norm", "fc_norm" (after pooling), or "" if there is none."""
    return next((name for name in ("norm", "fc_norm") if not isinstance(getattr(vit, name), nn.Identity)), "")


def _pre_norm(vit: Any) -> bool:
    return not isinstance(vit.norm_pre, nn.Identity)


def _act_layer(block: Any) -> str:
    """The name of the activation in the config."""
    act = block.mlp.act
    kind = "GELUTanh" if getattr(act, "approximate", "none") == "tanh" else type(act).__name__
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}[kind]


def _every(vit: Any, kinds: tuple[str, ...]) -> list[Any]:
    return [module for module in vit.modules() if type(module).__name__ in kinds]


# Options that the kinds do not tell: the words of the error, and whether the model has the option.
_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "no position embedding": lambda vit: vit.pos_embed is None,
    "images padded to whole patches (dynamic_img_pad)": lambda vit: vit.patch_embed.dynamic_img_pad,
    "images of no fixed size": lambda vit: vit.patch_embed.img_size is None,
    "patches that are no squares side by side": lambda vit: not _squares(vit.patch_embed.proj),
    "a patch embedding without bias": lambda vit: vit.patch_embed.proj.bias is None and not _pre_norm(vit),
    "a norm before the blocks, and a bias in the patch embedding": lambda vit: (
        vit.patch_embed.proj.bias is not None and _pre_norm(vit)
    ),
    "norms with different epsilons": lambda vit: len({norm.eps for norm in _every(vit, _NORM)}) > 1,
    "norms without weight or bias": lambda vit: any(n.weight is None or n.bias is None for n in _every(vit, _NORM)),
    "layers that differ": lambda vit: len({_layer(block) for block in vit.blocks}) != 1,
    "heads that are together not as wide as the residual": lambda vit: (
        vit.blocks[0].attn.qkv.out_features != 3 * vit.embed_dim
    ),
    "another attention scale": lambda vit: vit.blocks[0].attn.scale != vit.blocks[0].attn.head_dim ** -0.5,
    "one layer scale of two": lambda vit: len({type(getattr(vit.blocks[0], name)) for name in ("ls1", "ls2")}) > 1,
    "biases of one projection of three": lambda vit: 0 < _biases(vit.blocks[0]) < 3,
    "a classifier without bias": lambda vit: any(
        isinstance(head, nn.Linear) and head.bias is None for head in (vit.head, getattr(vit, "head_dist", None))
    ),
    "attention pooling": lambda vit: vit.attn_pool is not None,
    "pooling of another kind": lambda vit: vit.global_pool not in POOLS,
    "pooling of class and register tokens too (pool_include_prefix)": lambda vit: (
        vit.global_pool not in ("token", "") and vit.num_prefix_tokens and getattr(vit, "pool_include_prefix", False)
    ),
    "no norm before the classifier (final_norm=False)": lambda vit: not _final_norm(vit),
    "two norms before the classifier": lambda vit: not isinstance(vit.norm, nn.Identity) and _final_norm(vit) != "norm",
}  # fmt: skip


def _squares(proj: nn.Conv2d) -> bool:
    plain = (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
    return plain and proj.kernel_size == proj.stride and len(set(proj.kernel_size)) == 1


def _biases(block: Any) -> int:
    return sum(layer.bias is not None for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2))


def _layer(block: Any) -> tuple:
    attn = block.attn
    sizes = attn.num_heads, attn.head_dim, attn.scale, attn.qkv.bias is None, block.mlp.fc1.out_features, _biases(block)
    return *sizes, _act_layer(block), type(block.ls1), type(block.ls2)


def config_of(model: nn.Module) -> HydraViTConfig:
    """Return the config of timm's ``VisionTransformer``: its full width computes what that model does.

    Args:
        model: of timm, also one wrapped in DDP or ``torch.compile``, on any device, "meta" too; or a ``HydraViT``.
            ``hydravit.timm_models.config_of`` takes a name of timm's registry as well.
    Raises:
        ValueError: this package does not compute what the model does; the message names the part that differs.
    """
    model = _unwrapped(model)
    if isinstance(model, HydraViT):
        return described(model)[0]
    reason = _difference(model)
    if reason:
        raise ValueError(f"{type(model).__name__} computes what this package does not: {reason}")
    vit: Any = model
    if any(getattr(module, "p", 0) or getattr(module, "prob", 0) for module in vit.modules()):
        warnings.warn("the model's dropout is left out; it acts in training only", stacklevel=2)
    block, proj = vit.blocks[0], vit.patch_embed.proj
    norm = getattr(vit, _final_norm(vit))
    scale = getattr(block.ls1, "init_values", 1e-5)
    return HydraViTConfig(
        image_size=tuple(vit.patch_embed.img_size),
        patch_size=proj.kernel_size[0],
        in_channels=proj.in_channels,
        num_classes=vit.head.out_features if isinstance(vit.head, nn.Linear) else 0,
        depth=len(vit.blocks),
        max_heads=block.attn.num_heads,
        head_dim=block.attn.head_dim,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        act_layer=_act_layer(block),
        pre_norm=_pre_norm(vit),
        class_token=vit.cls_token is not None,
        distilled=hasattr(vit, "dist_token"),
        register_tokens=0 if vit.reg_token is None else vit.reg_token.shape[1],
        no_embed_class=bool(vit.num_prefix_tokens and vit.no_embed_class),
        pool=vit.global_pool,
        fc_norm=_final_norm(vit) == "fc_norm",
        layer_scale=None if isinstance(block.ls1, nn.Identity) else float(scale),
        drop_path=max(float(getattr(block.drop_path1, "drop_prob", 0.0)) for block in vit.blocks),
        norm_eps=norm.eps,
    )


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """Return weights, config and preprocessing of a model; raise as ``config_of`` does."""
    model = _unwrapped(model)
    if isinstance(model, HydraViT):
        config, weights = described(model)
        return Checkpoint(weights, config, model.trained_heads)
    config = config_of(model)
    return Checkpoint(
        dict(model.state_dict()),
        config,
        preprocessing=_preprocessing(config, getattr(model, "pretrained_cfg", None) or {}),
    )


def _preprocessing(config: HydraViTConfig, values: dict) -> Preprocessing | None:
    """Return what timm's ``pretrained_cfg`` says of images; None if it says nothing, or what is not done here."""
    fields = {"mean": "mean", "std": "std", "crop_pct": "crop", "interpolation": "interpolation"}
    known = {ours: values[name] for name, ours in fields.items() if values.get(name)}
    usual = values.get("crop_mode") in (None, "center") and known.get("interpolation", "bicubic") in INTERPOLATIONS
    if len(known) < 3 or not usual or len(known.get("mean", ())) != config.in_channels:
        return None
    return Preprocessing(image_size=config.image_size, **known)


def _unwrapped(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model


def _difference(vit: nn.Module) -> str:
    """Say in what the model differs from those that this package computes; "" if in nothing."""
    for name, module in vit.named_modules(remove_duplicate=False):
        place, kind = re.sub(r"^blocks\.\d+", "blocks.#", name), type(module)
        library = kind.__module__.split(".")[0]
        known = kind.__name__ in _KINDS.get(place, ()) and library in ("timm", "torch")
        if not known or "forward" in vars(module):
            words = _MEANINGS.get(kind.__name__) or _MEANINGS.get(place)
            if "forward" in vars(module):
                words = "its forward is replaced"
            if not name and library in ("open_clip", "torchvision", "transformers"):
                words = "take the same model from timm: timm.create_model(NAME, pretrained=True)"
            label = f"{name} is a {kind.__name__}" if name else f"it is a {kind.__module__}.{kind.__name__}"
            return f"{label} ({words})" if words else label
    return next((words for words, has in _OPTIONS.items() if has(vit)), "")
