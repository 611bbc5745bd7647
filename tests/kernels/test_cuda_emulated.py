"""The CUDA kernels without a GPU: tests/cuda runs them on an emulator of CUDA's execution."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.long
def test_kernels_on_the_emulator(tmp_path):
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DHYDRAVIT_TESTS=ON")
    run("cmake", "--build", tmp_path, "--target", "test_cuda_kernels", "--parallel", str(os.cpu_count() or 1))
    assert " 0 failures" in run(tmp_path / "test_cuda_kernels")
