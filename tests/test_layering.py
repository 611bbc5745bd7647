"""The direction of imports: no circle between files, nothing against the order of layers, and imports stay light."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

# A package or module may import what stands before it, and itself.
ORDER = {
    "hydravit_kernels": [
        "forking", "subnetwork", "parameters", "ranges", "export", "ops", "flops", "adamw", "sample", "transforms",
        "reference", "functional", "triton", "_native", "_triton", "backends", "networks", "__init__", "__main__",
    ],
    "hydravit": [
        "integers", "config", "extras", "geometry", "layers", "structure", "inference", "timm_interface", "ends",
        "model", "atomic", "preprocessing", "checkpoint", "factory", "api", "__init__", "data",
        "torchvision_operators", "timm_models", "evaluation", "compression", "recipes", "training", "cli", "__main__",
    ],
    "bench": ["__init__", "rows", "measuring", "peers", "report", "gpu", "checks", "compression", "nestings", "run"],
}  # fmt: skip


def modules(package):
    """Every module of a package by its dotted name."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts), path


BUILT = ("hydravit_kernels._cuda", "hydravit_kernels._build_info")  # what the build makes
MODULES = {name: path for package in ORDER for name, path in modules(package) if name not in BUILT}


def imported(path):
    """Everything that a file imports, also inside functions and for type checkers: ``a.b`` of ``from a import b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name):
    """The module of ours that an imported name is, or is defined in; None if it is another's, or built."""
    while name and name not in BUILT and not name.startswith(tuple(f"{built}." for built in BUILT)):
        for module in (name, f"{name}.__init__"):
            if module in MODULES:
                return module
        name = name.rpartition(".")[0]
    return None


GRAPH = {name: {module_of(target) for target in imported(path)} - {None, name} for name, path in MODULES.items()}


def test_no_circle_between_files():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", ORDER)
def test_imports_follow_the_order_of_the_layers(package):
    rank = {name: i for i, name in enumerate(ORDER[package])}
    for name, targets in GRAPH.items():
        inside = name.split(".")
        if inside[0] != package:
            continue
        for target in targets:
            other = target.split(".")
            if other[0] == package:
                assert rank[other[1]] <= rank[inside[1]], f"{name} imports {target}"


@pytest.mark.parametrize("name", MODULES)
def test_packages_know_what_is_below_them_only(name):
    package = name.split(".")[0]
    below = {"hydravit_kernels": (), "hydravit": ("hydravit_kernels",), "bench": ("hydravit_kernels", "hydravit")}
    for target in imported(MODULES[name]):
        top = target.split(".")[0]
        assert top == package or top in below[package] or top not in (*ORDER, "tests"), f"{name} imports {target}"
        if package == "hydravit" and top == "hydravit_kernels":  # public names only, and the report of the build
            assert module_of(target) in ("hydravit_kernels.__init__", "hydravit_kernels.__main__"), target
        if top in ("timm", "torchvision"):
            assert name == "hydravit.timm_models", f"{name} imports {target}"
        if top == "triton":
            assert name.startswith("hydravit_kernels.triton."), f"{name} imports {target}"


def includes(path):
    return re.findall(r'#include "([^"]+)"', path.read_text())


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_kernels_see_the_contracts_and_their_own_folder(folder):
    contracts = {"hydravit.h", "subnetwork.h", "parameters.h"}
    emulated = {"instructions.h"}  # of tests/cuda/emulator, instead of PTX
    for path in [*(CSRC / folder).iterdir(), *(CSRC / name for name in contracts)]:
        assert not any(
            header in path.read_text() for header in ("<torch/", "<ATen/", "<c10/", "<pybind11/", "<Python.h>")
        ), path
        for header in includes(path):
            assert header in contracts | emulated or (path.parent / header).is_file(), f"{path} includes {header}"


def test_importing_is_light():
    heavy = ("triton", "timm", "torchvision", "matplotlib", "sklearn", "PIL")
    code = f"import hydravit, hydravit.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    code = "import torch, hydravit; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
