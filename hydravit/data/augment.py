"""Light augmentation of whole batches with torch alone. Heavier recipes (RandAugment, mixup, ...) are timm's job."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """Ranges of a random affine map, drawn uniformly per image.

    Args:
        zoom: smallest and largest side of the part that is shown, as a fraction of the image's; below 1 it is a crop.
        shift: largest shift along each axis, as a fraction of the side, on top of the place of the crop in the image.
        rotate: largest rotation in degrees.
        flip: probability of a left-right flip.
    """

    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    rotate: float = 0.0
    flip: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """Map float images ``(B, C, H, W)`` to the same shape; pixels outside an image repeat its border.

        It draws five numbers per image from torch's global CPU generator.
        """
        draws = torch.rand(5, len(images), dtype=torch.float32, device="cpu").to(images)
        zoom = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * draws[0]
        angle = math.radians(self.rotate) * (2 * draws[1] - 1)
        # affine_grid's coordinates run from -1 to 1: a side has the length 2, and a fraction f of it 2f.
        room = (1 - zoom).clamp_min(0) + 2 * self.shift
        shift = room * (2 * draws[2:4] - 1)
        mirror = 1 - 2 * (draws[4] < self.flip).to(images)
        aspect = images.shape[-2] / images.shape[-1]
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        rows = (
            torch.stack((mirror * cos, -sin * aspect, shift[0]), 1),
            torch.stack((mirror * sin / aspect, cos, shift[1]), 1),
        )
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


# Ranges per kind of image. Scans of 8x8 pixels must not be mirrored, and blur easily: ranges about twice as large cost
# the width of one head 12 points of accuracy in 60 epochs. Small photos lose too much in a strong crop.
SCANS = Affine(zoom=(0.95, 1.05), shift=0.04, rotate=6.0)
SMALL_PHOTOS = Affine(zoom=(0.85, 1.0), flip=0.5)
PHOTOS = Affine(zoom=(0.5, 1.0), flip=0.5)
