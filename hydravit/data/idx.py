"""A reader of IDX files, the format of MNIST and its successors: a magic number, the sizes, then the bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

UINT8 = 0x08  # the only element type these data sets use


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Read the ``uint8`` array of ``dims`` axes in ``path``, which may be gzipped.

    Raises ``ValueError`` naming the file when it is empty, damaged, truncated, too long, or of another type or rank.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None
    header = 4 + 4 * dims
    if len(data) < 4:
        raise ValueError(f"{path}: {len(data)} bytes are no IDX file")
    zero, kind, rank = struct.unpack(">HBB", data[:4])
    if zero or kind != UINT8 or rank != dims:
        expected = bytes([0, 0, UINT8, dims]).hex()
        raise ValueError(f"{path}: magic {data[:4].hex()} is not {expected} (uint8, {dims} axes)")
    if len(data) < header:
        raise ValueError(f"{path}: truncated in its header: {len(data)} of {header} bytes")
    shape = struct.unpack(f">{dims}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "too long"
        raise ValueError(f"{path}: {problem}: {len(data)} bytes, its sizes {shape} need {expected}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def find_idx(folder: Path, name: str) -> Path:
    """Return ``folder/name`` or ``folder/name.gz``. Raise ``FileNotFoundError`` if there is neither."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: has no {name} or {name}.gz")
