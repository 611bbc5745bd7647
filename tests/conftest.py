"""Fixtures that every test shares: a seed, and each backend that runs here (a missing one skips, with its reason)."""

import pytest
import torch

from hydravit_kernels import backends


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
