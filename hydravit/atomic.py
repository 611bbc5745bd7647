"""Writes files whole: a reader sees the old file or the new one, never a part of one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def atomic_write(path: str | os.PathLike, writer: Callable[[Path], object]) -> None:
    """Let ``writer`` write a temporary file beside ``path``, then rename it to ``path``.

    The file at ``path`` is whole at every moment, also after a power cut. If ``writer`` raises, the old file stays and
    the temporary file is removed.

    Raises:
        OSError: the file could not be written; the message names ``path``. Other exceptions of ``writer`` pass.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing to its file
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # as in `remove_temporary_files`
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        writer(temporary)
        temporary.chmod(mode)  # safetensors lets only the owner read its files
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a wrong position in a file, so the message also says how much space is left.
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


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left of files that they wrote in this folder. No other process may write there."""
    for file in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", file.name):
            file.unlink(missing_ok=True)
