"""Fixtures that every test shares, and what is left out on this machine (see machine.py)."""

import collections
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine import ISAS, why_not

from hydravit.inference import DTYPES
from hydravit_kernels import CudaNetwork, backends
from hydravit_kernels.networks import cuda

ROOT = Path(__file__).parent.parent

LEFT_OUT = pytest.StashKey()


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    missing = {item: next(filter(why_not, _needs(item)), None) for item in items}
    config.stash[LEFT_OUT] = collections.Counter(filter(None, missing.values()))
    config.hook.pytest_deselected(items=[item for item, need in missing.items() if need])
    items[:] = [item for item, need in missing.items() if not need]


def _needs(item):
    return [need for mark in item.iter_markers("needs") for need in mark.args]


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash.get(LEFT_OUT, {})
    for reason in dict.fromkeys(map(why_not, left_out)):
        needs = {need: count for need, count in left_out.items() if why_not(need) == reason}
        terminalreporter.write_line(f"NOT RUN [{sum(needs.values())}] for want of {', '.join(needs)}: {reason}")


def needing(kind, names):
    return [pytest.param(name, marks=pytest.mark.needs(f"{kind} {name}")) for name in names]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=needing("backend", backends.BACKENDS))
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """On small models, waiting for a second thread costs more than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=needing("isa", ISAS))
def isa(request):
    before = torch.ops.hydravit.cpu_isa()
    torch.ops.hydravit.set_cpu_isa(request.param)
    yield request.param
    torch.ops.hydravit.set_cpu_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def openvino(monkeypatch):
    """OpenVINO, whose ``compile_model`` takes the process's only ``Core``: see ``openvino_core``."""
    package = pytest.importorskip("openvino")
    from bench.peers.runtimes import openvino_core

    monkeypatch.setattr("openvino._ov_api.Core", openvino_core)
    return package


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
