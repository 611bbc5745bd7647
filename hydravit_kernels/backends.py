"""The backends: which implementations of the blocks exist, and which of them a module uses.

``"auto"`` takes the first of ``AUTOMATIC`` that can run on the device and dtype, and warns once if that is not the very
first. A backend that is named runs, or raises with the reason. The environment variable ``HYDRAVIT_BACKEND`` replaces
``"auto"``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch

from hydravit_kernels import _native, _triton


def _native_why_not(device: torch.device, dtype: torch.dtype) -> str:
    if not _native.loaded:
        return _native.why_not
    if device.type != "cpu":
        return f"has no kernels for device {device.type!r} yet"
    if dtype != torch.float32:
        return f"computes in torch.float32 on the CPU, not in {dtype}"
    return ""


def _reference_why_not(device: torch.device, dtype: torch.dtype) -> str:
    return "" if dtype.is_floating_point else f"needs a floating-point dtype, not {dtype}"


# Per backend a function that returns why it cannot run on a device and dtype, or "".
BACKENDS: dict[str, Callable[[torch.device, torch.dtype], str]] = {
    "native": _native_why_not,
    "reference": _reference_why_not,
    "triton": _triton.why_not,
}
# The choices of "auto", the best first. A backend joins when committed results show it correct and faster.
AUTOMATIC = ("native", "reference")

_fallbacks_told: set[str] = set()


def check_backend(backend: str) -> str:
    """Return the name of a backend, or raise ``ValueError`` if there is none of that name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    return backend


def select(backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Return the backend that will run on this device and dtype.

    Raises ``ValueError`` for an unknown name, and ``RuntimeError`` with the reason for a named one that cannot run.
    """
    device = torch.device(device)
    if check_backend(backend) == "auto":
        backend = check_backend(os.environ.get("HYDRAVIT_BACKEND") or "auto")
    if backend != "auto":
        reason = BACKENDS[backend](device, dtype)
        if reason:
            others = [name for name in AUTOMATIC if not BACKENDS[name](device, dtype)]
            way_out = f'; backend={others[0]!r} or "auto" can' if others else ""
            raise RuntimeError(f"backend {backend!r}: {reason}{way_out}")
        return backend
    reasons: list[str] = []
    for name in AUTOMATIC:
        reason = BACKENDS[name](device, dtype)
        if not reason:
            if device.type != "meta":  # nothing is ever computed there
                _tell_fallback(name, reasons)
            return name
        reasons.append(f"{name} {reason}")
    raise RuntimeError(f"no backend runs on {device} in {dtype}: {'; '.join(reasons)}")


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Every backend that can run there, in the order in which "auto" prefers them."""
    return [name for name, why_not in BACKENDS.items() if not why_not(torch.device(device), dtype)]


def report(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Map the name of each backend to ``"available"``, or to the reason why it cannot run."""
    return {name: why_not(torch.device(device), dtype) or "available" for name, why_not in BACKENDS.items()}


def _tell_fallback(name: str, reasons: list[str]) -> None:
    message = f"hydravit: using backend {name!r}, because {'; '.join(reasons)}"
    if reasons and message not in _fallbacks_told:
        _fallbacks_told.add(message)
        warnings.warn(message, stacklevel=3)
