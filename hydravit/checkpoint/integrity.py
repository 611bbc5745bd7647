"""Checksums: a file that a disk or a network changed is refused, not loaded with other weights.

safetensors' format has none, so our files hold the SHA-256 of their content in their metadata. In torch's files zip has
a CRC-32 of every record, which torch writes but does not check.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from typing import IO

import safetensors.torch
from torch import Tensor

_CHECKSUM = "sha256"  # the entry of a safetensors file's metadata
_UNSET = "0" * hashlib.sha256().digest_size * 2
_CHUNK = 1 << 20
_DAMAGED = "its content is not what its checksum says, so it is damaged; verify=False or --no-verify loads it as it is"


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum. The same tensors and metadata are the same bytes."""
    safetensors.torch.save_file(dict(tensors), path, {**metadata, _CHECKSUM: _UNSET})
    with open(path, "r+b") as file:
        header, room = _read_header(file)
        # safetensors puts metadata into a random order, and cannot know the checksum before the header is complete.
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        header["__metadata__"][_CHECKSUM] = _digest(header, file)
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(room))


def check_safetensors(file: IO[bytes]) -> None:
    """Raise ``ValueError`` if a safetensors file has a checksum that is not that of its content."""
    header, _ = _read_header(file)
    found = header.get("__metadata__", {}).get(_CHECKSUM)
    if found is not None and found != _digest(header, file):
        raise ValueError(_DAMAGED)


def check_torch(file: IO[bytes]) -> None:
    """Raise ``ValueError`` if a record of a torch file is not what its CRC-32 says. Torch's old format has none."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0: torch was told to compute none
                    with archive.open(record) as content:
                        while content.read(_CHUNK):
                            pass
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(_DAMAGED) from error


def _read_header(file: IO[bytes]) -> tuple[dict, int]:
    """Return the header of a safetensors file and its length in bytes; leave the file where the tensors begin."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), length


def _digest(header: dict, tensors: IO[bytes]) -> str:
    """Return the SHA-256 of a header, without the checksum in it, and of what follows it in the file."""
    header = {**header, "__metadata__": {**header["__metadata__"], _CHECKSUM: _UNSET}}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    while chunk := tensors.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
