"""Data sets in a folder of class folders, with any images that Pillow reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from hydravit.data.dataset import SHARES, Dataset, agreed_classes, held_out
from hydravit.data.layout import class_folders, dangling, files_below, split_folders
from hydravit.extras import extra
from hydravit.preprocessing import Preprocessing

with extra("images", "reading image files"):
    from PIL import Image, UnidentifiedImageError

# Pillow and the preprocessing raise these for damaged, huge or unsuitable images.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class FolderDataset(Dataset):
    """Reads an image when its item is asked for; ``ValueError`` names a file that cannot be read then."""

    def __init__(self, files: list[Path], class_names, labels, preprocessing, augmentation=None, skipped=()):
        super().__init__(class_names, labels, preprocessing, augmentation)
        self.files = files
        self.transform: Callable[[Image.Image], Tensor] = preprocessing  # training may replace it by a random one
        self.skipped = tuple(skipped)

    def image(self, index: int) -> Tensor:
        image = read_image(self.files[index], self.preprocessing)
        try:
            return self.transform(image)
        except Exception as error:  # the file is good: this is a fault of the transform
            name = type(error).__name__
            raise RuntimeError(
                f"{self.files[index]}: the augmentation of this image failed ({name}: {error})"
            ) from error


def read_image(path: Path, preprocessing: Preprocessing) -> Image.Image:
    """Read the image in ``path``, upright and in the preprocessing's channels.

    Raises ``ValueError``, which names the file, if it cannot be read or converted.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return preprocessing.convert(image)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as an image ({_reason(path, error)})") from None


def load_folder(
    root: Path, split: str, preprocessing, class_names, augmentation, skip_corrupt: bool, split_seed: int
) -> FolderDataset:
    """Load the part ``split`` of ``root``; arguments and errors are those of ``load_dataset``."""
    chosen_folders, train_folder = split_folders(root, split)
    label = _labels(chosen_folders, train_folder, class_names)
    files, names, labels, skipped = [], [], [], []
    for chosen_folder in chosen_folders:
        for name, folder in class_folders(chosen_folder).items():
            found = files_below(folder)
            bad = dict(_unreadable(found, preprocessing if skip_corrupt else None))
            if bad and not skip_corrupt:
                path, reason = next(iter(bad.items()))
                reason += f"; {len(bad)} such files in its folder" if len(bad) > 1 else ""
                raise ValueError(
                    f"{path}: cannot be read as an image ({reason}); skip_corrupt (--skip-corrupt) leaves it out"
                )
            skipped += [(str(path), reason) for path, reason in bad.items()]
            good = [path for path in found if path not in bad]
            if not good and not skip_corrupt:
                raise ValueError(f"{folder}: class folder without images; skip_corrupt (--skip-corrupt) leaves it out")
            files += good
            names += [str(path.relative_to(folder)) for path in good]
            labels += [label[name]] * len(good)
    if chosen_folders == [root] and split != "all":
        test = held_out(labels, split_seed, names)
        chosen = [i for i in range(len(files)) if test[i] == (split == "test")]
        files, labels = [files[i] for i in chosen], [labels[i] for i in chosen]
    if skipped:
        first, reason = skipped[0]
        warnings.warn(f"{root}: skipped {len(skipped)} unreadable file(s), first {first} ({reason})", stacklevel=3)
    if not files:
        raise ValueError(f"{root}: no readable images for split {split!r}")
    dataset = FolderDataset(files, list(label), labels, preprocessing, augmentation, skipped)
    share = SHARES[split] + (f" by split seed {split_seed}" if split != "all" else "")
    dataset.origin = share if chosen_folders == [root] else f"in {', '.join(map(str, chosen_folders))}"
    return dataset


def _labels(chosen_folders: list[Path], train_folder: Path | None, class_names: Sequence[str] | None) -> dict[str, int]:
    """Return the label of every class: of the model's classes, else of those that there are images to train on."""
    if class_names is not None:
        found = sorted({name for folder in chosen_folders for name in class_folders(folder)})
        return agreed_classes(found, class_names, ", ".join(map(str, chosen_folders)))
    known = class_folders(train_folder) if train_folder else {}
    for folder in chosen_folders:
        for name, class_folder in class_folders(folder).items():
            if train_folder and name not in known:
                raise ValueError(f"{class_folder}: a class that {train_folder} has no folder for")
            known.setdefault(name, class_folder)
    return {name: label for label, name in enumerate(sorted(known))}


def _unreadable(files: list[Path], preprocessing: Preprocessing | None) -> list[tuple[Path, str]]:
    """Return the files whose header (or, with ``preprocessing``, whose pixels) cannot be read, and the reasons."""

    def check(path: Path) -> str:
        try:
            if path.stat().st_size == 0:
                return "empty file"
            with Image.open(path) as image:
                if preprocessing is not None:
                    image.load()
                    preprocessing.convert(image)
        except _UNREADABLE as error:
            return _reason(path, error)
        return ""

    with ThreadPoolExecutor() as pool:  # Pillow and the disk work outside the interpreter's lock
        return [(path, reason) for path, reason in zip(files, pool.map(check, files), strict=True) if reason]


def _reason(path: Path, error: Exception) -> str:
    # Messages of Pillow and of the system repeat the path, which our own messages give already.
    if isinstance(error, UnidentifiedImageError):
        return "no image format Pillow knows"
    return dangling(path) or (isinstance(error, OSError) and error.strerror) or str(error)
