"""The two formats of files: safetensors' and torch's. Reading unpickles tensors and plain containers only."""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch

from hydravit.checkpoint.integrity import check_safetensors, check_torch

METADATA = "hydravit"  # our entry in a torch file, or in the header of a safetensors file
# Plain values that training scripts store beside the weights: their arguments, and numbers of NumPy.
_SCALAR: Any = np.float64(0).__reduce__()[0]  # the function that makes a scalar; NumPy 1 and 2 have it elsewhere
_PLAIN: list[Any] = [argparse.Namespace, pathlib.PosixPath, np.dtype]
_PLAIN += {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
_PLAIN += [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read_file(path: str | os.PathLike | IO[bytes], *, verify: bool = True) -> tuple[object, object]:
    """Return what a ``.safetensors`` or a torch file holds, with tensors on the CPU, and the metadata that we wrote.

    Args:
        path: a file, or one that is open or in memory.
        verify: whether to check the file's checksums, which reads it twice.
    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or holds more than tensors and plain values; the message names it.
    """
    if not isinstance(path, (str, os.PathLike)):
        data = path.read()
        if data[8:9] == b"{":
            return _read(lambda: _load_safetensors_bytes(data, verify), "checkpoint in memory", _SAFETENSORS)
        return _read(lambda: _load_torch(io.BytesIO(data), verify), "checkpoint in memory", _TORCH)
    path, name = Path(path), f"checkpoint {path}"
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a directory, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"{name} does not exist")
    with open(path, "rb") as file:  # raises if the file cannot be read: torch raises OSError for a torn file too
        if path.suffix == ".safetensors":
            return _read(lambda: _load_safetensors(path, file, verify), name, _SAFETENSORS)
        return _read(lambda: _load_torch(file, verify), name, _TORCH)


def write_torch(content: object, path: Path) -> None:
    """Write a torch file. Equal content is equal bytes, whatever the file is called."""
    with open(path, "wb") as file:  # torch writes the name of a file that it opens itself into the file
        torch.save(content, file)


_SAFETENSORS, _TORCH = "a whole safetensors file", "a whole torch file of tensors"


def _read(load: Callable[[], tuple[object, object]], name: str, expected: str) -> tuple[object, object]:
    try:
        return load()
    except Exception as error:  # pickle, zip and safetensors each raise their own kinds
        raise ValueError(f"{name} cannot be read; {_why(error, expected)}") from error


def _load_safetensors(path: Path, file: IO[bytes], verify: bool) -> tuple[object, object]:
    with safetensors.safe_open(path, framework="pt") as tensors:
        if verify:
            check_safetensors(file)
        content = {name: tensors.get_tensor(name) for name in tensors.keys()}
        return content, json.loads((tensors.metadata() or {}).get(METADATA, "{}"))


def _load_safetensors_bytes(data: bytes, verify: bool) -> tuple[object, object]:
    content = safetensors.torch.load(data)
    if verify:
        check_safetensors(io.BytesIO(data))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return content, json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))


def _load_torch(file: IO[bytes], verify: bool) -> tuple[object, object]:
    if verify:
        check_torch(file)
        file.seek(0)
    with torch.serialization.safe_globals(_PLAIN):
        content = torch.load(file, map_location="cpu", weights_only=True)
    return content, content.get(METADATA, {}) if isinstance(content, Mapping) else {}


def _why(error: Exception, expected: str) -> str:
    """Say in one line why torch or safetensors cannot read a file, without torch's advice to run its code."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:class|global|type) `?([\w.]+)`? was not", text)
    if found:
        return (
            f"it holds a {found[1]}, which only running the file's code would load, where tensors and plain values "
            "are expected; write model.state_dict() instead of the object"
        )
    first = text.strip().split("\n")[0]
    if "weights_only" in text or "Weights only" in text:
        first = "it is no file of tensors"
    return f"expected {expected} ({first or type(error).__name__})"
