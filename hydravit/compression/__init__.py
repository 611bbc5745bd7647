"""Narrower subnetworks of a trained plain ViT without training: rearranged weights, the most important ones first.

The full width computes the same as before.

Example:
    >>> model = hydravit.fused_model(checkpoint="deit_small.pth")
    >>> images = CalibrationImages(load_dataset("photos/", split="train"), 1024)
    >>> narrow = wpac(model, images)              # the first channels of every head, and the first hidden channels
    >>> narrow = plan(narrow, images)             # a width for every step of a list of cuts, layer by layer
    >>> narrow = order_heads(model, images)       # the first heads, and the first channels of everything
    >>> logits = narrow(x, heads=3)
"""

from hydravit.compression.calibration import CalibrationImages
from hydravit.compression.ordering import order_heads
from hydravit.compression.planning import plan
from hydravit.compression.wpac import wpac

__all__ = ["CalibrationImages", "order_heads", "plan", "wpac"]
