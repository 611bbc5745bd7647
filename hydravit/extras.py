"""Packages that only some features need: the extras of ``pyproject.toml``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Around imports of packages that the extra ``name`` installs.

    Example:
        >>> with extra("images", "reading image files"):
        ...     from PIL import Image

    Raises:
        RuntimeError: one of them is missing; the message names the extra.
    """
    try:
        yield
    except ImportError as error:
        raise RuntimeError(f"a package is missing for {purpose}: pip install 'hydravit[{name}]' ({error})") from error
