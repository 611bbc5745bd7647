"""Checkpoint files: reading and writing them. No file is ever unpickled beyond tensors and plain containers."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hydravit.config import HydraViTConfig
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
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}
                metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer stores its arguments
                content = torch.load(path, map_location="cpu", weights_only=True)
            metadata = content.get(METADATA, {}) if isinstance(content, Mapping) else {}
    except Exception as error:  # pickle, zip and safetensors each have their own kinds
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
        "trained_heads": list(trained_heads) if isinstance(trained_heads, Iterable) else trained_heads,
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


def named_tensors(content: object, prefer_ema: bool = True) -> dict[str, Tensor]:
    """The named tensors inside a checkpoint's wrappers, without prefixes of DDP, ``torch.compile`` and averaging."""
    wrappers = AVERAGED + LATEST if prefer_ema else LATEST + AVERAGED
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
        "trained_heads": None if heads is None else tuple(sorted(set(heads))),
        "preprocessing": None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        "class_names": None if names is None else tuple(names),
    }
