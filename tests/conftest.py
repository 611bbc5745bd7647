"""Fixtures that every test shares, and what is left out on this machine (see machine.py)."""

import collections

import pytest
import torch
from machine import ISAS, why_not

from hydravit_kernels import backends

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
