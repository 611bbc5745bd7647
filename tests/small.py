"""A small model whose every parameter matters, for the tests that compare weights."""

import torch
from budget import Draws

from hydravit import HydraViT, HydraViTConfig
from hydravit.config import resolve_config

SMALL = HydraViTConfig(image_size=32, patch_size=8, depth=2, max_heads=4, head_dim=16, num_classes=10)


def shake(model):
    """No parameter is left at zero or one, so that a wrong place shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(config=SMALL, **overrides):
    return shake(HydraViT(resolve_config(config, **overrides), backend="reference").eval())


def images(config, batch=2):
    return torch.randn(batch, config.in_channels, *config.image_size)


def poison(model, geometries):
    """NaN in every element of every parameter that none of the geometries reads."""
    for name, parameter in model.named_parameters():
        read = torch.zeros(parameter.shape, dtype=torch.bool)
        for geometry in geometries:
            axes = geometry.parameter_slices(model.config)[name]
            if all(axes):  # a skipped branch reads nothing
                lists = [torch.cat([torch.arange(start, start + length) for start, length in axis]) for axis in axes]
                lists += [torch.arange(size) for size in parameter.shape[len(axes) :]]
                read[torch.meshgrid(*lists, indexing="ij")] = True
        with torch.no_grad():
            parameter[~read] = float("nan")
    return model


def draws_of_logits(model, x, dtype, device="cpu", **options):
    """For the error budget: the reference's logits for the weights of ``model``, eager's in ``dtype`` on the device."""

    @torch.no_grad()
    def compute(near):
        images, *weights = near([x, *model.state_dict().values()])

        def logits(where, precision):
            reference = HydraViT(model.config, backend="reference").eval()
            reference.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
            return [reference.to(where, precision)(images.to(where, precision), **options)]

        return logits(device, dtype), logits("cpu", torch.float64)

    return Draws(compute, dtype)
