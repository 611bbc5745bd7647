"""Loads the native library that lies beside this file, or records why there is none.

    loaded      whether the ops have their C++ kernels, and this processor runs them
    why_not     "" if loaded, else the reason, worded to follow the backend's name
    build_info  what setup.py built, with what

``HYDRAVIT_BUILD``, the variable that steers the build, holds at run time too: ``cpu`` (CPU kernels) and ``cuda`` (CUDA
kernels too) make a missing part an ``ImportError``; ``none`` leaves the library alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hydravit_kernels import ops  # noqa: F401  (defines the ops that the library implements)

try:
    from hydravit_kernels._build_info import BUILD_INFO as build_info
except ModuleNotFoundError:
    build_info = {"why_not": "this copy of the package was never installed"}

path = Path(__file__).with_name("_C.so")


def _load(wanted: str) -> str:
    """Load the library; return why that is not possible, or ""."""
    if wanted == "none":
        return "is switched off by HYDRAVIT_BUILD=none"
    if not path.exists():
        return f"has no library: {build_info.get('why_not', f'{path.name} is gone from {path.parent}')}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        versions = f"built with torch {build_info.get('torch', 'of unknown version')}, running {torch.__version__}"
        return f"cannot load its library ({versions}): {error.__cause__ or error}"
    try:
        torch.ops.hydravit.cpu_isa()
    except RuntimeError as error:
        return f"refuses HYDRAVIT_CPU_ISA={os.environ.get('HYDRAVIT_CPU_ISA')!r}: {error}"
    return ""


_wanted = os.environ.get("HYDRAVIT_BUILD") or "auto"
if _wanted not in ("auto", "cpu", "cuda", "none"):
    raise ImportError(f"HYDRAVIT_BUILD={_wanted!r}: expected auto, cpu, cuda or none")
why_not = _load(_wanted)
loaded = not why_not

_missing = why_not if _wanted in ("cpu", "cuda") else ""
if _wanted == "cuda" and loaded and not build_info.get("cuda_architectures"):
    _missing = f"has no CUDA kernels: {build_info.get('cuda_why_not', 'unknown')}"
if _missing:
    raise ImportError(f"HYDRAVIT_BUILD={_wanted} demands the native backend, but it {_missing}")
