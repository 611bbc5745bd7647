"""The model that is compressed: which ones can be, and the same one with rearranged weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hydravit.geometry import GEOMETRIES
from hydravit.model import HydraViT


def check_source(model: HydraViT) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless one classifier tells the classes of an image from the full width."""
    if not isinstance(model, HydraViT):
        raise TypeError(f"model must be a HydraViT, not {type(model).__name__}; hydravit.fused_model makes one")
    config, reason = model.config, ""
    if not config.num_classes:
        reason = "it has no classifier, on which importance is measured"
    elif config.separate_classifiers:
        reason = "its widths have classifiers of their own; extract one width first"
    elif not config.pool:
        reason = "it does not pool, so its logits are not those of an image (pool='')"
    if reason:
        raise ValueError(f"the model cannot be compressed: {reason}")


def working_copy(model: HydraViT) -> HydraViT:
    """Return a copy in evaluation mode whose gradients are precise enough to be measured."""
    model = copy.deepcopy(model).eval()
    return model if model.pos_embed.dtype == torch.float64 else model.float()


def rearranged(
    model: HydraViT, weights: Mapping[str, Tensor], geometry: str, cuts: tuple[tuple[int, str, int], ...] = ()
) -> HydraViT:
    """Return a model like this one, with these weights and every width of this nesting method."""
    full = GEOMETRIES[model.config.geometry](model.config, model.config.widths)
    config = dataclasses.replace(
        model.config, geometry=geometry, norm_eps=full.eps, width_steps=None, narrowest=1, cuts=cuts
    )
    parameter = model.pos_embed
    result = HydraViT(config, backend=model.requested_backend, device=parameter.device, dtype=parameter.dtype)
    result.load_state_dict(weights)
    return result.train(model.training)
