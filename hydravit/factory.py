"""``fused_model``: from a name or a checkpoint to a model."""

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
    """A HydraViT of which the first ``heads`` heads are active, in training mode as any new ``nn.Module``.

    Example:
        >>> model = hydravit.fused_model(heads=6).eval()  # the "base" model of 12 heads, 6 of them active
        >>> logits = model(images)                        # (B, 3, 224, 224) -> (B, 1000)
        >>> logits = model(images, heads=3)               # this call only

    Args:
        heads: active heads; None for all (of a checkpoint: the most it was trained for).
        config: ``"tiny"``, ``"small"``, ``"base"`` or ``"large"``, which names the widest subnetwork, or a config.
            None: the checkpoint's, or ``"base"`` without a checkpoint.
        checkpoint: a file, or what ``hydravit.checkpoint.read_checkpoint`` returned; None: the weights are random. A
            file without a config, such as a plain ViT's, goes by ``config``, or by the shapes of its weights.
        backend: ``"auto"`` or a name of ``hydravit_kernels.available_backends()``.
        device, dtype: of the parameters; None: torch's defaults.
        allow_untrained: whether widths may be used that the checkpoint says were not trained.
        overrides: fields of the config, such as ``num_classes`` or ``image_size``; they apply on top of a checkpoint's,
            and its weights are adapted as ``hydravit.checkpoint.load_weights`` says.
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
