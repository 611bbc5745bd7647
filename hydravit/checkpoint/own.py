"""What one of our own models computes now, as a config and plain weights: users may have changed its modules."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hydravit.checkpoint.names import without_wrappers
from hydravit.config import HydraViTConfig
from hydravit.layers import DropPath
from hydravit.model import HydraViT

_IDLE = (nn.Identity, nn.Dropout, DropPath)  # in evaluation mode


def described(model: HydraViT) -> tuple[HydraViTConfig, dict[str, Tensor]]:
    """Return a config and weights with which a new model computes what this one does, apart from its hooks.

    The config has the epsilon of the norms, if all have the same. A parametrized weight is what it computes. Weights of
    a part that was removed, as by ``features_only``, are missing.

    Raises:
        ValueError: a module is not what the config says; the message names it.
    """
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    norms = {module.eps for module in modules.values() if isinstance(module, nn.LayerNorm)}
    config = dataclasses.replace(model.config, norm_eps=norms.pop()) if len(norms) == 1 else model.config
    problem = ""
    if len(model.blocks) != config.depth:
        problem = f"the model has {len(model.blocks)} blocks, its config {config.depth}"
    usual = HydraViT(config, backend="reference", device="meta")
    for name, expected in list(usual.named_modules())[1:]:
        problem = problem or _difference(name, modules.get(name), expected)
    if problem:
        raise ValueError(
            f"{problem}; config and weights do not tell that: keep model.state_dict() and the code that made the change"
        )
    return config, _weights(model)


def _difference(name: str, module: nn.Module | None, expected: nn.Module) -> str:
    """Say in what a module computes something else than the expected one, or ""."""
    if module is None:
        return f"{name} is missing"
    if "forward" in vars(module):
        return f"{name} has a patched forward"
    idle = isinstance(module, _IDLE) and isinstance(expected, _IDLE)
    removed = isinstance(module, nn.Identity) and any(True for _ in expected.parameters())
    if idle or removed:
        return ""
    # Ours, or the layer of torch that it derives from; the settings of both are in their words.
    same = type(module).forward in (type(expected).forward, type(expected).__mro__[1].forward)  # type: ignore[attr-defined]
    if not same or module.extra_repr() != expected.extra_repr():
        return f"{name} is {_words(module)}, its config says {_words(expected)}"
    for kind, _ in expected.named_parameters(recurse=False):
        if kind not in module._parameters and not is_parametrized(module, kind):
            return (
                f"{name}.{kind} is computed by a hook, which torch.nn.utils.prune.remove or remove_weight_norm can end"
            )
    return ""


def _words(module: nn.Module) -> str:
    return f"{type(module).__name__}({' '.join(module.extra_repr().split())})"


def _weights(model: HydraViT) -> dict[str, Tensor]:
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        for kind in module.parametrizations if is_parametrized(module) else ():
            path = f"{name}." if name else ""
            weights = {key: t for key, t in weights.items() if not key.startswith(f"{path}parametrizations.{kind}.")}
            with torch.no_grad():
                weights[f"{path}{kind}"] = getattr(module, kind).detach()
    return {without_wrappers(name): tensor for name, tensor in weights.items()}
