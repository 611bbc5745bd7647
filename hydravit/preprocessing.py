"""The transform from an image file to the model's input. Checkpoints keep it, so that every user applies the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hydravit.config import HydraViTConfig
from hydravit.extras import extra
from hydravit.integers import plain_int

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, scale to 0..1, normalise: the evaluation transform of timm and DeiT (arXiv 2012.12877).

    Args:
        image_size: pixels of a side, or (height, width), of the result.
        mean, std: per channel, of pixels in 0..1. Their number is the number of channels: 1 for grey, 3 for colour.
        crop: part of the resized image's side that the crop keeps, in (0, 1]. None: 0.9 in colour, else 1.
        interpolation: one of ``INTERPOLATIONS``.
    """

    image_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float | None = None
    interpolation: str = "bicubic"

    def __post_init__(self):
        size = plain_int(self.image_size)
        sides = (size, size) if isinstance(size, int) else map(plain_int, size)
        object.__setattr__(self, "image_size", tuple(sides))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(isinstance(v, (int, float)) for v in values):
                raise ValueError(f"{name} must be numbers, one per channel, not {values!r}")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if self.crop is None:
            object.__setattr__(self, "crop", 0.9 if len(self.mean) == 3 else 1.0)
        if len(self.image_size) != 2 or any(type(s) is not int or s < 1 for s in self.image_size):
            raise ValueError(f"image_size must be one or two positive integers, not {size!r}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one value per channel, not {self.mean} and {self.std}")
        if not all(v > 0 for v in self.std):
            raise ValueError(f"std must be positive, not {self.std}")
        if not isinstance(self.crop, (int, float)) or not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1], not {self.crop!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {self.interpolation!r}")

    @classmethod
    def for_model(cls, config: HydraViTConfig, **overrides) -> Preprocessing:
        """Return the usual one of a model: ImageNet's mean and deviation for 3 channels, 0.5 for any other number."""
        if config.in_channels != 3:
            half = (0.5,) * config.in_channels
            overrides = {"mean": half, "std": half, **overrides}
        return cls.from_dict({"image_size": config.image_size, **overrides})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        """The inverse of ``to_dict``, also after a trip through JSON. Raises ``ValueError`` for an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown preprocessing field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    def __call__(self, image: Image | Tensor) -> Tensor:
        """Turn a Pillow image of any mode, or a uint8 tensor ``(C, height, width)``, to float32 ``(C, *image_size)``.

        Raises:
            TypeError: the image is neither of the two.
            ValueError: a tensor has another number of channels; ``convert`` cannot convert the Pillow image.
        """
        bands = [self._resize_and_crop(band) for band in self._bands(image)]
        pixels = torch.from_numpy(np.concatenate(bands, axis=2)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1) for values in (self.mean, self.std)
        )
        return pixels.sub_(mean).div_(std)

    def convert(self, image: Image) -> Image:
        """Turn a Pillow image upright, as its EXIF orientation says, and to 8 bits of grey or colour.

        Raises:
            ValueError: no 8 bits follow from its mode, or the model has neither 1 nor 3 channels.
        """
        with extra("images", "converting images"):
            from PIL import Image, ImageOps

        channels = len(self.mean)
        if channels not in (1, 3):
            raise ValueError(f"a Pillow image gives 1 or 3 channels, the model has {channels}: pass a uint8 tensor")
        if _is_turned(image):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow clips 16 bits to 8 where it should scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"image has mode {image.mode!r}, whose range is unknown: convert it to 8 bits first")
        mode = "L" if channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)

    def _bands(self, image: Image | Tensor) -> list[Image]:
        """Return Pillow images that together have all channels: a single one, or one per channel of a tensor."""
        with extra("images", "resizing images"):
            from PIL import Image

        channels = len(self.mean)
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != channels or 0 in image.shape:
                raise ValueError(
                    f"image must be a uint8 tensor ({channels}, height, width), not {image.dtype} {tuple(image.shape)}"
                )
            return [Image.fromarray(band) for band in image.cpu().numpy()]
        if not isinstance(image, Image.Image):
            raise TypeError(f"image must be a Pillow image or a uint8 tensor, not {type(image).__name__}")
        return [self.convert(image)]

    def _resize_and_crop(self, image: Image) -> np.ndarray:
        """Return uint8 ``(*image_size, channels)``; sizes are rounded down, offsets to nearest, as in torchvision."""
        from PIL.Image import Resampling

        assert isinstance(self.image_size, tuple) and self.crop is not None  # `__post_init__` sees to both
        height, width = self.image_size
        least_height, least_width = int(height / self.crop), int(width / self.crop)
        # The scale is a ratio of integers, so that the side that decides about it becomes exact.
        if least_height * image.width >= least_width * image.height:
            size = (max(least_height * image.width // image.height, width), least_height)
        else:
            size = (least_width, max(least_width * image.height // image.width, height))
        if size != image.size:
            image = image.resize(size, Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        pixels = np.array(image.crop((left, top, left + width, top + height)))
        return pixels.reshape(height, width, -1)


def _is_turned(image: Image) -> bool:
    """Whether a camera held another way made the image, and said so."""
    try:
        return image.getexif().get(_ORIENTATION, 1) != 1
    except SyntaxError:  # a damaged EXIF block; the pixels may be whole
        return False
