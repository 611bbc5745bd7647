"""``fused_model`` makes a model from the name of a config or from a checkpoint."""

from __future__ import annotations

import os

import torch

from hydravit.checkpoint import Checkpoint, load_weights, model_config, read_checkpoint
from hydravit.config import HydraViTConfig, resolve_config
from hydravit.model import HydraViT


def fused_model(
    heads: int | None = None,
    *,
    config: str | HydraViTConfig | None = None,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_untrained: bool = False,
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
        checkpoint: a file, or what ``hydravit.checkpoint.read_checkpoint`` returned; None: the weights are random. If
            it has no config, as a plain ViT's, ``config`` counts, or else the shapes of the weights.
        backend: ``"auto"`` or a name of ``hydravit_kernels.available_backends()``.
        device, dtype: of the parameters; None: torch's defaults.
        allow_untrained: whether calls may name widths that, as the checkpoint says, were not trained.
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
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = read_checkpoint(checkpoint)
        config, trained = model_config(checkpoint, config, **overrides), checkpoint.trained_heads
    model = HydraViT(config, trained_heads=trained, backend=backend, device=device, dtype=dtype)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    model.allow_untrained = allow_untrained
    if heads is not None:
        model.heads = heads
    return model
