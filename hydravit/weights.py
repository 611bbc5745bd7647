"""Checkpoints: reading and writing files, and fitting foreign weights into a model.

Names are those of timm's ``VisionTransformer``, which DeiT's and HydraViT's authors' checkpoints share. No file is ever
unpickled beyond tensors and plain containers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydravit.config import HydraViTConfig
from hydravit.geometry import hydravit
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing

# Where training scripts keep the weights in a torch file. The authors of HydraViT evaluate the moving average.
AVERAGED, LATEST = ("state_dict_ema", "model_ema"), ("state_dict", "model")
METADATA = "hydravit"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds. Everything but the weights is None where the file does not say."""

    state_dict: dict[str, Tensor]
    config: HydraViTConfig | None = None
    trained_heads: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    path: Path | None = None


def read_checkpoint(path: str | os.PathLike, *, prefer_ema: bool = True) -> Checkpoint:
    """Read a ``.safetensors`` file or a torch file (any other extension).

    Of a torch file's ``state_dict_ema``, ``model_ema``, ``state_dict`` and ``model`` the first one present is used;
    with ``prefer_ema=False`` the last two come first. ``module.`` and ``_orig_mod.`` before names are removed.

    Returns:
        Checkpoint: tensors on the CPU, in the dtypes of the file.
    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or no checkpoint, or its metadata is wrong. The message names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a directory, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    open(path, "rb").close()  # whatever fails from here on is the content: torch raises OSError for a torn file, too
    try:
        if path.suffix == ".safetensors":
            content, metadata = load_file(path), _safetensors_metadata(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer stores its arguments
                content = torch.load(path, map_location="cpu", weights_only=True)
            metadata = content.get(METADATA, {}) if isinstance(content, Mapping) else {}
    except Exception as error:  # pickle, zip and safetensors each have their own kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        expected = "a whole safetensors file" if path.suffix == ".safetensors" else "a whole torch file of tensors"
        raise ValueError(f"checkpoint {path} cannot be read; expected {expected} ({reason})") from error
    try:
        state_dict = _unwrap(content, AVERAGED + LATEST if prefer_ema else LATEST + AVERAGED)
        return Checkpoint(state_dict, **_parse_metadata(metadata), path=path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {error}") from error


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    trained_heads: tuple[int, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | list[str] | None = None,
) -> None:
    """Write the weights and all a user of them needs, atomically: ``.safetensors``, ``.pt`` or ``.pth``.

    Args:
        model: a ``HydraViT``, also one wrapped in DDP or ``torch.compile``.
        trained_heads: the widths that were trained; None: those of the model.
    Raises:
        ValueError: unknown extension, or values that do not fit the model.
        OSError: it cannot be written; a file that was there before is then unchanged.
    """
    path = Path(path)
    while not isinstance(model, HydraViT):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise TypeError(f"model must be a HydraViT, not {type(model).__name__}")
        model = inner
    trained_heads = model.trained_heads if trained_heads is None else trained_heads
    metadata = {
        "config": model.config.to_dict(),
        "trained_heads": None if trained_heads is None else sorted(trained_heads),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "class_names": None if class_names is None else list(class_names),
    }
    metadata = json.loads(json.dumps(metadata))  # both formats hold the same plain values
    _parse_metadata(metadata)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        atomic_write(path, lambda file: save_file(state_dict, file, {METADATA: json.dumps(metadata), "format": "pt"}))
    elif path.suffix in (".pt", ".pth"):
        atomic_write(path, lambda file: torch.save({"state_dict": state_dict, METADATA: metadata}, file))
    else:
        raise ValueError(f"path must end in .safetensors, .pt or .pth, not {path.name!r}")


def atomic_write(path: str | os.PathLike, writer: Callable[[Path], object]) -> None:
    """Let ``writer`` write a temporary file beside ``path``, then put it in its place.

    Readers see the old file or the new one, whole, also after a power cut. Whatever ``writer`` raises, the old file
    stays and the temporary one goes; a failure to write is an ``OSError`` that names ``path``.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing to its file
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        writer(temporary)
        temporary.chmod(mode)  # safetensors' own are for the owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch words a full disk as an inconsistent position in a file, so say what is left, too.
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        failure = OSError(f"{path} could not be written ({free >> 20} MiB free there): {error}")
        failure.errno = getattr(error, "errno", None)
        raise failure from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
        weights: a checkpoint or a state dict; wrappers and prefixes as in ``read_checkpoint``.
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
        fit = _Fit(model.config, own, _unwrap(checkpoint.state_dict, AVERAGED + LATEST), checkpoint.config, strict)
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
    shapes = {name: tuple(tensor.shape) for name, tensor in _unwrap(state_dict, AVERAGED + LATEST).items()}
    for name, dims in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
        if len(shapes.get(name, ())) != dims:
            raise ValueError(
                f"these are not the weights of a Vision Transformer: {name} is {shapes.get(name, 'missing')}"
            )
    embed, in_channels, patch, patch_width = shapes["patch_embed.proj.weight"]
    if patch != patch_width:
        raise ValueError(f"patch_embed.proj.weight has patches of {patch} x {patch_width} pixels; expected squares")
    if embed % head_dim:
        raise ValueError(f"width {embed} is not a multiple of head_dim {head_dim}; pass the head_dim of these weights")
    head = shapes.get("head.weight", (0, embed))
    if len(head) != 2 or any(re.match(r"heads?\.\d+\.", name) for name in shapes):
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
    if "image_size" in values:
        size = values["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        patches = (height // patch) * (width // patch)
    else:
        patches = next((n for n in (positions - prefix, positions) if math.isqrt(max(n, 0)) ** 2 == n > 0), 0)
        if not patches:
            raise ValueError(f"pos_embed has {positions} tokens, {prefix} of them before the patches: no square grid; "
                             "pass the image_size")  # fmt: skip
        values["image_size"] = math.isqrt(patches) * patch
    values.setdefault("no_embed_class", prefix > 0 and positions == patches)
    return HydraViTConfig.from_dict(values)


class _Fit:
    """One call of ``load_weights``: from the checkpoint's tensors to a whole state dict of the model."""

    def __init__(self, config, own: dict[str, Tensor], source: dict[str, Tensor], source_config, strict: bool):
        self.config, self.own, self.strict, self.source_config = config, own, strict, source_config
        self.source = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): t for name, t in source.items()}  # DeiT III
        self.messages: list[str] = []

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
        """The differences that have a name of their own; ``_place`` reports any other one."""
        weight = self.source.get("patch_embed.proj.weight")
        if weight is None or weight.dim() != 4:
            return
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
        config, widths = self.config, self.config.separate_classifiers
        self._stack_classifiers()
        came = {name: self.source[name] for name in ("head.weight", "head.bias") if name in self.source}
        if not config.num_classes:
            if came:
                self.messages.append("the classifier is left out, because the model has num_classes=0")
        elif not came:
            self.messages.append("there is no classifier; the model's is initialised anew")
        else:
            rows = [t.shape[-2 if name == "head.weight" else -1] if t.dim() else 0 for name, t in came.items()]
            if len(set(rows)) > 1:
                raise ValueError(f"head.weight is for {rows[0]} classes, head.bias for {rows[1]}")
            classes = rows[0]
            separate = any(t.dim() == 3 for t in came.values())
            if separate and len(next(iter(came.values()))) != len(widths):
                raise ValueError(f"there are separate classifiers of shape {tuple(came['head.weight'].shape)}; "
                                 f"the model's separate_classifiers are {list(widths)}")  # fmt: skip
            if classes == config.num_classes:
                if widths and not separate:
                    self.source |= {name: t.expand(len(widths), *t.shape) for name, t in came.items()}
                    self.messages.append("the one classifier is copied to every width's own")
                return
            self.messages.append(f"num_classes is {classes}, the model's is {config.num_classes}: its classifier is "
                                 "initialised anew")  # fmt: skip
        for name in came:
            del self.source[name]
        if config.num_classes:
            self.source["head.weight"] = nn.init.trunc_normal_(torch.empty(self.own["head.weight"].shape), std=0.02)
            self.source["head.bias"] = torch.zeros(self.own["head.bias"].shape)

    def _stack_classifiers(self) -> None:
        """``head.<i>.weight`` of several widths to one tensor; channels a width does not have are zero."""
        for kind in ("weight", "bias"):
            names = [name for name in self.source if re.fullmatch(rf"heads?\.\d+\.{kind}", name)]
            names.sort(key=lambda name: int(name.split(".")[1]))
            parts = [self.source.pop(name) for name in names]
            if kind == "weight":
                widest = self.source["patch_embed.proj.weight"].shape[0] if parts else 0
                parts = [F.pad(part, (0, widest - part.shape[-1])) for part in parts]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"separate classifiers differ in shape: {[tuple(part.shape) for part in parts]}")
            if parts:
                self.source[f"head.{kind}"] = torch.stack(parts)

    def _fit_positions(self) -> None:
        """Bring ``pos_embed`` to the model's tokens: its prefix rows, then the patches' grid."""
        config, positions = self.config, self.source["pos_embed"]
        if positions.dim() != 3:
            raise ValueError(f"pos_embed has shape {tuple(positions.shape)}; expected (1, tokens, channels)")
        names = [name for name in ("cls_token", "reg_token") if name in self.source]
        prefix = sum(self.source[name].shape[1] for name in names)
        covered, grid = self._source_grid(positions.shape[1], prefix)
        rows, patches = positions[:, :covered], positions[:, covered:]
        if grid != config.grid:
            patches = resample_positions(patches, grid, config.grid)
            self.messages.append(
                f"pos_embed is resampled from {grid[0]} x {grid[1]} to {config.grid[0]} x {config.grid[1]}"
            )
        if config.no_embed_class and covered:  # a token and its position are only ever used as their sum
            for name, row in zip(names, rows.split([self.source[name].shape[1] for name in names], 1), strict=True):
                self.source[name] = self.source[name] + row
            self.messages.append("positions of the class and register tokens are added to these tokens")
        if config.no_embed_class:
            self.source["pos_embed"] = patches
            return
        if not covered and config.prefix_tokens:
            rows = positions.new_zeros(1, config.prefix_tokens, positions.shape[2])
            self.messages.append("pos_embed gets zeros for the class and register tokens")
        elif covered != config.prefix_tokens:  # only strict=False gets past this: some tokens are missing or left over
            kept = [self.source[name].shape[1] if name in self.own else 0 for name in names]
            parts = rows.split([self.source[name].shape[1] for name in names], 1)
            rows = torch.cat([part[:, :keep] for part, keep in zip(parts, kept, strict=True)], 1)
            rows = F.pad(rows, (0, 0, 0, config.prefix_tokens - rows.shape[1]))
        self.source["pos_embed"] = torch.cat([rows, patches], dim=1)

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
        weight = self.source.get("patch_embed.proj.weight")
        if weight is None or weight.shape[0] == self.config.embed:
            return {}
        heads = weight.shape[0] // self.config.head_dim
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


def _unwrap(content: object, wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """The named tensors inside a checkpoint's wrappers, without prefixes of DDP, ``torch.compile`` and averaging."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"expected named tensors, found {type(content).__name__}{' with nothing in it' * (content == {})}"
        )
    result = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            known = ", ".join(AVERAGED + LATEST)
            raise ValueError(f"entry {name!r} is a {type(value).__name__}, not a tensor (weights may lie in {known})")
        short = re.sub(r"^((module|_orig_mod)\.)+", "", str(name))
        if short in result:
            raise ValueError(f"entry {short!r} occurs twice")
        result[short] = value
    result.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return result


def _safetensors_metadata(path: Path) -> dict:
    """Our JSON in a safetensors header: 8 bytes of length, then JSON with ``__metadata__`` (strings only)."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))


def _parse_metadata(metadata: object) -> dict:
    """The fields of a ``Checkpoint``; raises ``ValueError`` or ``TypeError`` for anything unexpected."""
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata {METADATA!r} must be a dict, not {type(metadata).__name__}")
    config, heads, preprocessing, names = (
        metadata.get(key) for key in ("config", "trained_heads", "preprocessing", "class_names")
    )
    config = None if config is None else HydraViTConfig.from_dict(config)
    if heads is not None:
        most = config.max_heads if config else math.inf
        if not isinstance(heads, list) or not heads or any(type(k) is not int or not 1 <= k <= most for k in heads):
            raise ValueError(f"trained_heads must be numbers of heads in 1..{most}, not {heads!r}")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be strings, not {names!r}")
        if config and len(names) != config.num_classes:
            raise ValueError(f"class_names must be {config.num_classes}, as num_classes, not {len(names)}")
    return {
        "config": config,
        "trained_heads": None if heads is None else tuple(heads),
        "preprocessing": None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        "class_names": None if names is None else tuple(names),
    }


def _depth(names) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, names) if match), default=-1)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
