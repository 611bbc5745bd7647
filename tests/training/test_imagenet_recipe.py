"""The ImageNet recipe on a folder of photos, as a user runs it: with workers, on two ranks, killed and resumed."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from hydravit.cli import main

pytestmark = [pytest.mark.long, pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")]

QUICK = ("--set", "image_size=32", "--epochs", "4")
COLOURS = {"blue": (60, 90, 200), "green": (60, 180, 70), "red": (200, 60, 60), "grey": (128, 128, 128)}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# The command, killed by itself when it has shown an epoch: however busy the machine is, it comes no further.
KILLED = """
import os, signal, sys
from hydravit.cli import main
from hydravit.training.progress import Progress

def epoch(self, entry, shown=Progress.epoch):
    shown(self, entry)
    if entry["epoch"] == int(os.environ["KILLED_AFTER"]):
        os.kill(os.getpid(), signal.SIGKILL)

Progress.epoch = epoch
if __name__ == "__main__":
    sys.exit(main())
"""


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
    recipe = ["train", "--recipe", "hydravit-imagenet", "--config", "tiny"]
    return [*recipe, "--data", str(photos), "--out", str(out), "--accuracy-only", *more]


def train_and_kill(out, *arguments, ranks=1, epoch=3):
    """Start a training in processes of its own that dies after that epoch, of one step; of two ranks, the first."""
    out.mkdir(exist_ok=True)
    script = out.parent / f"{out.name}-killed.py"
    script.write_text(KILLED)
    command = [sys.executable, *(TORCHRUN if ranks == 2 else []), script, *arguments]
    environment = {**ENVIRONMENT, "KILLED_AFTER": str(epoch)}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
    shown = re.findall(r"^epoch (\d+)/", done.stderr, re.M)
    assert shown and int(shown[-1]) == epoch, done.stderr
    assert done.returncode != 0 and not (out / "model.safetensors").exists()
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    assert state["position"][2] == epoch - 1  # written in the epoch's step, with what those before it had done


def weights(out, epochs=4):
    assert len((out / "log.jsonl").read_text().splitlines()) == epochs
    results = json.loads((out / "results.json").read_text())
    assert [row["heads"] for row in results["widths"]] == [1, 2, 3] and results["environment"]["images"] == 68
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(photos, out, *QUICK)) == 0
    return weights(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_bit(photos, whole, tmp_path, workers):
    assert main(arguments(photos, tmp_path, *QUICK, "--workers", str(workers))) == 0
    assert weights(tmp_path) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed(photos, whole, tmp_path, workers):
    options = arguments(photos, tmp_path, *QUICK, "--workers", str(workers))
    train_and_kill(tmp_path, *options)
    assert main([*options, "--resume"]) == 0
    assert weights(tmp_path) == whole
    evaluate = ["evaluate", "--checkpoint", tmp_path / "model.safetensors", "--data", photos, "--accuracy-only"]
    assert main([str(argument) for argument in evaluate]) == 0


def test_two_ranks_killed_and_resumed(photos, tmp_path):
    def run(name, *more):
        command = [sys.executable, *TORCHRUN, "-m", "hydravit", *arguments(photos, tmp_path / name, *QUICK, *more)]
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)

    run("whole")
    train_and_kill(tmp_path / "parts", *arguments(photos, tmp_path / "parts", *QUICK), ranks=2)
    run("parts", "--resume")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_epochs_at_the_recipes_size(photos, tmp_path, ranks):
    """It is killed twice, and has another number of workers every time. Those above compare the bits, at 32 pixels."""
    options = arguments(photos, tmp_path, "--epochs", "20")
    train_and_kill(tmp_path, *options, "--workers", "0", ranks=ranks, epoch=6)
    train_and_kill(tmp_path, *options, "--workers", "1", "--resume", ranks=ranks, epoch=12)
    command = [sys.executable, *(TORCHRUN if ranks == 2 else []), "-m", "hydravit", *options]
    subprocess.run([*command, "--workers", "2", "--resume"], check=True, capture_output=True, env=ENVIRONMENT)
    weights(tmp_path, epochs=20)
