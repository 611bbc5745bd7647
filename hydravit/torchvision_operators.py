"""The operators without which ``import torchvision``, and so ``import timm``, fails beside a torch for CPUs.

torchvision from the registry is built for a torch with CUDA. Beside another its library does not load, but its Python
part still refers to two of the library's operators. It needs their schemas only; nothing here ever calls them.

``declare`` helps the running process. ``python -m hydravit.torchvision_operators`` mends the installed torchvision, so
that every process may import timm first.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_NAMES = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# For the end of the file with which torchvision loads its library.
_DECLARATION = f'''
# Written by hydravit.torchvision_operators: the library is built for another torch, so its operators get schemas only.
if not hasattr(torch.ops.torchvision, "nms"):
    for _name in {_NAMES}:
        torch.library.define(f"torchvision::{{_name}}", "{_SCHEMA}")
'''


def declare() -> None:
    """Declare the operators in this process, if there is a torchvision whose library does not load."""
    folder = _torchvision()
    if folder is not None and not _loads(folder):
        for name in _NAMES:
            torch.library.define(f"torchvision::{name}", _SCHEMA)


def mend() -> None:
    """Let the installed torchvision declare them, if its library does not load."""
    folder = _torchvision()
    if folder is None or _loads(folder):
        return
    file = folder / "extension.py"
    if _DECLARATION not in file.read_text(encoding="utf-8"):
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(_DECLARATION)
        print(f"hydravit: {file} now declares the operators of its library, which is built for another torch")


def _torchvision() -> Path | None:
    spec = find_spec("torchvision")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _loads(folder: Path) -> bool:
    """Whether the operators are known, if need be by loading the library as torchvision does, which may be repeated."""
    for library in sorted(folder.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            pass
    return hasattr(torch.ops.torchvision, "nms")


if __name__ == "__main__":
    mend()
