"""Every width of a Vision Transformer from one set of weights, at the speed each width deserves."""

from hydravit.checkpoint import config_of
from hydravit.config import CONFIGS, HydraViTConfig
from hydravit.factory import fused_model
from hydravit.model import HydraViT
from hydravit_kernels import Subnetwork

__version__ = "0.1.0"
__all__ = ["CONFIGS", "Subnetwork", "HydraViT", "HydraViTConfig", "config_of", "fused_model"]
