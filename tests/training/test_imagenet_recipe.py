"""The ImageNet recipe on a folder of photos, as a user runs it: with workers, on two ranks, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from hydravit.cli import main

pytestmark = [pytest.mark.long, pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")]

EPOCHS = 4
COLOURS = {"blue": (60, 90, 200), "green": (60, 180, 70), "red": (200, 60, 60), "grey": (128, 128, 128)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """200 noisy photos of several sizes, in four classes."""
    folder, random = tmp_path_factory.mktemp("data") / "photos", np.random.RandomState(0)
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for i in range(50):
            pixels = np.array(colour) + random.normal(0, 40, (random.randint(36, 72), random.randint(36, 72), 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{i}.jpg")
    return folder


def arguments(photos, out, *more):
    recipe = ["train", "--recipe", "hydravit-imagenet", "--config", "tiny", "--set", "image_size=32"]
    return [*recipe, "--data", str(photos), "--epochs", str(EPOCHS), "--out", str(out), "--accuracy-only", *more]


def train_and_kill(out, *command):
    """Start a training in a process of its own and kill it, with what it started, after its first epoch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if line.startswith("epoch 1/"):
            break
    else:
        raise AssertionError(f"no epoch was trained, exit code {process.wait()}")
    trainer = int(re.match(r"process (\d+) on", (out / ".lock").read_text())[1])  # rank 0, under torchrun
    os.kill(trainer, signal.SIGKILL)
    process.stderr.read()
    assert process.wait() != 0 and not (out / "model.safetensors").exists()


def weights(out):
    assert len((out / "log.jsonl").read_text().splitlines()) == EPOCHS
    results = json.loads((out / "results.json").read_text())
    assert [row["heads"] for row in results["widths"]] == [1, 2, 3] and results["environment"]["images"] == 68
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(photos, out)) == 0
    return weights(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_bit(photos, whole, tmp_path, workers):
    assert main(arguments(photos, tmp_path, "--workers", str(workers))) == 0
    assert weights(tmp_path) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed(photos, whole, tmp_path, workers):
    options = arguments(photos, tmp_path, "--workers", str(workers))
    train_and_kill(tmp_path, sys.executable, "-m", "hydravit", *options)
    assert main([*options, "--resume"]) == 0
    assert weights(tmp_path) == whole
    evaluate = ["evaluate", "--checkpoint", tmp_path / "model.safetensors", "--data", photos, "--accuracy-only"]
    assert main([str(argument) for argument in evaluate]) == 0


def test_two_ranks_killed_and_resumed(photos, tmp_path):
    def run(name, *more):
        return [*TORCHRUN, "-m", "hydravit", *arguments(photos, tmp_path / name, *more)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(run("whole"), check=True, capture_output=True, env=environment)
    train_and_kill(tmp_path / "parts", *run("parts"))
    subprocess.run(run("parts", "--resume"), check=True, capture_output=True, env=environment)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
