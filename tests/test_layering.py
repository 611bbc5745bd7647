"""One direction of imports, and imports that stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(path):
    """Top-level names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("hydravit_kernels"), ids=lambda p: p.name)
def test_kernels_do_not_know_the_model(path):
    assert not [name for name in imported(path) if name.split(".")[0] in ("hydravit", "bench", "tests", "timm")]


@pytest.mark.parametrize("path", files("hydravit"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_uses_public_kernels_only(path):
    for name in imported(path):
        assert name.split(".")[0] not in ("bench", "tests"), name
        allowed = ("hydravit_kernels", "hydravit_kernels.__main__")  # the latter is the build report
        assert not name.startswith("hydravit_kernels.") or name in allowed, name
        if name.split(".")[0] in ("timm", "torchvision"):
            assert path.name == "timm_models.py", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", files("bench"), ids=lambda p: str(p.relative_to(ROOT)))
def test_benchmarks_reach_timm_through_us(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"tests", "timm", "torchvision"}


def test_only_the_binding_sees_torch():
    kernels = [p for folder in ("cpu", "cuda") for p in (ROOT / "csrc" / folder).glob("*") if p.is_file()]
    for path in [ROOT / "csrc" / "hydravit.h", *kernels]:
        text = path.read_text()
        assert not any(header in text for header in ("<torch/", "<ATen/", "<c10/")), path


@pytest.mark.parametrize("path", files("hydravit_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_its_own_backend_imports_triton(path):
    ours = path.parent.name == "triton"
    assert ours or not [name for name in imported(path) if name.split(".")[0] == "triton"]


def test_importing_is_light():
    heavy = ("triton", "timm", "torchvision", "matplotlib", "sklearn", "PIL")
    code = f"import hydravit, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    code = "import torch, hydravit; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_grows_past_its_meaning():
    """About 400 lines is where a file asks to be split."""
    for path in [*files("hydravit"), *files("hydravit_kernels"), *files("bench"), *(ROOT / "csrc").rglob("*.[ch]*")]:
        limit = 300 if path.name == "model.py" else 450
        assert len(path.read_text().splitlines()) <= limit, path
