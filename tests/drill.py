"""A drill of faults: trainings are killed, starved of disk space, signalled and damaged, and must go on regardless.

``make drill`` runs it in full, training/test_drill.py a little of it. Every fault is drawn by a seed, and strikes after
a number of calls in Python, not after a time, so that the same drill can be run again. After every fault

* the only message is one line, which names the file or the folder;
* the run resumes at the last step that was saved, or later;
* the model at its end has the bytes of a run that nothing happened to, and so has the log, apart from speeds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from hydravit.checkpoint import files
from hydravit.checkpoint.formats import read_file
from hydravit.cli import main
from hydravit.training import Trainer, resuming
from hydravit.training.folder import RunFolder

# Four epochs of two steps, with the smallest model. The alarm ends a run that hangs.
RECIPE = "--recipe demo --set depth=1 --set warmup_epochs=1.0 --batch-size 400 --epochs 4".split()
OPTIONS = "--no-evaluate --threads 1".split()
ALARM = 3600


class Fault(NamedTuple):
    """``action`` is called after ``calls`` calls from the beginning of the training."""

    calls: int
    action: Callable[[], object]


class End(NamedTuple):
    """How a process ended: its exit code, what it said, its first step, the last one it saved, and all its calls."""

    code: int
    messages: list[str]
    first: int
    saved: int
    calls: int


class Process:
    """``hydravit train`` in a forked process, which is the leader of a process group.

    A fork is ready at once. Until it runs, this program must not have computed on several threads.
    """

    def __init__(
        self,
        out: Path,
        *arguments: str,
        fault: Fault | None = None,
        disk: tuple[object, str, int, int] | None = None,
        environment: dict[str, str] | None = None,
    ):
        self._facts, writer = os.pipe()
        self._errors, errors = os.pipe()  # unlike a file it has room on a full disk
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            os.close(errors)
            return
        code: object = 70
        try:
            os.setpgid(0, 0)
            signal.alarm(ALARM)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            os.environ.update(environment or {})
            if disk is not None:
                _fill(*disk)
            _observe(writer, fault)
            code = main(["train", "--out", str(out), *OPTIONS, *arguments])
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(int(code))  # type: ignore[call-overload]

    def wait(self) -> End:
        _, status = os.waitpid(self.pid, 0)
        facts = {"first": 0, "saved": 0, "calls": 0}
        for line in _drained(self._facts):
            name, value = line.split()
            facts[name] = int(value)
        lines = _drained(self._errors)
        shown = [line for line in lines if not line.startswith(("epoch ", "hydravit: warning:"))]
        return End(os.waitstatus_to_exitcode(status), shown, **facts)


def _drained(pipe: int) -> list[str]:
    """Return the lines in a pipe, whose other end orphaned workers may still hold, and close it."""
    os.set_blocking(pipe, False)
    text = b""
    try:
        while part := os.read(pipe, 1 << 16):
            text += part
    except BlockingIOError:
        pass
    os.close(pipe)
    return text.decode().splitlines()


def _observe(writer: int, fault: Fault | None) -> None:
    """Write down which steps are first and saved, and count calls from the beginning of the training."""
    run, save, own, calls = Trainer.run, Trainer.save, os.getpid(), 0

    def note(name: str, value: int) -> None:
        os.write(writer, f"{name} {value}\n".encode())

    def count(*_: object) -> None:
        nonlocal calls
        if os.getpid() == own:  # not in a worker
            calls += 1
            if fault is not None and calls == fault.calls:
                fault.action()

    def observed_run(self):
        note("first", self.step)
        sys.setprofile(count)
        trained = run(self)
        note("calls", calls)
        return trained

    def observed_save(self, *arguments):
        path = save(self, *arguments)
        note("saved", self.saved_step)
        return path

    Trainer.run, Trainer.save = observed_run, observed_save  # type: ignore[method-assign]


def _fill(owner, name: str, nth: int, room: int) -> None:
    """From the ``nth`` call of ``owner.name`` on no file grows past ``room`` bytes: the operating system sees to it."""
    write = getattr(owner, name)
    left = nth

    def writing(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return write(*arguments)

    setattr(owner, name, writing)


class Drill:
    """Its methods are kinds of faults, and raise ``AssertionError`` if a run does not survive one.

    Args: a folder for the runs, and the seed of the faults.
    """

    def __init__(self, folder: Path, seed: int = 0):
        torch.set_num_threads(1)
        for name in ("torch._dynamo", "sklearn.datasets"):  # optimizers and data import them, which takes seconds
            importlib.import_module(name)
        self._folder, self._random = folder, random.Random(seed)
        self.whole = RunFolder(folder / "whole")
        end = Process(self.whole.path, *RECIPE).wait()
        assert end.code == 0, end
        self.calls = end.calls

    def kills(self, count: int) -> None:
        """A killed run is resumed, and that is killed again, until a run comes to its end."""
        done = 0
        while done < count:
            folder, saved, code = self._new(), 0, -1
            while code:
                fault = self._fault(lambda: os.kill(os.getpid(), signal.SIGKILL))
                end = Process(folder.path, *_resuming(folder), fault=fault).wait()
                assert end.code in (0, -signal.SIGKILL) and not end.messages, end
                assert end.first >= saved, f"{folder}: resumed at step {end.first}, after step {saved} was saved"
                saved, code = max(saved, end.saved), end.code
                done += code != 0
            self._same(folder, self.whole)

    def full_disks(self, count: int) -> None:
        kinds: list[tuple[object, str, Path, int]] = [
            (resuming, "atomic_write", self.whole.checkpoint, 4),
            (RunFolder, "log_line", self.whole.log, 4),
            (files, "atomic_write", self.whole.model, 1),
        ]
        for i in range(count):
            owner, name, file, times = kinds[i % len(kinds)]
            nth = self._random.randint(1, times)
            room = self._random.randrange(file.stat().st_size * nth // times)
            folder = self._new()
            end = Process(folder.path, *RECIPE, disk=(owner, name, nth, room)).wait()
            self._one_line(end, folder.path / file.name, 2)
            self._finish(folder, end)

    def signals(self, count: int) -> None:
        """SIGTERM to all processes of the run, of which some load data, as Slurm and Kubernetes send it."""
        for i in range(count):
            folder, workers = self._new(), ["--workers", str(2 * (i % 2))]
            stopped = Process(folder.path, *RECIPE, *workers, fault=self._fault(_stop))
            os.waitpid(stopped.pid, os.WUNTRACED)
            os.killpg(stopped.pid, signal.SIGTERM)
            os.kill(stopped.pid, signal.SIGCONT)
            end = stopped.wait()
            if end.code not in (0, -signal.SIGTERM):  # as of a run that has saved its last step
                self._one_line(end, folder.checkpoint, 128 + signal.SIGTERM)
            self._finish(folder, end)

    def dead_workers(self, count: int) -> None:
        for _ in range(count):
            folder = self._new()
            end = Process(folder.path, *RECIPE, "--workers", "2", fault=self._fault(_kill_workers)).wait()
            if end.code:  # workers may have done their work
                self._one_line(end, folder.checkpoint, 2)
            self._finish(folder, end)

    def dead_ranks(self, count: int) -> None:
        """One of two ranks is killed; the other one says so."""
        whole = RunFolder(self._folder / "whole on two ranks")
        wholes = self._ranks(whole, RECIPE)
        assert [end.code for end in wholes] == [0, 0], wholes
        for i in range(count):
            dying, folder = i % 2, self._new()
            fault = Fault(self._random.randint(1, wholes[dying].calls), lambda: os.kill(os.getpid(), signal.SIGKILL))
            ends = self._ranks(folder, RECIPE, {dying: fault})
            assert ends[dying].code == -signal.SIGKILL, ends
            self._one_line(ends[1 - dying], folder.path, 2)
            ends = self._ranks(folder, _resuming(folder))
            assert [end.code for end in ends] == [0, 0], ends
            self._same(folder, whole)

    def damages(self, flips: int, truncations: int) -> None:
        """A damaged file is refused by its name, or the damage is where nothing is: other weights are never loaded."""
        for i in range(flips + truncations):
            file = (self.whole.checkpoint, self.whole.model)[i % 2]
            content = bytearray(file.read_bytes())
            if i < flips:
                content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
            else:
                del content[self._random.randrange(len(content)) :]
            damaged = self._folder / file.name
            damaged.write_bytes(content)
            try:
                loaded = read_file(damaged)
            except ValueError as error:
                assert str(damaged) in str(error) and "\n" not in str(error), error
            else:
                assert i < flips, f"{damaged}: {len(content)} bytes of it were loaded"
                assert list(_values(loaded)) == list(_values(read_file(file))), f"{damaged}: other values were loaded"

    def two_runs(self, count: int) -> None:
        """A second process in the folder of a run that was stopped for a while is refused, and changes nothing."""
        for i in range(count):
            folder = self._new()
            first = Process(folder.path, *RECIPE, fault=self._fault(_stop))
            os.waitpid(first.pid, os.WUNTRACED)
            second = Process(folder.path, *(["--resume"] if i % 2 else [*RECIPE, "--overwrite"])).wait()
            self._one_line(second, folder.path, 2)
            os.kill(first.pid, signal.SIGCONT)
            end = first.wait()
            assert end.code == 0 and not end.messages, end
            self._same(folder, self.whole)

    def _new(self) -> RunFolder:
        path = self._folder / "run"
        shutil.rmtree(path, ignore_errors=True)
        return RunFolder(path)

    def _fault(self, action: Callable[[], object]) -> Fault:
        return Fault(self._random.randint(1, self.calls), action)

    def _ranks(self, folder: RunFolder, arguments: list[str], faults: dict[int, Fault] | None = None) -> list[End]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [
            Process(
                folder.path,
                *arguments,
                fault=(faults or {}).get(rank),
                environment={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        return [rank.wait() for rank in ranks]

    def _finish(self, folder: RunFolder, end: End) -> None:
        """Resume a run whose first process came to ``end``."""
        last = Process(folder.path, *_resuming(folder)).wait()
        assert last.code == 0 and not last.messages, last
        assert last.first >= end.saved, f"{folder}: resumed at step {last.first}, after step {end.saved} was saved"
        self._same(folder, self.whole)

    @staticmethod
    def _one_line(end: End, file: Path, code: int) -> None:
        assert end.code == code and len(end.messages) == 1 and str(file) in end.messages[0], end

    @staticmethod
    def _same(folder: RunFolder, whole: RunFolder) -> None:
        assert folder.model.read_bytes() == whole.model.read_bytes(), f"{folder}: other weights"
        logs = [[json.loads(line) for line in each.log.read_text().splitlines()] for each in (folder, whole)]
        for entry in logs[0] + logs[1]:
            entry.pop("images_per_second", None)
        assert logs[0] == logs[1], f"{folder}: another log"
        left = sorted(file.name for file in folder.path.iterdir())
        assert left == sorted(file.name for file in whole.path.iterdir()), left


def _resuming(folder: RunFolder) -> list[str]:
    return ["--resume"] if folder.description.exists() else RECIPE  # a run that left nothing is not there


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _values(content) -> Iterator[object]:
    """Every value in nested containers, in an order; a tensor as its bytes."""
    if isinstance(content, torch.Tensor):
        yield content.dtype, content.shape, content.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _values(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _values(value)
    else:
        yield content


COUNTS = {
    "kills": (100,),
    "full_disks": (20,),
    "signals": (20,),
    "dead_workers": (10,),
    "dead_ranks": (10,),
    "damages": (200, 50),
    "two_runs": (6,),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(COUNTS)} (default: all)")
    parser.add_argument("--counts", nargs="+", type=int, metavar="N", help="of the one fault, in place of the usual")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder), args.seed)
        for name in args.faults or COUNTS:
            counts = args.counts or COUNTS[name]
            getattr(drill, name)(*counts)
            print(f"{name}: {' and '.join(map(str, counts))} survived", flush=True)
