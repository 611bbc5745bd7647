"""Checkpoint files, ``.safetensors`` and torch's: the weights of a model and what else a user of them needs."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

from hydravit.atomic import atomic_write
from hydravit.checkpoint.formats import METADATA, read_file, write_torch
from hydravit.checkpoint.integrity import write_safetensors
from hydravit.checkpoint.names import named_tensors
from hydravit.checkpoint.own import described
from hydravit.config import HydraViTConfig
from hydravit.integers import plain_int
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file. Every field but the weights is None if the file does not have it."""

    state_dict: dict[str, Tensor]
    config: HydraViTConfig | None = None
    trained_heads: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    split_seed: int | None = None  # of the folder that it was trained on: ``seed`` of ``load_dataset``
    method: str | None = None  # what made the widths, where it was not training: "wpac, 1024 images of photos/"
    path: Path | None = None
    known: Mapping[str, Any] = field(default_factory=dict)  # without a config, the fields known of it

    @property
    def where(self) -> str:
        """The beginning of every message about this checkpoint: it names the file, if there is one."""
        return "" if self.path is None else f"checkpoint {self.path}: "


def read_checkpoint(
    path: str | os.PathLike | IO[bytes], *, prefer_ema: bool = True, part: str | None = None, verify: bool = True
) -> Checkpoint:
    """Read a ``.safetensors`` file or a torch file (any other extension), or one of both that is open or in memory.

    The weights of a torch file may lie in it under any name. Of ``state_dict_ema`` or ``model_ema`` (a moving average)
    and ``state_dict`` or ``model``, the former are read; with ``prefer_ema=False``, the latter. A prefix before all
    names, as ``_orig_mod.module.`` or ``teacher.backbone.``, is removed.

    Args:
        part: which model, where the file has several: the name under which its weights lie, such as ``"teacher"``, or
            a word of the prefix before its names.
        verify: whether to check the file's checksums, which reads it twice.
    Returns:
        Checkpoint: tensors on the CPU, in the dtypes of the file. For files of HydraViT's authors it has the trained
        widths and the preprocessing that their script's arguments tell.
    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or no checkpoint, has several models, or its metadata is wrong. The message
            names the file.
    """
    content, metadata = read_file(path, verify=verify)
    named = Path(path) if isinstance(path, (str, os.PathLike)) else None
    try:
        fields = _parse_metadata(metadata) if metadata else _fields_of_the_authors(content)
        return Checkpoint(named_tensors(content, prefer_ema, part), **fields, path=named)
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {named or 'in memory'}: {error}") from error


def _fields_of_the_authors(content: object) -> dict:
    """Return what the arguments in a file of HydraViT's authors tell: their trained widths, crop and sizes.

    Their script (https://github.com/ds-kiel/HydraViT) is timm's with ``--heads``, models whose heads have 64 channels,
    and timm's crop of 0.875 for models that name none.
    """
    arguments = content.get("args") if isinstance(content, Mapping) else None
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    heads, name = values.get("heads"), values.get("model")
    if not isinstance(heads, (list, tuple)) or not str(name).startswith("hydravit"):
        return {}
    fields = _parse_metadata({"trained_heads": list(heads)})
    channels, *size = values.get("input_size") or (values.get("in_chans") or 3, *[values.get("img_size") or 224] * 2)
    known = {"head_dim": 64, "norm_eps": 1e-6, "pool": values.get("gp") or "token", "image_size": tuple(size)}
    options = {key: values[key] for key in ("mean", "std", "interpolation") if values.get(key)}
    if channels == 3 and tuple(map(len, (options.get("mean", "rgb"), options.get("std", "rgb")))) == (3, 3):
        crop = values.get("crop_pct") or 0.875
        fields["preprocessing"] = Preprocessing(image_size=tuple(size), crop=crop, **options)
    return {**fields, "known": known | {"separate_classifiers": fields["trained_heads"]}}


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    trained_heads: Iterable[int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Iterable[str] | None = None,
    split_seed: int | None = None,
    method: str | None = None,
) -> None:
    """Write the weights and all that a user of them needs, whole or not at all.

    Args:
        path: ends in ``.safetensors``, ``.pt`` or ``.pth``.
        model: a ``HydraViT``, also one wrapped in DDP or ``torch.compile``.
        trained_heads: the widths that were trained; None: those of the model.
        split_seed: ``seed`` of ``load_dataset``, by which the images were held out that it was not trained on.
        method: what made the widths, where it was not training; ``hydravit info`` shows it.
    Raises:
        TypeError: ``model`` is no ``HydraViT``.
        ValueError: unknown extension, values that do not fit the model, or a module that its config does not describe.
        OSError: the file cannot be written; an older file at ``path`` is then unchanged.
    """
    path = Path(path)
    check_suffix(path)
    while not isinstance(model, HydraViT):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise TypeError(f"model must be a HydraViT, not {type(model).__name__}")
        model = inner
    config, weights = described(model)
    metadata = model_metadata(
        config,
        trained_heads=model.trained_heads if trained_heads is None else trained_heads,
        preprocessing=preprocessing,
        class_names=class_names,
        split_seed=split_seed,
        method=method,
    )
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        header = {METADATA: json.dumps(metadata), "format": "pt"}
        atomic_write(path, lambda file: write_safetensors(file, state_dict, header))
    else:
        content = {"state_dict": state_dict, METADATA: metadata}
        atomic_write(path, lambda file: write_torch(content, file))


def check_suffix(path: str | os.PathLike) -> None:
    """Raise ``ValueError`` unless ``save_checkpoint`` knows the format of a file of this name."""
    if Path(path).suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path must end in .safetensors, .pt or .pth, not {Path(path).name!r}")


def model_metadata(
    config: HydraViTConfig,
    *,
    trained_heads: Iterable[int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Iterable[str] | None = None,
    split_seed: int | None = None,
    method: str | None = None,
) -> dict:
    """Return what our files hold beside the weights, as plain values; arguments are those of ``save_checkpoint``."""
    trained: Any = trained_heads  # may be anything: what is wrong is named below
    metadata = {
        "config": config.to_dict(),
        "trained_heads": [plain_int(k) for k in trained] if isinstance(trained, Iterable) else trained,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "class_names": None if class_names is None else list(class_names),
        "split_seed": plain_int(split_seed),
        "method": method,
    }
    metadata = json.loads(json.dumps(metadata))  # both formats hold the same plain values
    _parse_metadata(metadata)
    return metadata


def _parse_metadata(metadata: object) -> dict:
    """Return the fields of a ``Checkpoint``; raise ``ValueError`` or ``TypeError`` for anything unexpected."""
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata {METADATA!r} must be a dict, not {type(metadata).__name__}")
    config, heads, preprocessing, names, seed, method = (
        metadata.get(key) for key in ("config", "trained_heads", "preprocessing", "class_names", "split_seed", "method")
    )
    config = None if config is None else HydraViTConfig.from_dict(config)
    if heads is not None:
        most = config.widths if config else math.inf
        if not isinstance(heads, list) or not heads or any(type(k) is not int or not 1 <= k <= most for k in heads):
            raise ValueError(f"trained_heads must be widths in 1..{most}, not {heads!r}")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be strings, not {names!r}")
        if config and len(names) != config.num_classes:
            raise ValueError(f"class_names must be {config.num_classes}, as num_classes, not {len(names)}")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"split_seed must be an integer, not {seed!r}")
    if method is not None and not isinstance(method, str):
        raise ValueError(f"method must be a string, not {method!r}")
    return {
        "config": config,
        "trained_heads": None if heads is None else tuple(sorted(set(heads))),
        "preprocessing": None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        "class_names": None if names is None else tuple(names),
        "split_seed": seed,
        "method": method,
    }
