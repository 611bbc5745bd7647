"""Images to train on and to evaluate with: ``load_dataset``.

Pillow and scikit-learn are imported only when a source needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydravit.data import augment as augmentations
from hydravit.data.arrays import FASHION_MNIST_CLASSES, FASHION_MNIST_FOLDER, digits, fashion_mnist
from hydravit.data.dataset import SHARES, ArrayDataset, Dataset, agreed_classes
from hydravit.preprocessing import Preprocessing

__all__ = ["SPLITS", "Dataset", "kind_of", "load_dataset", "usual_preprocessing"]

SPLITS = ("train", "test", "all")

# Per kind of source, sizes and statistics of its own images; those of photos are ImageNet's.
_USUAL = {
    "digits": Preprocessing(8, mean=(0.305,), std=(0.376,)),
    "fashion-mnist": Preprocessing(28, mean=(0.286,), std=(0.353,)),
    "folder": Preprocessing(224),
}


def kind_of(source: str | Path) -> str:
    """Return "digits", "fashion-mnist" or "folder" for a ``source`` of ``load_dataset``."""
    name, _, folder = str(source).partition(":")
    if name == "fashion-mnist" or (name == "digits" and not folder):
        return name
    return "folder"


def usual_preprocessing(
    source: str | Path, image_size: int | tuple[int, int] | None = None, in_channels: int | None = None
) -> Preprocessing:
    """Return the preprocessing with a data set's own mean and deviation; for None with its own size and channels.

    In another number of channels, all have the mean over the data set's own.
    """
    own = _USUAL[kind_of(source)]
    mean, std = own.mean, own.std
    if in_channels not in (None, len(mean)):
        mean, std = ((sum(values) / len(values),) * in_channels for values in (mean, std))
    return Preprocessing(image_size or own.image_size, mean=mean, std=std)


def load_dataset(
    source: str | Path,
    *,
    split: str,
    image_size: int | tuple[int, int] | None = None,
    augment: bool = False,
    skip_corrupt: bool = False,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Load the part ``split`` of a data set.

    Args:
        source: ``"digits"`` (scikit-learn's scans), ``"fashion-mnist"`` (where Debian's package installs it),
            ``"fashion-mnist:FOLDER"`` (its four IDX files, gzipped or not), or a folder of class folders.
        split: ``"train"``, ``"test"`` or ``"all"``. The test part is held out: no choice in training may look at it. A
            folder's own ``train`` and ``test`` folders (or ``val``, ``valid``, ``validation``, ``eval``) are used if
            present, else a third of every class, drawn by ``seed``, is the test part. The digits' third never changes.
        image_size: pixels of a side, or (height, width); None: 8 for digits, 28 for Fashion-MNIST, 224 for a folder.
        augment: light random changes: small shifts, turns and zooms of digits, random crops and flips of photos. See
            ``Dataset`` on what makes them repeatable.
        skip_corrupt: leave out unreadable files and empty class folders, list the files in ``skipped`` and warn once.
            This decodes every file. Without it only the headers are read, and a bad file raises
            here or, if it is damaged after its header, when its item is asked for.
        seed: the seed of a folder's split. Training and evaluation must use the same one.
        preprocessing: a trained model's; replaces ``image_size`` and the data set's own mean and deviation.
        class_names: a trained model's classes: a label is a class's index in it.
    Raises:
        ValueError, OSError: the source or the split is unknown; a file or folder, which the message names, is missing,
            unreadable, damaged or empty; ``class_names`` lacks a class of the data.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if preprocessing is not None and image_size is not None:
        raise ValueError("image_size: give it or preprocessing, not both")
    kind, preprocessing = kind_of(source), preprocessing or usual_preprocessing(source, image_size)
    if kind == "digits":
        images, targets = digits(split)
        found, augmentation = [str(digit) for digit in range(10)], augmentations.SCANS
    elif kind == "fashion-mnist":
        folder = str(source).partition(":")[2]
        images, targets = fashion_mnist(split, Path(folder) if folder else FASHION_MNIST_FOLDER)
        found, augmentation = list(FASHION_MNIST_CLASSES), augmentations.SMALL_PHOTOS
    else:
        from hydravit.data.folder import load_folder

        root = Path(source)
        if not root.exists() and len(root.parts) == 1:
            raise ValueError(
                f"data {str(source)!r} is neither digits, fashion-mnist nor a folder: {root.absolute()} does not exist"
            )
        photos = augmentations.PHOTOS if augment else None
        return load_folder(root, split, preprocessing, class_names, photos, skip_corrupt, seed)
    label = agreed_classes(found, class_names, kind)
    labels = [label[found[target]] for target in targets]
    dataset = ArrayDataset(images, list(label), labels, preprocessing, augmentation if augment else None)
    has_parts = kind == "fashion-mnist" and split != "all"
    dataset.origin = f"its own {split} part" if has_parts else SHARES[split]
    return dataset
