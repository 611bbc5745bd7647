"""What a folder of photos holds: its splits, its classes and their image files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from hydravit.extras import extra

with extra("images", "reading image files"):
    from PIL import Image

# The names that folders of splits have, whatever their case; of several, the first one is used.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "eval"),
}


def split_folders(root: Path, split: str) -> tuple[list[Path], Path | None]:
    """Return the folders of ``split`` that hold class folders, and the one for training, whose classes count.

    Both are ``root`` if it has no folders of splits. A folder for training is None where there are only others.

    Raises:
        ValueError: the root cannot be read, or has no folder for ``split``.
    """
    folders = {folder.name.lower(): folder for folder in visible_folders(root)}
    found = {kind: [folders[name] for name in names if name in folders] for kind, names in SPLIT_FOLDERS.items()}
    splits = [*found["train"], *found["test"]]
    # A class may be called "train": splits stand alone, or are a train folder with its counterpart or that has classes.
    alone = bool(splits) and len(splits) == len(folders)
    train = found["train"][0] if found["train"] else None
    if not (alone or (train and (found["test"] or _holds_classes(train)))):
        return [root], root
    chosen = splits if split == "all" else found[split][:1]
    if not chosen:
        hint = f"; or take {train} as the data, of which a third is then held out" if train else ""
        raise ValueError(f"{root}: has no folder {' or '.join(SPLIT_FOLDERS[split])} for split {split!r}{hint}")
    used = [*chosen, *found["train"][:1], *found["test"][:1]]
    others = sorted(folder.name for folder in folders.values() if folder not in used)
    if others:
        names = ", ".join(sorted({folder.name for folder in used}))
        warnings.warn(f"{root}: left out {', '.join(others)} beside {names}", stacklevel=4)
    return chosen, train


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of classes by name, sorted. Raise ``ValueError`` for none."""
    classes = {entry.name: entry for entry in visible_folders(folder)}
    if not classes:
        idx = any(folder.glob("*-ubyte*"))
        hint = f"; it holds IDX files: name it 'fashion-mnist:{folder}'" if idx else ""
        raise ValueError(f"{folder}: no class folders (expected one folder of images per class){hint}")
    return classes


def image_files(path: Path) -> list[Path]:
    """Return ``path`` itself if it is a file, else all image files below it, sorted. Raise ``ValueError`` for none."""
    if path.is_file() or dangling(path):
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    files = files_below(path)
    if not files:
        raise ValueError(f"{path}: folder without images")
    return files


def files_below(folder: Path) -> list[Path]:
    """Return the files below ``folder`` that have an extension Pillow can open, also links that lead nowhere; sorted.

    Others, such as notes, are no images, and neither is what is hidden. Links to folders are followed; ``ValueError``
    names one that leads to a folder that it lies in.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in _files(folder) if file.suffix.lower() in suffixes)


def visible_folders(root: Path) -> list[Path]:
    """Return the folders in ``root`` that are not hidden, sorted. Raise ``ValueError`` if one cannot be entered."""
    entries = _visible(root)
    for entry in entries:
        if dangling(entry) and not entry.suffix:
            raise ValueError(f"{entry}: {dangling(entry)}")
    return [entry for entry in entries if entry.is_dir()]


def dangling(path: Path) -> str:
    """Say where a link that leads nowhere points to; "" for anything else."""
    return f"a link to {os.readlink(path)}, which leads nowhere" if path.is_symlink() and not path.exists() else ""


def _holds_classes(folder: Path) -> bool:
    return bool(visible_folders(folder)) and not any(entry.is_file() for entry in _visible(folder))


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    real = folder.resolve()
    above = (*above, real, *real.parents)
    for entry in _visible(folder):
        if entry.is_dir():
            if entry.is_symlink() and entry.resolve() in above:
                raise ValueError(f"{entry}: a link to {os.readlink(entry)}, a folder that it lies in")
            yield from _files(entry, above)
        elif entry.is_file() or dangling(entry):
            yield entry


def _visible(folder: Path) -> list[Path]:
    try:
        hidden = (".", "__MACOSX")  # the latter comes from archives that macOS made
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith(hidden))
    except NotADirectoryError:
        raise ValueError(f"{folder}: is a file, not a folder of class folders") from None
    except FileNotFoundError:
        raise ValueError(f"{folder}: no such folder") from None
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from None
