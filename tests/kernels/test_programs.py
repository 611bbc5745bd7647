"""The kernels without torch: those of the CPU under sanitizers and for another processor, CUDA's on an emulator."""

import os
import subprocess
from pathlib import Path

import pytest
from machine import ISAS, isa_why_not

from tests.machine_code import register_tiles

ROOT = Path(__file__).parents[2]


def run(*command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


def build(folder, *options, target="test_kernels"):
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DHYDRAVIT_TESTS=ON", *options)
    run("cmake", "--build", folder, "--target", target, "--parallel", str(os.cpu_count() or 1))
    return folder / target


@pytest.mark.long
def test_under_sanitizers(tmp_path):
    """The kernels that this processor runs: to compile those that it cannot run takes minutes."""
    isas = [isa for isa in reversed(ISAS) if not isa_why_not(isa)]  # the least demanding first
    printed = run(build(tmp_path, "-DHYDRAVIT_SANITIZE=ON", f"-DHYDRAVIT_CPU_ISAS={';'.join(isas)}"))
    assert all(f"{isa}: ok" in printed for isa in isas), printed


@pytest.mark.long
@pytest.mark.needs("program aarch64-linux-gnu-g++", "program qemu-aarch64")
def test_on_another_processor(tmp_path):
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    program = build(tmp_path, *target, "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")
    assert "portable: ok" in run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program)
    tile = register_tiles(program, "aarch64-linux-gnu-objdump")["portable", True]
    assert tile.products > 0 and not tile.on_stack, tile  # across K, GCC 12 keeps one of the 16 sums on the stack


@pytest.mark.long
def test_cuda_kernels_on_the_emulator(tmp_path):
    assert " 0 failures" in run(build(tmp_path, target="test_cuda_kernels"))
