"""``fused_model`` makes a model from the name of a config or from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor, nn

from hydravit.checkpoint import Checkpoint, checkpoint_of, load_weights, model_config, read_checkpoint
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.model import HydraViT


def fused_model(
    heads: int | None = None,
    *,
    config: str | HydraViTConfig | None = None,
    checkpoint: str | os.PathLike | IO[bytes] | Checkpoint | Mapping[str, Tensor] | nn.Module | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_untrained: bool = False,
    strict: bool = True,
    **overrides,
) -> HydraViT:
    """Make a HydraViT with ``heads`` active heads, in training mode like any new ``nn.Module``.

    Example:
        >>> model = hydravit.fused_model(heads=6).eval()  # the "base" model of 12 heads, 6 of them active
        >>> logits = model(images)                        # (B, 3, 224, 224) -> (B, 1000)
        >>> logits = model(images, heads=3)               # 3 heads in this call only

    Args:
        heads: active heads; None: all, or the most that the checkpoint was trained with.
        config: ``"tiny"``, ``"small"``, ``"base"`` or ``"large"``, which names the widest subnetwork, or a config.
            None: the checkpoint's, or ``"base"`` without a checkpoint.
        checkpoint: a file, what ``hydravit.checkpoint.read_checkpoint`` returned, a state dict, or a model of timm;
            None: the weights are random. If it has no config, as a plain ViT's file, ``config`` counts, or else the
            shapes of the weights; what they do not tell is assumed with a warning, or asked for by an error.
        backend: ``"auto"`` or a name of ``hydravit_kernels.available_backends()``.
        device, dtype: of the parameters; None: torch's defaults.
        allow_untrained: whether calls may name widths that, as the checkpoint says, were not trained.
        strict: whether to raise if names of the checkpoint and of the model differ, as in ``load_weights``.
        overrides: fields, such as ``num_classes`` or ``image_size``, that replace those of the config. The checkpoint's
            weights are then adapted, as ``hydravit.checkpoint.load_weights`` says.
    Raises:
        ValueError: a wrong name, field or width; a damaged or mismatching checkpoint; a ``config`` other than the
            checkpoint's.
        OSError: the checkpoint cannot be read.
        RuntimeError: the backend cannot run here; the message has the reason.
    """
    if checkpoint is None:
        config, trained = resolve_config("base" if config is None else config, **overrides), None
    else:
        if isinstance(checkpoint, nn.Module):
            checkpoint = checkpoint_of(checkpoint)
        elif isinstance(checkpoint, Mapping):
            checkpoint = Checkpoint(dict(checkpoint))
        elif not isinstance(checkpoint, Checkpoint):
            checkpoint = read_checkpoint(checkpoint)
        config, trained = model_config(checkpoint, config, strict=strict, **overrides), checkpoint.trained_heads
    model = HydraViT(config, trained_heads=trained, backend=backend, device=device, dtype=dtype)
    if checkpoint is not None:
        load_weights(model, checkpoint, strict=strict)
    model.allow_untrained = allow_untrained
    if heads is not None:
        model.heads = heads
    return model
