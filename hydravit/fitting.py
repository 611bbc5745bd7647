"""Fitting weights into a model: positions of another grid, smaller ViTs, other classifiers, older names.

Names are those of timm's ``VisionTransformer``, which DeiT's and HydraViT's authors' checkpoints share.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydravit.config import HydraViTConfig, check_image_size
from hydravit.geometry import hydravit
from hydravit.model import HydraViT
from hydravit.weights import Checkpoint, named_tensors

PREFIX = ("cls_token", "reg_token")  # tokens before the patches, in this order


def load_weights(model: HydraViT, weights: Checkpoint | Mapping[str, Tensor], *, strict: bool = True) -> list[str]:
    """Copy weights into a model, adapted where that has one sensible meaning; all of them or, on an error, none.

    * A position embedding of another patch grid is resampled (bicubic, antialiased, as timm does). The grid is that of
      the checkpoint's config; without one it is the model's if the number of patches agrees, else a square. Whether it
      covers the class and register tokens is adapted without changing the function.
    * A smaller ViT of the same head dim becomes the first heads, as HydraViT (arXiv 2409.17978) starts from DeiT-tiny;
      everything else stays as it is.
    * Another number of classes, or no classifier in the checkpoint: the model's is initialised anew.
    * One classifier for all widths is copied to every separate one; ``head.0.weight, head.1.weight, ...`` (or
      ``heads.0...``) are separate ones in ascending order of widths, each of its width or of full width.
    * ``norm`` serves as ``fc_norm`` and the reverse. That changes the function: pooling and norm swap places.

    Args:
        weights: a checkpoint or a state dict; wrappers and prefixes as in ``hydravit.weights.read_checkpoint``.
        strict: raise where the checkpoint lacks a parameter or has one the model has not, such as the distillation
            token of a distilled DeiT. If False, the former keep their values and the latter are dropped.
    Returns:
        One message for every adaptation; each is also a warning.
    Raises:
        ValueError: the weights do not fit; the message names the file, if any, what came and what is expected.
    """
    checkpoint = weights if isinstance(weights, Checkpoint) else Checkpoint(dict(weights))
    where = "" if checkpoint.path is None else f"checkpoint {checkpoint.path}: "
    try:
        own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        fit = _Fit(model.config, own, named_tensors(checkpoint.state_dict), checkpoint.config, strict)
        result = fit.run()
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    model.load_state_dict(result)
    for message in fit.messages:
        warnings.warn(f"{where}{message}", stacklevel=2)
    return fit.messages


def infer_config(state_dict: Mapping[str, Tensor], *, head_dim: int = 64, **known) -> HydraViTConfig:
    """The config of a plain ViT from the shapes of its weights.

    Shapes do not tell the head dim, drop-path, norm epsilon or which of two non-square grids it is: pass such fields of
    the config in ``known``. Raises ``ValueError`` where the weights are no ViT or the shapes leave no single answer.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(state_dict).items()}
    expected = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    if "reg_token" in shapes:
        expected["reg_token"] = 3
    for name, dims in expected.items():
        if len(shapes.get(name, ())) != dims:
            raise ValueError(
                f"these are not the weights of a Vision Transformer: {name} is {shapes.get(name, 'missing')}"
            )
        if 0 in shapes[name]:
            raise ValueError(f"the weights are damaged: {name} has shape {shapes[name]}, which is empty")
    embed, in_channels, patch, patch_width = shapes["patch_embed.proj.weight"]
    if patch != patch_width:
        raise ValueError(f"patch_embed.proj.weight has patches of {patch} x {patch_width} pixels; expected squares")
    if type(head_dim) is not int or head_dim < 1 or embed % head_dim:
        raise ValueError(f"width {embed} is not a multiple of head_dim {head_dim}; pass the head_dim of these weights")
    head = shapes.get("head.weight", (0, embed))
    if len(head) not in (2, 3):
        raise ValueError(f"head.weight has shape {head}; expected (classes, {embed})")
    if len(head) == 3 or any(re.match(r"heads?\.\d+\.", name) for name in shapes):
        raise ValueError("separate classifiers do not say which widths they serve: pass a config")
    class_token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    prefix = class_token + registers
    values = {
        "patch_size": patch,
        "in_channels": in_channels,
        "num_classes": head[0],
        "depth": _depth(shapes),
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
    positions = shapes["pos_embed"][1]
    height, width = check_image_size(known["image_size"], patch) if "image_size" in known else (0, 0)
    patches = (height // patch) * (width // patch)
    if not patches or patches not in (positions - prefix, positions):  # no size given, or one to be resampled to
        patches = next((n for n in (positions - prefix, positions) if math.isqrt(max(n, 0)) ** 2 == n > 0), 0)
        if not patches:
            raise ValueError(f"pos_embed has {positions} tokens, {prefix} of them before the patches: no square grid; "
                             "pass the image_size")  # fmt: skip
        values.setdefault("image_size", math.isqrt(patches) * patch)
    values.setdefault("no_embed_class", prefix > 0 and positions == patches)
    return HydraViTConfig.from_dict(values)


class _Fit:
    """One call of ``load_weights``: from the checkpoint's tensors to a whole state dict of the model."""

    def __init__(self, config, own: dict[str, Tensor], source: dict[str, Tensor], source_config, strict: bool):
        self.config, self.own, self.strict, self.source_config = config, own, strict, source_config
        self.source = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): t for name, t in source.items()}  # DeiT III
        self.messages: list[str] = []
        self.width = config.embed  # channels of the source

    def run(self) -> dict[str, Tensor]:
        if not set(self.own) & set(self.source):
            some = ", ".join(sorted(self.source)[:3]) or "nothing"
            raise ValueError(
                f"these are not the weights of a Vision Transformer: expected names as in timm, found {some}"
            )
        wrong = [f"{name} ({t.dtype})" for name, t in self.source.items() if not t.dtype.is_floating_point]
        if wrong:
            raise ValueError(f"weights must be floating-point tensors, not {_some(wrong)}")
        self._check_sizes()
        self._drop_distillation()
        self._rename_norm()
        self._fit_classifier()
        if "pos_embed" in self.source:
            self._fit_positions()
        missing = sorted(set(self.own) - set(self.source))
        unexpected = sorted(set(self.source) - set(self.own))
        for names, text in ((missing, "the checkpoint lacks"), (unexpected, "the model has no place for")):
            if names and self.strict:
                depth = f"; depth is {_depth(self.source)}, expected {self.config.depth}"
                raise ValueError(f"{text} {_some(names)}{depth if _depth(self.source) != self.config.depth else ''}")
            if names:
                self.messages.append(f"{text} {_some(names)}")
        slices = self._slices()
        return {name: self._place(name, tensor, slices) for name, tensor in self.own.items()}

    def _check_sizes(self) -> None:
        """The differences that have a name of their own, and what later steps count on; ``_place`` finds any other."""
        weight = self.source.get("patch_embed.proj.weight")
        if weight is not None and weight.dim() == 4:
            self._check_stem(weight)
            self.width = weight.shape[0]
        for name in (*PREFIX, "pos_embed"):
            shape = tuple(self.source[name].shape) if name in self.source else (1, 1, self.width)
            if len(shape) != 3 or shape[::2] != (1, self.width):
                raise ValueError(f"{name} has shape {shape}; expected (1, tokens, {self.width})")

    def _check_stem(self, weight: Tensor) -> None:
        for axis, name in ((1, "in_channels"), (2, "patch_size"), (3, "patch_size")):
            if weight.shape[axis] != getattr(self.config, name):
                raise ValueError(f"{name} is {weight.shape[axis]}, the model's is {getattr(self.config, name)}")
        width, config = weight.shape[0], self.config
        if width > config.embed:
            raise ValueError(f"the width is {width} channels, the model has only {config.embed}")
        if width < config.embed and (width % config.head_dim or config.geometry != "hydravit"):
            raise ValueError(
                f"the width is {width} channels, the model's is {config.embed}; only a multiple of head_dim "
                f"{config.head_dim} fits, and only in geometry 'hydravit', not {config.geometry!r}"
            )

    def _drop_distillation(self) -> None:
        extra = [name for name in self.source if name == "dist_token" or name.startswith("head_dist.")]
        if not extra:
            return
        if self.strict:
            raise ValueError(
                f"it is a distilled DeiT ({_some(extra)}): its logits are the mean of two classifiers on two tokens, "
                "which this model does not have; strict=False drops the distillation token and its classifier"
            )
        if "dist_token" in self.source and "pos_embed" in self.source:
            positions = self.source["pos_embed"]
            self.source["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
        for name in extra:
            del self.source[name]
        self.messages.append(f"dropped {_some(extra)} of a distilled DeiT")

    def _rename_norm(self) -> None:
        mine, other = ("norm", "fc_norm") if self.config.pool == "token" else ("fc_norm", "norm")
        if f"{other}.weight" in self.source and f"{mine}.weight" not in self.source:
            for name in ("weight", "bias"):
                if f"{other}.{name}" in self.source:
                    self.source[f"{mine}.{name}"] = self.source.pop(f"{other}.{name}")
            self.messages.append(f"{other} is used as {mine}, because the model has pool={self.config.pool!r}")

    def _fit_classifier(self) -> None:
        config = self.config
        self._stack_classifiers()
        came = {name: self.source.pop(name) for name in ("head.weight", "head.bias") if name in self.source}
        if not config.num_classes:
            if came:
                self.messages.append("the classifier is left out, because the model has num_classes=0")
            return
        if not came:
            self.messages.append("there is no classifier; the model's is initialised anew")
        else:
            classes = self._classes(came)
            if classes == config.num_classes:
                self.source |= self._classifier_of_every_width(came)
                return
            self.messages.append(f"num_classes is {classes}, the model's is {config.num_classes}: its classifier is "
                                 "initialised anew")  # fmt: skip
        self.source["head.weight"] = nn.init.trunc_normal_(torch.empty(self.own["head.weight"].shape), std=0.02)
        self.source["head.bias"] = torch.zeros(self.own["head.bias"].shape)

    def _stack_classifiers(self) -> None:
        """``head.<i>.weight`` of several widths to one tensor; channels a width does not have are zero."""
        for kind, dims in (("weight", 2), ("bias", 1)):
            names = [name for name in self.source if re.fullmatch(rf"heads?\.\d+\.{kind}", name)]
            names.sort(key=lambda name: int(name.split(".")[1]))
            parts = [self.source.pop(name) for name in names]
            if kind == "weight" and all(part.dim() == dims and part.shape[1] <= self.width for part in parts):
                parts = [F.pad(part, (0, self.width - part.shape[1])) for part in parts]
            if any(part.dim() != dims or part.shape != parts[0].shape for part in parts):
                raise ValueError(f"separate classifiers differ in shape: {[tuple(part.shape) for part in parts]}")
            if parts:
                self.source[f"head.{kind}"] = torch.stack(parts)

    def _classes(self, classifier: dict[str, Tensor]) -> int:
        """How many classes a classifier is for, be it one or one for each width."""
        widths, classes = self.config.separate_classifiers, {}
        for name, tensor in classifier.items():
            dims = 2 if name == "head.weight" else 1
            shape = tuple(tensor.shape)
            if len(shape) not in (dims, dims + 1):
                raise ValueError(f"{name} has shape {shape}; expected {dims} axes, or {dims + 1} for every width's own")
            if len(shape) > dims and shape[0] != len(widths):
                raise ValueError(f"there are separate classifiers: {name} has shape {shape}, "
                                 f"but the model's separate_classifiers are {list(widths)}")  # fmt: skip
            classes[name] = shape[-dims]
        if len(set(classes.values())) > 1:
            raise ValueError(
                f"head.weight is for {classes['head.weight']} classes, head.bias for {classes['head.bias']}"
            )
        return classes.popitem()[1]

    def _classifier_of_every_width(self, classifier: dict[str, Tensor]) -> dict[str, Tensor]:
        widths = len(self.config.separate_classifiers)
        shared = {name for name, tensor in classifier.items() if tensor.dim() < self.own[name].dim()}
        if shared:
            self.messages.append("the one classifier is copied to every width's own")
        return {name: t.expand(widths, *t.shape) if name in shared else t for name, t in classifier.items()}

    def _fit_positions(self) -> None:
        """Bring ``pos_embed`` to the model's tokens: its prefix rows, then the patches' grid."""
        config, positions = self.config, self.source["pos_embed"]
        counts = {name: self.source[name].shape[1] for name in PREFIX if name in self.source}
        covered, grid = self._source_grid(positions.shape[1], sum(counts.values()))
        rows, patches = positions[:, :covered], positions[:, covered:]
        rows = dict(zip(counts, rows.split(list(counts.values()), 1), strict=True)) if covered else {}
        if grid != config.grid:
            patches = resample_positions(patches, grid, config.grid)
            self.messages.append(
                f"pos_embed is resampled from {grid[0]} x {grid[1]} to {config.grid[0]} x {config.grid[1]}"
            )
        if config.no_embed_class:
            for name, row in rows.items():  # a token and its position are only ever used as their sum
                self.source[name] = self.source[name] + row
            if rows:
                self.messages.append("positions of the class and register tokens are added to these tokens")
            self.source["pos_embed"] = patches
            return
        mine = {name: self.own[name].shape[1] for name in PREFIX if name in self.own}
        if mine and not rows:
            self.messages.append("pos_embed gets zeros for the class and register tokens")
        # Only strict=False gets past this where tokens are missing or left over.
        parts = [rows.get(name, positions.new_zeros(1, count, self.width)) for name, count in mine.items()]
        self.source["pos_embed"] = torch.cat([*parts, patches], dim=1)

    def _source_grid(self, tokens: int, prefix: int) -> tuple[int, tuple[int, int]]:
        """How many prefix tokens ``pos_embed`` covers, and the grid of its patches."""
        layouts = [0, prefix] if self.config.no_embed_class else [prefix, 0]
        for grid in (self.source_config.grid if self.source_config else None, self.config.grid):
            for covered in layouts:
                if grid and tokens - covered == grid[0] * grid[1]:
                    return covered, grid
        for covered in layouts:
            side = math.isqrt(max(tokens - covered, 0))
            if side and side * side == tokens - covered:
                return covered, (side, side)
        raise ValueError(
            f"pos_embed has {tokens} tokens, {prefix} of them before the patches: neither the model's grid "
            f"{self.config.grid} nor a square"
        )

    def _slices(self) -> dict:
        """Where the checkpoint's tensors go, for a smaller ViT; empty if it is as wide as the model."""
        if self.width == self.config.embed:
            return {}
        heads = self.width // self.config.head_dim
        self.messages.append(f"a ViT of {heads} heads becomes the first {heads} of {self.config.max_heads}")
        plain = HydraViTConfig.from_dict({**self.config.to_dict(), "separate_classifiers": ()})
        slices = hydravit(plain, heads).parameter_slices(plain)
        if self.config.separate_classifiers:
            whole = ((0, len(self.config.separate_classifiers)),)
            slices |= {name: (whole, *slices[name]) for name in ("head.weight", "head.bias")}
        return slices

    def _place(self, name: str, own: Tensor, slices: dict) -> Tensor:
        """The model's new value of one parameter."""
        if name not in self.source:
            return own
        tensor, intervals = self.source[name], slices.get(name, ())
        if tensor.shape == own.shape:
            return tensor
        expected = [sum(length for _, length in axis) for axis in intervals] + list(own.shape[len(intervals) :])
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")
        result = own.clone()
        _write(result, tensor.to(result), intervals)
        return result


def _write(target: Tensor, values: Tensor, intervals: tuple, axis: int = 0) -> None:
    """Copy ``values``, which lie densely, to the intervals of ``target``."""
    if not intervals:
        target.copy_(values)
        return
    done = 0
    for offset, length in intervals[0]:
        _write(target.narrow(axis, offset, length), values.narrow(axis, done, length), intervals[1:], axis + 1)
        done += length


def resample_positions(patches: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embedding ``(1, h * w, D)`` of another grid, ``(1, H * W, D)``, in the dtype given."""
    image = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)


def _depth(names: Iterable[str]) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, names) if match), default=-1)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
