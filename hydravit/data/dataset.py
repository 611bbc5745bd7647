"""The base class of data sets, the one of data sets in memory, and how their items and classes are divided."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hydravit.data.augment import Affine
from hydravit.extras import extra
from hydravit.preprocessing import Preprocessing


class Dataset(torch.utils.data.Dataset):
    """Items ``(image, label)``: float32 ``(in_channels, *image_size)``, normalised by ``preprocessing``, and an int.

    Attributes:
        class_names: one name per label.
        in_channels, image_size: every image has them; ``image_size`` is (height, width).
        preprocessing: turns a Pillow image into what the items hold (without augmentation).
        labels: int64 tensor ``(len,)``.
        skipped: files left out because they could not be read, as ``(path, reason)``.
        origin: which part of its source it is, for people.

    Augmentation draws only from torch's global CPU generator, once per batch (``__getitems__``). With the same seed, or
    with ``torch.get_rng_state()`` saved and restored, the images are the same again.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        augmentation: Affine | None = None,
    ):
        self.class_names = tuple(class_names)
        self.labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.preprocessing = preprocessing
        self.in_channels = len(preprocessing.mean)
        assert isinstance(preprocessing.image_size, tuple)  # its `__post_init__` sees to it
        self.image_size = preprocessing.image_size
        self.augmentation = augmentation
        self.skipped: tuple[tuple[str, str], ...] = ()
        self.origin = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return the items of a whole batch, augmented at once. A ``DataLoader`` asks for them."""
        images = torch.stack([self.image(index) for index in indices])
        if self.augmentation is not None:
            images = self.augmentation(images)
        return [(image, int(self.labels[index])) for image, index in zip(images, indices, strict=True)]

    def image(self, index: int) -> Tensor:
        """Return the image ``(C, H, W)`` without augmentation."""
        raise NotImplementedError


class ArrayDataset(Dataset):
    """Grey images ``(n, height, width)`` uint8 held in memory, preprocessed once."""

    def __init__(self, arrays: np.ndarray, class_names, labels, preprocessing, augmentation=None):
        super().__init__(class_names, labels, preprocessing, augmentation)
        if self.in_channels == 1 and preprocessing.crop == 1 and arrays.shape[1:] == self.image_size:
            # The images need no resizing, cropping or converting, so the arithmetic takes all at once.
            pixels = torch.from_numpy(arrays.copy()).float().div_(255)
            self.images = pixels.sub_(preprocessing.mean[0]).div_(preprocessing.std[0]).unsqueeze(1)
            return
        with extra("images", "resizing images"):
            from PIL import Image

        self.images = torch.empty(len(arrays), self.in_channels, *self.image_size, dtype=torch.float32, device="cpu")
        for i, array in enumerate(arrays):
            self.images[i] = preprocessing(Image.fromarray(array))

    def image(self, index: int) -> Tensor:
        return self.images[index]


# What ``held_out`` makes of a source that has no parts of its own, for people.
SHARES = {"train": "two thirds of every class", "test": "a third of every class", "all": "all of it"}


def held_out(labels: Sequence[int], seed: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Choose a third of every class, ``(n,)`` bool; the same for the same arguments on every machine.

    Args:
        names: of the items. What is chosen then follows from each name, so that items which come or go later change
            the place of hardly any other.
    """
    of_item = np.asarray(labels)
    chosen = np.zeros(len(of_item), dtype=bool)
    random = np.random.RandomState(seed)  # unlike default_rng's, its numbers never change with numpy's version
    for label in np.unique(of_item):
        members = np.flatnonzero(of_item == label)
        if names is None:
            order = random.permutation(members)
        else:
            order = np.array(
                sorted(members.tolist(), key=lambda i: hashlib.sha256(f"{seed} {names[i]}".encode()).digest())
            )
        chosen[order[: round(len(members) / 3)]] = True
    return chosen


def folds(labels: Sequence[int], count: int, seed: int) -> np.ndarray:
    """Return to which of ``count`` folds every item belongs, ``(n,)`` int; each class is spread evenly over them.

    The result is the same for the same labels and seed on every machine.
    """
    of_item = np.asarray(labels)
    fold = np.empty(len(of_item), dtype=np.int64)
    random = np.random.RandomState(seed)  # as in held_out
    for label in np.unique(of_item):
        members = np.flatnonzero(of_item == label)
        fold[random.permutation(members)] = np.arange(len(members)) % count
    return fold


def agreed_classes(found: Sequence[str], wanted: Sequence[str] | None, source: str) -> dict[str, int]:
    """Return the label of every class: its index in ``wanted`` (a model's classes) if given, else in ``found``.

    Raises ``ValueError`` for a class in ``found`` that ``wanted`` does not have.
    """
    names = found if wanted is None else wanted
    missing = [name for name in found if name not in names]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of its {len(found)} classes are unknown to the model, e.g. {missing[0]!r}; "
            f"the model has {len(names)}: {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
        )
    return {name: label for label, name in enumerate(names)}
