"""A small model in training with one optimizer: ``SliceAdamW``, or torch's to compare it with."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from small import shake

import hydravit_kernels as kernels
from hydravit import HydraViT, HydraViTConfig
from hydravit.geometry import scala, skd
from hydravit.training import SliceAdamW, SliceGradients

BACKENDS = kernels.available_backends()

# Every parameter has whole vectors only, because torch's kernels round the elements beyond these in another way.
CONFIG = HydraViTConfig(
    image_size=8, patch_size=4, in_channels=2, num_classes=32, depth=2, max_heads=4, head_dim=8, mlp_ratio=2.0
)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def ema_decay(count):
    return min(0.9, (1 + count) / (10 + count))


def make_model(backend="reference", device="cpu", **changes):
    torch.manual_seed(0)
    return shake(HydraViT(dataclasses.replace(CONFIG, **changes), backend=backend, device=device))


def batch(step, count=4):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 2, 8, 8, generator=generator)
    return images, torch.randint(32, (count,), generator=generator)


def two_groups(model):
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def active(groups, model, average, **options):
    return SliceAdamW(groups, model, average=average, ema_decay=ema_decay, **options)


def dense(groups, model, average, **options):
    """It leaves the average to the test."""
    return torch.optim.AdamW(groups, fused=True, **options)


class Run:
    """A model in training with one optimizer, its gradients in place."""

    def __init__(
        self, backend, optimizer=active, averaged=True, groups=two_groups, options=OPTIONS, device="cpu", **changes
    ):
        self.model = make_model(backend, device, **changes)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if averaged else None
        self.gradients = SliceGradients(self.model)
        self.optimizer = optimizer(groups(self.model), self.model, average=self.average, **options)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.count = 0

    def step(self, *widths, clip=1.0):
        """One step of the mean loss at these widths, its learning rate and momentum its own; returns the logits."""
        for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = lr / (1 + 0.3 * self.count)
            group["betas"] = (0.9 - 0.01 * (self.count % 3), 0.99)
        self.gradients.zero_()
        images, labels = (t.to(self.model.pos_embed.device) for t in batch(self.count))
        results = []
        for heads in widths:
            results.append(self.model(images, heads=heads))
            F.cross_entropy(results[-1], labels).backward()
        if clip:
            self.gradients.clip_norm_(clip)
        self.optimizer.step()
        self.count += 1
        return torch.stack([logits.detach() for logits in results])


def assert_same(model, other):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


WIDTHS = [[2], [1], [1], [4], [1], [3], [2], [1], [4], [1], [1]]
CASES = {
    "widths": ({}, WIDTHS),
    "widest never": ({}, [[2], [1], [3], [1], [1], [2]]),
    "per image": ({}, [[torch.tensor(ks)] for ks in ([1, 3, 1, 1], [2, 2, 1, 2], [1, 1, 4, 4], [1, 1, 1, 1])]),
    "accumulated": ({}, [[1, 3], [2], [1, 1], [4, 1], [2, 1]]),
    "separate classifiers": ({"separate_classifiers": (1, 2, 4)}, [[2], [1], [4], [1], [2]]),
    "separate, per image": (
        {"separate_classifiers": (1, 2, 4)}, [[torch.tensor(ks)] for ks in ([1, 2, 2, 1], [4, 1, 2, 2])],
    ),
    "layer scale, registers": ({"layer_scale": 0.5, "register_tokens": 2, "pool": "avg"}, [[3], [4], [1], [2], [1]]),
    "prefix and suffix": ({}, [[scala(CONFIG, w, suffix=s)] for w, s in ((8, 1), (8, 0), (16, 1), (8, 1))]),
    "per layer": ({}, [[skd(CONFIG, layers)] for layers in ([(4, 0), (0, 24)], [(8, 64), (2, 8)], [(4, 0), (0, 24)])]),
    "sortednet": ({"geometry": "sortednet"}, [[1], [3], [1], [2]]),
    "dynabert": ({"geometry": "dynabert"}, [[2], [4], [1], [1]]),
}  # fmt: skip
