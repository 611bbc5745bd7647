"""Registers the Triton kernels and says where they run. The first call of one of their ops imports them.

On a CPU they run on Triton's interpreter, for tests, if ``TRITON_INTERPRET=1`` is set before this file is imported.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from hydravit_kernels import ops

_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Return "" if the kernels run there, else the reason, worded to follow the backend's name."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device.type == "cpu" and not _interpreted:
        return "runs on a CPU only on Triton's interpreter, for tests (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"has no kernels for device {device.type!r}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "finds no GPU"
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "computes in torch.bfloat16 from compute capability 8.0 on"
    possible = (torch.float32, torch.float16) if _interpreted else (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in possible:
        return f"computes in {', '.join(map(str, possible))} here, not in {dtype}"
    return ""


def _imported(name: str):
    def function(*arguments):
        from hydravit_kernels import triton

        return getattr(triton, name)(*arguments)

    return function if name == "adamw" else ops.grouped(name, function)


ops.define("triton")
for _name in (*ops.SCHEMAS, "adamw"):
    for _key in ("CUDA", "CPU") if _interpreted else ("CUDA",):
        ops.LIBRARY.impl(f"{_name}_triton", _imported(_name), _key)
