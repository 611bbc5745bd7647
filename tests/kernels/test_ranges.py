"""Ranges for profilers: with ``nvtx`` what is named and in which order, without it nothing at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """
import functools

seen = []


class annotate:
    def __init__(self, message, domain):
        assert domain == "hydravit"
        self.message = message

    def __call__(self, function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            seen.append(self.message)
            return function(*args, **kwargs)
        return inner
"""
MODEL = """
import torch
import hydravit
from hydravit import HydraViTConfig
from hydravit_kernels import functional

config = HydraViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=10, depth=2, max_heads=3, head_dim=4)
model = hydravit.fused_model(config=config, backend="BACKEND")
images = torch.randn(2, 1, 8, 8)
"""
FORWARD = ["stem", *["attention_block", "mlp_block"] * 2, "head"]
BACKWARD = [f"{name}_backward" for name in reversed(FORWARD)]


def python(tmp_path, code, backend="reference", nvtx=FAKE):
    """What the code prints in a process of its own, where ``nvtx`` is the given module."""
    (tmp_path / "nvtx.py").write_text(nvtx)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", MODEL.replace("BACKEND", backend) + code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_reference_and_training(tmp_path):
    code = """
import inspect, pickle
import nvtx
from torch.utils.data import TensorDataset
from hydravit.recipes import Recipe
from hydravit.training import Trainer

recipe = Recipe(config=config, heads=(1, 3), epochs=1, warmup_epochs=0, batch_size=2)
Trainer(model, recipe, TensorDataset(images.repeat(2, 1, 1, 1), torch.arange(4)), progress=False).run()
print(*nvtx.seen)

stem = functional.stem
assert stem is not inspect.unwrap(stem)
assert stem.__name__ == "stem" and stem.__doc__.startswith("Patch embedding")
assert list(inspect.signature(stem).parameters)[:2] == ["images", "parameters"]
assert pickle.loads(pickle.dumps(stem)) is stem
"""
    assert python(tmp_path, code) == [*FORWARD, "optimizer"] * 2


@pytest.mark.needs("native")
def test_native_and_compiled(tmp_path):
    """Compiled there is one graph, whole, and no range: Python is not there any more."""
    code = """
import nvtx
from torch._dynamo.utils import counters

model(images).sum().backward()
print(*nvtx.seen)
nvtx.seen.clear()
torch.compile(model, fullgraph=True, backend="aot_eager")(images).sum().backward()
assert nvtx.seen == []
assert counters["stats"]["unique_graphs"] == 1
"""
    assert python(tmp_path, code, backend="native") == FORWARD + BACKWARD


def test_without_nvtx_nothing_is_wrapped(tmp_path):
    code = """
from hydravit.training import Trainer
from hydravit_kernels.functional import _DifferentiableOp, attention_block, head, mlp_block, stem

for function in (stem, attention_block, mlp_block, head, Trainer._update, _DifferentiableOp.backward):
    assert not hasattr(function, "__wrapped__"), function
"""
    python(tmp_path, code, nvtx="raise ImportError('none here')")
