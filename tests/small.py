"""A small model whose every parameter matters, for the tests that compare weights."""

import warnings

import torch
from budget import Draws

from hydravit import HydraViT, HydraViTConfig
from hydravit.config import resolve_config
from hydravit.geometry import parameter_slices

SMALL = HydraViTConfig(image_size=32, patch_size=8, depth=2, max_heads=4, head_dim=16, num_classes=10)

# Heads of 64 channels, as the CUDA kernels need them; 17 tokens.
SMALL_CUDA = HydraViTConfig(image_size=16, patch_size=4, depth=2, max_heads=3, num_classes=10, mlp_ratio=1.0)


def shake(model):
    """No parameter is left at zero or one, so that a wrong place shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(config=SMALL, backend="reference", **overrides):
    return shake(HydraViT(resolve_config(config, **overrides), backend=backend).eval())


def images(config, batch=2):
    return torch.randn(batch, config.in_channels, *config.image_size)


def poison(model, subnetworks):
    """NaN in every element of every parameter that none of the subnetworks reads."""
    for name, parameter in model.named_parameters():
        read = torch.zeros(parameter.shape, dtype=torch.bool)
        for subnetwork in subnetworks:
            axes = parameter_slices(model.config, subnetwork)[name]
            if all(axes):  # a skipped branch reads nothing
                lists = [torch.cat([torch.arange(start, start + length) for start, length in axis]) for axis in axes]
                lists += [torch.arange(size) for size in parameter.shape[len(axes) :]]
                read[torch.meshgrid(*lists, indexing="ij")] = True
        with torch.no_grad():
            parameter[~read] = float("nan")
    return model


def quietly(function, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def check_gradients(model, logits, expected):
    """The logits and those expected bring nearly the same gradients."""
    results = []
    for value in (logits, expected):
        model.zero_grad()
        value.square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
