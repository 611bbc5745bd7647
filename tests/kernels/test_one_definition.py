"""A subnetwork and the parameters of a network are defined once in Python and once in C++: same names, same order."""

import re
from pathlib import Path

import pytest

from hydravit_kernels import parameters, subnetwork
from hydravit_kernels.networks.cpu import PANEL_MULTIPLE

CSRC = Path(__file__).parents[2] / "csrc"


def fields(header, name):
    """The members of a struct, in order."""
    text = re.sub(r"//[^\n]*", "", (CSRC / header).read_text())
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.S).group(1)
    members = []
    for statement in body.split(";"):
        if found := re.fullmatch(r"\s*(?:int64_t|double|float|T)\s+([\w\s,]+)", statement):
            members += [member.strip() for member in found.group(1).split(",")]
    return tuple(members)


@pytest.mark.parametrize("name", ["EmbedSlice", "AttentionSlice", "MlpSlice", "HeadSlice"])
def test_slices(name):
    assert fields("subnetwork.h", name) == getattr(subnetwork, name)._fields


@pytest.mark.parametrize("name", ["StemParameters", "AttentionParameters", "MlpParameters", "HeadParameters"])
def test_parameters(name):
    assert fields("parameters.h", name) == getattr(parameters, name)._fields


def test_names():
    text = (CSRC / "parameters.h").read_text()
    body = text[text.index("StemParameters<T> stem{") :]
    blocks = (*parameters.STEM, *parameters.ATTENTION, *parameters.MLP, *parameters.HEAD)
    assert re.findall(r'"([\w.]+)"', body) == [spec.name for spec in blocks]


def test_sizes():
    assert fields("parameters.h", "NetworkSizes") == parameters.NetworkSizes._fields


def test_panel():
    (panel,) = re.findall(r"kPanelMultiple = (\d+);", (CSRC / "hydravit.h").read_text())
    assert int(panel) == PANEL_MULTIPLE
