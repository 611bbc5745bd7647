"""The folder of a training run: its files, what describes it, and that one process at a time writes there."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydravit.atomic import atomic_write, remove_temporary_files


class RunFolder:
    """Paths of a run's files, and what is done with them.

    Attributes:
        checkpoint: the state of the training, from which it resumes.
        log: a line of JSON per epoch.
        description: ``recipe.json``, all that decides the weights; ``--recipe`` takes it.
        model: the trained weights. A run that has them is finished.
        results: accuracy and cost of every width, and their picture.
        tensorboard: the folder of the log for TensorBoard.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"
        self.log = self.path / "log.jsonl"
        self.description = self.path / "recipe.json"
        self.model = self.path / "model.safetensors"
        self.results = (self.path / "results.json", self.path / "results.png")
        self.tensorboard = self.path / "tensorboard"
        self._locked = False

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out in a ``with`` block, and remove what killed ones left half-written.

        The lock is the operating system's, on the file ``.lock``: it ends with the process, however that ends.
        Loader workers do not inherit it.

        Raises:
            RuntimeError: another process holds it.
            OSError: the folder cannot be made or written.
        """
        if self._locked:  # by the caller
            yield
            return
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            _take(file, self.path)
            self._locked = True
            try:
                remove_temporary_files(self.path)
                yield
            finally:
                self._locked = False
                if new and [file.name for file in self.path.iterdir()] == [".lock"]:  # nothing came of the run
                    shutil.rmtree(self.path, ignore_errors=True)

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        for file in (self.model, self.checkpoint, self.log, self.description, *self.results):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def describe(self, description: dict, start: dict) -> None:
        """Write ``recipe.json``.

        Args:
            description: plain values that hold for the whole run.
            start: plain values of this start of it; those of earlier ones are kept, in the list ``"starts"``.
        """
        start = {**start, "command": shlex.join(sys.orig_argv)}
        try:
            earlier = json.loads(self.description.read_text(encoding="utf-8"))["starts"] if start["step"] else []
        except (OSError, ValueError, KeyError, TypeError):
            earlier = []
        text = json.dumps({**description, "starts": [*earlier, start]}, indent=2) + "\n"
        atomic_write(self.description, lambda file: file.write_text(text, encoding="utf-8"))

    def log_line(self, entry: dict) -> None:
        """Append a line to the log. Raise ``OSError``, which names the file, if there is no room for it."""
        size = self.log.stat().st_size if self.log.exists() else 0
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            os.truncate(self.log, size)  # no half of a line stays
            raise OSError(f"{self.log} could not be written: {error}") from error

    def rewind_log(self, epoch: int) -> None:
        """Drop the lines of epochs after ``epoch``, and with a warning those that a full disk or a crash has torn."""
        if not self.log.is_file():
            return
        kept, torn = [], []
        for number, line in enumerate(self.log.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                if json.loads(line)["epoch"] <= epoch:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                torn.append(number)
        if torn:
            warnings.warn(f"{self.log}: line {torn[0]} is damaged; {len(torn)} such line(s) left out", stacklevel=2)
        atomic_write(self.log, lambda file: file.write_text("".join(kept), encoding="utf-8"))


def _take(file, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise RuntimeError(f"{folder}: {holder} trains there; wait for its end, or choose another folder") from None
    except OSError as error:
        warnings.warn(f"{folder}: two runs there at once are not noticed ({error.strerror})", stacklevel=3)
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
