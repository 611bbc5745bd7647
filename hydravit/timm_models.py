"""HydraViT in timm's registry: importing this module registers ``hydravit_tiny_patch16_224`` and the other sizes.

No other module imports timm. The rest of the package needs neither timm nor torchvision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hydravit import checkpoint
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.model import HydraViT
from hydravit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from hydravit.torchvision_operators import declare

declare()  # without it timm may not import

import timm.data  # noqa: E402
from timm.data import auto_augment  # noqa: E402
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402

__all__ = ["checkpoint_of", "config_of", "timm"]  # timm adds every model it registers


def _posterize(image, bits_to_keep: int, **options):
    """Keep that many bits of every pixel. RandAugment asks for none too, which is black; Pillow 13 refuses it."""
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else image.point(lambda pixel: 0)


for _name, _operation in auto_augment.NAME_TO_OP.items():
    if _operation is auto_augment.posterize:
        auto_augment.NAME_TO_OP[_name] = _posterize

# timm's names of our fields. Fields of the same name, such as depth, need no entry.
FIELDS = {
    "img_size": "image_size",
    "in_chans": "in_channels",
    "drop_path_rate": "drop_path",
    "global_pool": "pool",
    "init_values": "layer_scale",
    "reg_tokens": "register_tokens",
}
# Kinds of regularisation that the model does not have. timm's scripts pass these arguments as 0, which is allowed.
DROP_RATES = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate")

default_cfgs = generate_default_cfgs(
    {
        f"hydravit_{size}_patch16_224": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for size in ("tiny", "small", "base", "large")
    }
)


def config_of(model: str | nn.Module, **arguments) -> HydraViTConfig:
    """Return the config of a model of timm, or of a name of its registry; ``hydravit.config_of`` has the details.

    Example:
        >>> config = config_of("vit_huge_patch14_224")
        >>> model = hydravit.fused_model(config=config, checkpoint="vit_huge.safetensors")

    Args:
        arguments: of ``timm.create_model``, such as ``num_classes``; for a name only.
    """
    return checkpoint.config_of(_without_weights(model, **arguments))


def checkpoint_of(name: str) -> checkpoint.Checkpoint:
    """Return what timm's registry tells of a name: config and preprocessing; the weights hold no values."""
    return checkpoint.checkpoint_of(_without_weights(name))


def _without_weights(model: str | nn.Module, **arguments) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    with torch.device("meta"):
        return timm.create_model(model, **arguments)


def _build(config: str, heads=None, backend="auto", device=None, dtype=None, **arguments) -> HydraViT:
    """Make a model from timm's arguments of a ViT. Raise ``ValueError`` for an argument that has no meaning here."""
    for name in DROP_RATES:
        if arguments.pop(name, 0.0):
            raise ValueError(f"{name}: this model has no dropout but drop_path_rate")
    dynamic_img_size = arguments.pop("dynamic_img_size", False)
    overrides = {FIELDS.get(name, name): value for name, value in arguments.items()}
    model = HydraViT(resolve_config(config, **overrides), heads, backend=backend, device=device, dtype=dtype)
    model.dynamic_img_size = dynamic_img_size
    return model


def _create(size: str, pretrained: bool, **arguments) -> HydraViT:
    given = [arguments.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay")]
    if pretrained and not any(map(_names_weights, given)):
        raise ValueError(
            f"hydravit_{size}_patch16_224 has no pretrained weights: pass checkpoint_path, "
            "pretrained_cfg_overlay={'file': ...}, or local-dir:FOLDER or hf-hub:NAME as the model's name"
        )
    if arguments.get("feature_cls", "getter") != "getter":
        raise ValueError("feature_cls: only 'getter' serves this model, whose blocks are no chain from the images on")
    if arguments.get("distilled"):  # timm's loading drops classifiers of other classes, and has to know both
        overlay = arguments.get("pretrained_cfg_overlay") or {}
        arguments["pretrained_cfg_overlay"] = {"classifier": ("head", "head_dist"), **overlay}
    made: Any = build_model_with_cfg(
        _build, f"hydravit_{size}_patch16_224", pretrained, config=size,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **arguments,
    )  # fmt: skip
    model = made if isinstance(made, HydraViT) else made.model  # features_only=True wraps it
    # timm's data loaders follow this dictionary, which still describes the default model.
    described: Any
    for described in {id(m.pretrained_cfg): m.pretrained_cfg for m in (made, model)}.values():
        described["input_size"] = model.config.image_shape
        if model.config.in_channels != 3:
            usual = Preprocessing.for_model(model.config)
            described.update(mean=usual.mean, std=usual.std, crop_pct=usual.crop)
    return made


def _names_weights(pretrained_cfg: Any) -> bool:
    """Whether timm's description of a model says where its weights are."""
    fields = vars(pretrained_cfg) if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    return isinstance(fields, dict) and any(fields.get(name) for name in ("state_dict", "file", "url", "hf_hub_id"))


@register_model
def hydravit_tiny_patch16_224(pretrained: bool = False, **arguments) -> HydraViT:
    """Make a model of 3 heads."""
    return _create("tiny", pretrained, **arguments)


@register_model
def hydravit_small_patch16_224(pretrained: bool = False, **arguments) -> HydraViT:
    """Make a model of 6 heads."""
    return _create("small", pretrained, **arguments)


@register_model
def hydravit_base_patch16_224(pretrained: bool = False, **arguments) -> HydraViT:
    """Make a model of 12 heads; ``timm.create_model("hydravit_base_patch16_224", heads=6)`` has 6 of them active."""
    return _create("base", pretrained, **arguments)


@register_model
def hydravit_large_patch16_224(pretrained: bool = False, **arguments) -> HydraViT:
    """Make a model of 16 heads and 24 layers."""
    return _create("large", pretrained, **arguments)
