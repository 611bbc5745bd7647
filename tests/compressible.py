"""Plain ViTs for the tests of compression: one that is trained on the digits in seconds, and one of every kind."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hydravit import HydraViT, HydraViTConfig
from hydravit.data import load_dataset

VIT = HydraViTConfig(
    image_size=8, patch_size=4, in_channels=1, num_classes=10, depth=3, max_heads=8, head_dim=4, mlp_ratio=2.0
)

VARIANTS = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "distilled": {"distilled": True},
    "layer scale, registers": {"layer_scale": 0.3, "register_tokens": 2},
    "average pooling, no class token": {"pool": "avg", "class_token": False},
    "maximum, positions of patches only": {"pool": "max", "no_embed_class": True},
    "norm before pooling": {"pool": "avg", "fc_norm": False},
    "norm before the blocks, quick GELU": {"pre_norm": True, "act_layer": "quick_gelu"},
    "odd sizes": {"in_channels": 1, "image_size": (15, 35), "patch_size": 5, "mlp_ratio": 2.625},
    "one head": {"max_heads": 1},
    "of another geometry": {"geometry": "dynabert"},
}


class Digits(NamedTuple):
    """Images ``(n, 1, 8, 8)`` and labels ``(n,)`` of the training part and of the test part."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def batches(self):
        return list(zip(self.images.split(256), self.labels.split(256), strict=True))

    def top1(self, model, heads=None):
        """Accuracy in percent on the test part, of which one image is 0.17."""
        with torch.inference_mode():
            return 100 * float((model(self.test_images, heads=heads).argmax(1) == self.test_labels).float().mean())


def load_digits():
    train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
    return Digits(train.images, train.labels, test.images, test.labels)


def train(digits, seed, epochs=25, batch=128):
    """Train ``VIT`` at its full width, in seconds, to about 97 % on the test part."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on so small a model, waiting for a second one costs more than the arithmetic
    torch.manual_seed(seed)
    model = HydraViT(VIT)
    steps = epochs * (len(digits.images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.images)).split(batch)[: steps // epochs]:
            optimizer.zero_grad()
            F.cross_entropy(model(digits.images[chosen]), digits.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


def random_batches(config, sizes=(5, 4)):
    return [(torch.randn(size, *config.image_shape), torch.randint(config.num_classes, (size,))) for size in sizes]
