"""What ``hydravit`` offers by its own name: ``hydravit/__init__.py`` imports this file when it is used first."""

from hydravit.checkpoint import config_of as config_of
from hydravit.config import CONFIGS as CONFIGS
from hydravit.config import HydraViTConfig as HydraViTConfig
from hydravit.factory import fused_model as fused_model
from hydravit.model import HydraViT as HydraViT
from hydravit_kernels import Subnetwork as Subnetwork
