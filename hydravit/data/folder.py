"""Data sets in a folder of class folders, with any images that Pillow reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from hydravit.data.dataset import Dataset, agreed_classes, held_out
from hydravit.extras import extra
from hydravit.preprocessing import Preprocessing

with extra("images", "reading image files"):
    from PIL import Image, UnidentifiedImageError

# Pillow and the preprocessing raise these for damaged, huge or unsuitable images.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}


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
        raise ValueError(f"{path}: cannot be read as an image ({_reason(error)})") from None


def load_folder(
    root: Path, split: str, preprocessing, class_names, augmentation, skip_corrupt: bool, split_seed: int
) -> FolderDataset:
    """Load the part ``split`` of ``root``; arguments and errors are those of ``load_dataset``."""
    all_folders, chosen_folders = _split_folders(root, split)
    # Classes are those of all splits, so that a class without test images does not move the others' labels.
    names = sorted({name for folder in all_folders for name in _class_folders(folder)})
    label = agreed_classes(names, class_names, str(root))
    files, labels, skipped = [], [], []
    for chosen_folder in chosen_folders:
        for name, folder in sorted(_class_folders(chosen_folder).items()):
            found = _image_files(folder)
            bad = dict(_unreadable(found, preprocessing if skip_corrupt else None))
            if bad and not skip_corrupt:
                path, reason = next(iter(bad.items()))
                reason += f"; {len(bad)} such files in its folder" if len(bad) > 1 else ""
                raise ValueError(f"{path}: cannot be read as an image ({reason}); skip_corrupt leaves it out")
            skipped += [(str(path), reason) for path, reason in bad.items()]
            good = [path for path in found if path not in bad]
            if not good and not skip_corrupt:
                raise ValueError(f"{folder}: class folder without images; skip_corrupt leaves it out")
            files += good
            labels += [label[name]] * len(good)
    if chosen_folders == [root] and split != "all":
        test = held_out(labels, split_seed)
        chosen = [i for i in range(len(files)) if test[i] == (split == "test")]
        files, labels = [files[i] for i in chosen], [labels[i] for i in chosen]
    if skipped:
        first, reason = skipped[0]
        warnings.warn(f"{root}: skipped {len(skipped)} unreadable file(s), first {first} ({reason})", stacklevel=3)
    if not files:
        raise ValueError(f"{root}: no readable images for split {split!r}")
    return FolderDataset(files, list(label), labels, preprocessing, augmentation, skipped)


def image_files(path: Path) -> list[Path]:
    """Return ``path`` itself if it is a file, else all image files below it, sorted. Raise ``ValueError`` for none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    files = _image_files(path)
    if not files:
        raise ValueError(f"{path}: folder without images")
    return files


def _split_folders(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the folders that hold classes: all, and those of ``split``. Both are ``[root]`` if there is no split."""
    names = {folder.name for folder in _visible_folders(root)}
    splits = sorted(names & {"train", "test", "val"})
    # A class may be called "train": split folders stand alone, or are a train folder with its counterpart.
    if not splits or not (len(splits) == len(names) or ("train" in splits and len(splits) > 1)):
        return [root], [root]
    every = [root / name for name in splits]
    if split == "all":
        return every, every
    for name in SPLIT_FOLDERS[split]:
        if name in splits:
            return every, [root / name]
    raise ValueError(f"{root}: has no {' or '.join(SPLIT_FOLDERS[split])} folder for split {split!r}")


def _visible_folders(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except NotADirectoryError:
        raise ValueError(f"{root}: is a file, not a folder of class folders") from None
    except FileNotFoundError:
        raise ValueError(f"{root}: no such folder") from None
    except OSError as error:
        raise ValueError(f"{root}: cannot be read ({error.strerror})") from None


def _class_folders(folder: Path) -> dict[str, Path]:
    classes = {entry.name: entry for entry in _visible_folders(folder)}
    if not classes:
        idx = any(folder.glob("*-ubyte*"))
        hint = f"; it holds IDX files: name it 'fashion-mnist:{folder}'" if idx else ""
        raise ValueError(f"{folder}: no class folders (expected one folder of images per class){hint}")
    return classes


def _image_files(folder: Path) -> list[Path]:
    """Return the files below ``folder`` whose extension Pillow can open; others, such as notes, are no images."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    _visible_folders(folder)  # raises for a folder that may not be read, which rglob passes over
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


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
            return _reason(error)
        return ""

    with ThreadPoolExecutor() as pool:  # Pillow and the disk work outside the interpreter's lock
        return [(path, reason) for path, reason in zip(files, pool.map(check, files), strict=True) if reason]


def _reason(error: Exception) -> str:
    # Pillow's message repeats the path, which our own messages give already.
    return "no image format Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
