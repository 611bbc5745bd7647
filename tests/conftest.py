"""Fixtures that every test shares: a seed, and each backend that runs here (a missing one skips, with its reason)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hydravit.inference import DTYPES
from hydravit_kernels import CudaNetwork, backends
from hydravit_kernels.networks import cuda

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(backends.BACKENDS))
def backend(request):
    reason = backends.report()[request.param]
    if reason != "available":
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """On small models, waiting for a second thread costs more than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    before = torch.ops.hydravit.cpu_isa()
    try:
        torch.ops.hydravit.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.hydravit.set_cpu_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The module of the CUDA network, compiled for this CPU: the emulator of tests/cuda computes what a GPU would."""
    folder = tmp_path_factory.mktemp("emulated")
    options = (f"-DTORCH_ROOT={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}")
    for command in (
        ("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DHYDRAVIT_EMULATOR=ON", *options),
        ("cmake", "--build", folder, "--target", "_cuda"),
    ):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
    spec = importlib.util.spec_from_file_location("_cuda", folder / "_cuda.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_on_the_cpu(emulated, monkeypatch):
    """Models on the CPU have the CUDA network, on the emulator, and its dtypes."""
    monkeypatch.setattr(cuda, "_cuda", emulated)
    monkeypatch.setattr(CudaNetwork, "why_not", staticmethod(lambda device: ""))
    monkeypatch.setitem(DTYPES, "cpu", DTYPES["cuda"])
