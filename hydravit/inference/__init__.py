"""Inference from packed weights: inside ordinary calls of a model, and by an engine that makes all beforehand."""

from hydravit.inference.engine import DTYPES, Engine, make_network, with_e4m3_weights
from hydravit.inference.packed import PackedInference

__all__ = ["DTYPES", "Engine", "PackedInference", "make_network", "with_e4m3_weights"]
