"""Data sets of small grey images that a dependency or the operating system brings along."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hydravit.data.dataset import held_out
from hydravit.data.idx import find_idx, read_idx
from hydravit.extras import extra

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's 1,797 scans: images ``(n, 8, 8)`` uint8 and labels. A third of every class is "test"."""
    with extra("demo", "the digits"):
        from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.round(scans.images * (255 / 16)).astype(np.uint8)  # the scans have grey values 0..16
    chosen = slice(None) if split == "all" else held_out(scans.target, seed=0) == (split == "test")
    return images[chosen], scans.target[chosen]


def fashion_mnist(split: str, folder: Path = FASHION_MNIST_FOLDER) -> tuple[np.ndarray, np.ndarray]:
    """Load Fashion-MNIST (arXiv 1708.07747): images ``(n, 28, 28)`` uint8 and labels, 60,000 "train", 10,000 "test".

    Raises ``FileNotFoundError`` or ``ValueError`` naming the file that is missing or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; install Debian's package dataset-fashion-mnist, or give the folder of its four "
            "IDX files as 'fashion-mnist:FOLDER'"
        )
    names = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}[split]
    images, labels = [], []
    for name in names:
        images_path = find_idx(folder, f"{name}-images-idx3-ubyte")
        labels_path = find_idx(folder, f"{name}-labels-idx1-ubyte")
        images.append(read_idx(images_path, 3))
        labels.append(read_idx(labels_path, 1))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(f"{images_path} has {len(images[-1])} images, {labels_path} has {len(labels[-1])} labels")
        if not images[-1].size:
            raise ValueError(f"{images_path}: no images")
        if labels[-1].max() >= len(FASHION_MNIST_CLASSES):
            raise ValueError(f"{labels_path}: label {labels[-1].max()} is not in 0..{len(FASHION_MNIST_CLASSES) - 1}")
    return np.concatenate(images), np.concatenate(labels)
