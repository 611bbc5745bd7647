"""Checkpoints: read and save files, load their weights into a model, extract one width as a plain ViT.

Example:
    >>> checkpoint = read_checkpoint("deit_tiny.pth")       # ours, timm's, DeiT's or the authors'
    >>> model = HydraViT(model_config(checkpoint))          # ``hydravit.fused_model(checkpoint=...)`` does all three
    >>> load_weights(model, checkpoint)                     # adapts them where that has one sensible meaning
    >>> config_of(timm_model)                               # or the error that says what is not computed here
    >>> save_checkpoint("model.safetensors", model, trained_heads=(3,))
    >>> state_dict = extract(model, 3)                      # width 3 under timm's names
"""

from hydravit.checkpoint.adaptation import load_weights
from hydravit.checkpoint.configs import infer_config, model_config
from hydravit.checkpoint.extraction import extract, extract_config, take
from hydravit.checkpoint.files import Checkpoint, check_suffix, model_metadata, read_checkpoint, save_checkpoint
from hydravit.checkpoint.foreign import checkpoint_of, config_of

__all__ = [
    "Checkpoint",
    "check_suffix",
    "checkpoint_of",
    "config_of",
    "extract",
    "extract_config",
    "infer_config",
    "load_weights",
    "model_config",
    "model_metadata",
    "read_checkpoint",
    "save_checkpoint",
    "take",
]
