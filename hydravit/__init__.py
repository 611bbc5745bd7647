"""Every width of a Vision Transformer from one set of weights, at the speed each width deserves."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydravit.api import CONFIGS, HydraViT, HydraViTConfig, Subnetwork, config_of, fused_model

__version__ = "0.1.0"
__all__ = ["CONFIGS", "Subnetwork", "HydraViT", "HydraViTConfig", "config_of", "fused_model"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is used first: torch loads OpenMP, and commands settle before how threads wait."""
    if name in __all__:
        return getattr(import_module("hydravit.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
