"""Checkpoint files, ``.safetensors`` and torch's. Reading unpickles tensors and plain containers only."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hydravit.atomic import atomic_write
from hydravit.config import HydraViTConfig
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing

# Under these names training scripts keep the weights in a torch file. HydraViT's authors evaluate the moving average.
_AVERAGED, _LATEST = ("state_dict_ema", "model_ema"), ("state_dict", "model")
_METADATA = "hydravit"  # our entry in a torch file, or in the header of a safetensors file


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file. Every field but the weights is None if the file does not have it."""

    state_dict: dict[str, Tensor]
    config: HydraViTConfig | None = None
    trained_heads: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    path: Path | None = None

    @property
    def where(self) -> str:
        """The beginning of every message about this checkpoint: it names the file, if there is one."""
        return "" if self.path is None else f"checkpoint {self.path}: "


def read_checkpoint(path: str | os.PathLike, *, prefer_ema: bool = True) -> Checkpoint:
    """Read a ``.safetensors`` file or a torch file (any other extension).

    The weights of a torch file are its first entry of ``state_dict_ema``, ``model_ema``, ``state_dict`` and ``model``;
    with ``prefer_ema=False`` the last two come first. ``module.`` and ``_orig_mod.`` before names are removed.

    Returns:
        Checkpoint: tensors on the CPU, in the dtypes of the file.
    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or no checkpoint, or its metadata is wrong. The message names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a directory, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    open(path, "rb").close()  # raises if the file cannot be read: torch raises OSError for a torn file too
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}
                metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer stores its arguments
                content = torch.load(path, map_location="cpu", weights_only=True)
            metadata = content.get(_METADATA, {}) if isinstance(content, Mapping) else {}
    except Exception as error:  # pickle, zip and safetensors each raise their own kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        expected = "a whole safetensors file" if path.suffix == ".safetensors" else "a whole torch file of tensors"
        raise ValueError(f"checkpoint {path} cannot be read; expected {expected} ({reason})") from error
    try:
        return Checkpoint(named_tensors(content, prefer_ema), **_parse_metadata(metadata), path=path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {error}") from error


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    trained_heads: Iterable[int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Iterable[str] | None = None,
) -> None:
    """Write the weights and all that a user of them needs, whole or not at all.

    Args:
        path: ends in ``.safetensors``, ``.pt`` or ``.pth``.
        model: a ``HydraViT``, also one wrapped in DDP or ``torch.compile``.
        trained_heads: the widths that were trained; None: those of the model.
    Raises:
        TypeError: ``model`` is no ``HydraViT``.
        ValueError: unknown extension, or values that do not fit the model.
        OSError: the file cannot be written; an older file at ``path`` is then unchanged.
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
        "trained_heads": list(trained_heads) if isinstance(trained_heads, Iterable) else trained_heads,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "class_names": None if class_names is None else list(class_names),
    }
    metadata = json.loads(json.dumps(metadata))  # both formats hold the same plain values
    _parse_metadata(metadata)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        header = {_METADATA: json.dumps(metadata), "format": "pt"}
        atomic_write(path, lambda file: save_file(state_dict, file, header))
    elif path.suffix in (".pt", ".pth"):
        atomic_write(path, lambda file: torch.save({"state_dict": state_dict, _METADATA: metadata}, file))
    else:
        raise ValueError(f"path must end in .safetensors, .pt or .pth, not {path.name!r}")


def named_tensors(content: object, prefer_ema: bool = True) -> dict[str, Tensor]:
    """Return the tensors inside a checkpoint's wrappers, without prefixes of DDP, ``torch.compile`` and averaging."""
    wrappers = _AVERAGED + _LATEST if prefer_ema else _LATEST + _AVERAGED
    while isinstance(content, Mapping):
        inner = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        empty = " with nothing in it" if content == {} else ""
        raise ValueError(f"expected named tensors, found {type(content).__name__}{empty}")
    result = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"entry {name!r} is a {type(value).__name__}, not a tensor (weights may lie in {', '.join(wrappers)})"
            )
        short = re.sub(r"^((module|_orig_mod)\.)+", "", str(name))
        if short in result:
            raise ValueError(f"entry {short!r} occurs twice")
        result[short] = value
    result.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return result


def _parse_metadata(metadata: object) -> dict:
    """Return the fields of a ``Checkpoint``; raise ``ValueError`` or ``TypeError`` for anything unexpected."""
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata {_METADATA!r} must be a dict, not {type(metadata).__name__}")
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
        "trained_heads": None if heads is None else tuple(sorted(set(heads))),
        "preprocessing": None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        "class_names": None if names is None else tuple(names),
    }
