"""Terminals that are ASCII only, names that are not, and a package whose folder nobody can write to."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from hydravit import HydraViT, HydraViTConfig
from hydravit.checkpoint import save_checkpoint
from hydravit.data import load_dataset

TINY = HydraViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=10, depth=2, max_heads=3, head_dim=4)
ASCII = {
    "ascii terminal": {"PYTHONIOENCODING": "ascii"},
    "ascii locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("числа") / "été"
    folder.mkdir()
    torch.manual_seed(0)
    model = HydraViT(TINY, trained_heads=(1, 3), backend="reference")
    data = load_dataset("digits", split="test")
    names = ["naïve", "猫", *map(str, range(2, 10))]
    for name in ("модель.safetensors", "модель.pt"):
        save_checkpoint(folder / name, model, preprocessing=data.preprocessing, class_names=names)
    save_checkpoint(folder / "цифры.pt", model, preprocessing=data.preprocessing, class_names=data.class_names)
    Image.effect_noise((20, 16), 60).save(folder / "图.png")
    return folder


def run(*arguments, code="from hydravit.cli import main; raise SystemExit(main())", **variables):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.needs("native")), "reference"])
@pytest.mark.parametrize("terminal", ASCII)
def test_predict(folder, terminal, backend):
    variables, out = ASCII[terminal], []
    for name in ("модель.safetensors", "модель.pt"):
        done = run(
            "predict", folder / "图.png", "--checkpoint", folder / name, "--heads", "all", "--top", "10",
            "--backend", backend, **variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        out.append(done.stdout.decode("utf-8"))
    assert out[0] == out[1] and "na\\xefve" in out[0] and "\\u732b" in out[0] and "k=1" in out[0] and "k=3" in out[0]
    done = run("predict", folder / "图.png", "--checkpoint", folder / "модель.pt", "--json", **variables)
    (answer,) = json.loads(done.stdout.decode("ascii"))
    assert {entry["name"] for entry in answer["widths"][0]["classes"]} & {"naïve", "猫", "2", "3", "4", "5", "6"}


@pytest.mark.parametrize("terminal", ["ascii terminal", pytest.param("ascii locale", marks=pytest.mark.long)])
def test_reports_and_files(folder, terminal, tmp_path):
    """Every other command that names a file or a class."""
    variables, out = ASCII[terminal], tmp_path / "вон"
    for arguments in (
        ("info", "--checkpoint", folder / "модель.pt"),
        ("extract", "--checkpoint", folder / "модель.pt", "--heads", "3", "--out", tmp_path / "один.safetensors"),
        ("evaluate", "--checkpoint", folder / "цифры.pt", "--data", "digits", "--accuracy-only", "--out", out),
    ):
        done = run(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    rows = json.loads((out / "results.json").read_text())["widths"]
    assert (out / "results.png").exists() and [row["heads"] for row in rows] == [1, 3]
    done = run("info", "--checkpoint", folder / "нет.pt", **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"does not exist" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("terminal", ASCII)
def test_training(terminal, tmp_path):
    out = tmp_path / "обучение"
    small = ("--set", "epochs=1", "--set", "depth=1", "--set", "max_heads=2", "--set", "heads=1,2")
    done = run("train", "--recipe", "demo", "--accuracy-only", "--out", out, *small, **ASCII[terminal])
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").exists()


# Refuses to open any file inside the packages for writing, as a read-only file system would.
READ_ONLY = """
import os, sys
from pathlib import Path
sys.dont_write_bytecode = True
here = {folders!r}
def watch(event, arguments):
    if event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir"):
        path, writes = arguments[0], True
    elif event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        return
    if writes and isinstance(path, (str, bytes)) and os.path.abspath(os.fsdecode(path)).startswith(tuple(here)):
        raise PermissionError(f"read-only: {{path}}")
sys.addaudithook(watch)
"""


def test_nothing_is_written_beside_the_sources(folder, tmp_path):
    import hydravit
    import hydravit_kernels

    folders = [os.path.join(package.__path__[0], "") for package in (hydravit, hydravit_kernels)]
    hook = READ_ONLY.format(folders=folders)
    blocked = run(code=f"{hook}\nopen({folders[0]!r} + 'x', 'w')")
    assert b"read-only" in blocked.stderr
    code = f"{hook}\nfrom hydravit.cli import main\nraise SystemExit(main())"
    measured = ("--data", "digits", "--out", tmp_path / "out", "--seconds", "0.01")
    for arguments in (
        ("info",),
        ("predict", folder / "图.png", "--checkpoint", folder / "модель.pt"),
        ("evaluate", "--checkpoint", folder / "цифры.pt", *measured),
    ):
        done = run(*arguments, code=code)
        assert done.returncode == 0, done.stderr
