"""What every data set offers, whatever its source."""

from __future__ import annotations

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
        in_channels, image_size: of every image; ``image_size`` is (height, width).
        preprocessing: turns a Pillow image into what the items hold (without augmentation).
        labels: int64 tensor ``(len,)``.
        skipped: files left out because they could not be read, as ``(path, reason)``.

    Augmentation draws from torch's global CPU generator and nothing else, once per batch (``__getitems__``): whoever
    seeds it, or saves and restores ``torch.get_rng_state()``, gets the same images again.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        augmentation: Affine | None = None,
    ):
        self.class_names = tuple(class_names)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.preprocessing = preprocessing
        self.in_channels = len(preprocessing.mean)
        self.image_size = preprocessing.image_size
        self.augmentation = augmentation
        self.skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The items of a whole batch, augmented at once: what a ``DataLoader`` asks for."""
        images = torch.stack([self.image(index) for index in indices])
        if self.augmentation is not None:
            images = self.augmentation(images)
        return [(image, int(self.labels[index])) for image, index in zip(images, indices, strict=True)]

    def image(self, index: int) -> Tensor:
        """The image ``(C, H, W)`` without augmentation."""
        raise NotImplementedError


class ArrayDataset(Dataset):
    """Grey images ``(n, height, width)`` uint8 held in memory, preprocessed once."""

    def __init__(self, arrays: np.ndarray, class_names, labels, preprocessing, augmentation=None):
        super().__init__(class_names, labels, preprocessing, augmentation)
        if self.in_channels == 1 and preprocessing.crop == 1 and arrays.shape[1:] == self.image_size:
            # Nothing to resize or convert (and a crop of 1 keeps all): the same arithmetic on all images at once.
            pixels = torch.from_numpy(arrays.copy()).float().div_(255)
            self.images = pixels.sub_(preprocessing.mean[0]).div_(preprocessing.std[0]).unsqueeze(1)
            return
        with extra("images", "resizing images"):
            from PIL import Image

        self.images = torch.empty(len(arrays), self.in_channels, *self.image_size)
        for i, array in enumerate(arrays):
            self.images[i] = preprocessing(Image.fromarray(array))

    def image(self, index: int) -> Tensor:
        return self.images[index]


def held_out(labels: Sequence[int], seed: int) -> np.ndarray:
    """A third of every class, ``(n,)`` bool; the same for the same labels and seed on every machine."""
    labels = np.asarray(labels)
    chosen = np.zeros(len(labels), dtype=bool)
    random = np.random.RandomState(seed)  # unlike default_rng its stream is frozen across numpy versions
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[random.permutation(members)[: round(len(members) / 3)]] = True
    return chosen


def folds(labels: Sequence[int], count: int, seed: int) -> np.ndarray:
    """To which of ``count`` folds every item belongs, ``(n,)`` int; each class is spread evenly over them.

    The same for the same labels and seed on every machine.
    """
    labels = np.asarray(labels)
    fold = np.empty(len(labels), dtype=np.int64)
    random = np.random.RandomState(seed)  # as in held_out
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold[random.permutation(members)] = np.arange(len(members)) % count
    return fold


def agreed_classes(found: Sequence[str], wanted: Sequence[str] | None, source: str) -> dict[str, int]:
    """Label of every class: the place in ``wanted`` (a model's classes) if given, else in ``found``.

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
