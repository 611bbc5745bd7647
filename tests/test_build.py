"""The build: what each machine gets, and that nothing missing passes unnoticed."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from machine import ISAS, why_not

import hydravit_kernels
from hydravit_kernels import __main__ as build_report
from hydravit_kernels import _native, backends

ROOT = Path(__file__).parent.parent
NO_COMPILER = {"CXX": "/nonexistent/c++"}


def python(*arguments, cwd, **variables):
    """Run Python with these environment variables and no HYDRAVIT_BUILD or CUDACXX but the one given."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HYDRAVIT_BUILD", "CUDACXX")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True)


def load(where, **variables):
    """Load the native part of the package in `where`; print whether, and why not."""
    code = "from hydravit_kernels import _native; print(_native.__file__, _native.loaded, _native.why_not)"
    return python("-c", code, cwd=where, **variables)


@pytest.fixture
def source(tmp_path):
    """A copy of the sources in which nothing was ever built."""
    copy = tmp_path / "source"
    built = shutil.ignore_patterns("_C.so", "_cuda.so", "_build_info.py", "__pycache__")
    for folder in ("csrc", "hydravit", "hydravit_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=built)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(source, **variables):
    """`setup.py build`, the part of an installation that differs between machines; return its result and its output."""
    target = source.parent / "built"
    return python("setup.py", "build", "--build-lib", target, cwd=source, **variables), target


def without_privileges():
    """Root may write to read-only files by its capability CAP_DAC_OVERRIDE (1); take it from the process to come."""
    drop = 24  # PR_CAPBSET_DROP
    ctypes.CDLL(None).prctl(drop, 1, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_sources_that_nobody_can_write_to(source, tmp_path):
    """As in a container that mounts its checkout read-only: the build makes everything elsewhere, and tidies up."""
    paths, temporary = [source, *source.rglob("*")], tmp_path / "temporary"
    temporary.mkdir()
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        environment = {**os.environ, "HYDRAVIT_BUILD": "none", "TMPDIR": str(temporary), "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(
            [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", tmp_path / "dist"],
            cwd=source, env=environment, preexec_fn=without_privileges, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "dist").glob("hydravit-*.whl")) and not list(temporary.iterdir())
        assert sorted(source.rglob("*")) == sorted(paths[1:])
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


def test_loaded_or_a_reason():
    assert _native.loaded == (_native.why_not == "")
    if _native.loaded:
        assert torch.ops.hydravit.cpu_isa() in _native.build_info["cpu_isas"].split()


def test_the_suite_leaves_out_what_is_missing_but_not_what_is_demanded():
    """The first with one line for all tests, the second not at all."""
    suite = ("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "tests/kernels/test_native.py")
    left_out = python(*suite, cwd=ROOT, HYDRAVIT_BUILD="none")
    line = r"^NOT RUN \[\d{3}\] for want of .*, native: native is switched off by HYDRAVIT_BUILD=none$"
    assert left_out.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert len(re.findall(line, left_out.stdout, re.MULTILINE)) == left_out.stdout.count("NOT RUN") == 1
    demanded = python(*suite, cwd=ROOT, HYDRAVIT_BUILD="cpu", HYDRAVIT_CPU_ISA="nonsense")
    assert demanded.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ImportError: HYDRAVIT_BUILD=cpu demands the native backend" in demanded.stderr


def test_report_names_every_part():
    text = build_report.report()
    assert torch.__version__ in text
    for word in ("library", "native on cpu", "reference on cpu"):
        assert word in text
    if _native.loaded:
        assert str(_native.path) in text
        assert torch.ops.hydravit.cpu_isa() in text
        assert "CUDA kernels" in text


def test_empty_backend_variable_means_auto(monkeypatch):
    monkeypatch.delenv("HYDRAVIT_BACKEND", raising=False)
    expected = hydravit_kernels.select()
    monkeypatch.setenv("HYDRAVIT_BACKEND", "")
    assert hydravit_kernels.select() == expected


def test_choice_on_meta_is_quiet(monkeypatch):
    monkeypatch.delenv("HYDRAVIT_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_fallbacks_told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hydravit_kernels.select(device="meta") == "reference"
    with pytest.warns(UserWarning, match="using backend 'reference'"):
        assert hydravit_kernels.select(dtype=torch.float16) == "reference"


def test_none_leaves_the_library_alone():
    result = load(Path(hydravit_kernels.__file__).parent.parent, HYDRAVIT_BUILD="none")
    assert "False is switched off by HYDRAVIT_BUILD=none" in result.stdout, result.stderr


def test_unknown_mode_is_refused():
    result = load(Path(hydravit_kernels.__file__).parent.parent, HYDRAVIT_BUILD="gpu")
    assert result.returncode and "expected auto, cpu, cuda or none" in result.stderr


def test_import_fails_where_the_demanded_library_is_missing(source):
    assert "False has no library" in load(source).stdout
    result = load(source, HYDRAVIT_BUILD="cpu")
    assert result.returncode and "ImportError: HYDRAVIT_BUILD=cpu demands the native backend" in result.stderr


def test_library_that_does_not_load_is_reported(source):
    (source / "hydravit_kernels" / "_C.so").write_text("not a library" * 100)
    result = load(source)
    assert "False cannot load its library" in result.stdout and "invalid ELF header" in result.stdout


@pytest.mark.needs("native")
def test_demanded_cuda_kernels_are_missed_at_import(source):
    shutil.copy(_native.path, source / "hydravit_kernels")
    (source / "hydravit_kernels" / "_build_info.py").write_text("BUILD_INFO = {'cuda_why_not': 'no nvcc'}\n")
    result = load(source, HYDRAVIT_BUILD="cuda")
    message = "ImportError: HYDRAVIT_BUILD=cuda demands the native backend, but it has no CUDA kernels: no nvcc"
    assert result.returncode and message in result.stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (NO_COMPILER, "cmake failed"),
        ({"HYDRAVIT_BUILD": "none"}, "switched off by HYDRAVIT_BUILD=none"),
        ({"HYDRAVIT_TORCH_DIR": "/nonexistent"}, "torch was not found at build time"),
    ],
    ids=["no compiler", "none", "no torch"],
)
@pytest.mark.long
def test_build_without_library_is_pure_python(source, variables, reason):
    result, target = build(source, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"hydravit: no native library ({reason}" in result.stdout
    assert not (target / "hydravit_kernels" / "_C.so").exists()
    assert f"False has no library: {reason}" in load(target).stdout


@pytest.mark.long
def test_build_against_a_torch_that_is_too_old(source, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
    result, target = build(source, HYDRAVIT_TORCH_DIR=str(tmp_path))
    assert "torch 2.10.1+cpu is older than 2.11" in load(target).stdout, result.stdout + result.stderr


@pytest.mark.long
@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_build_fails_where_a_demanded_part_is_missing(source, mode):
    result, target = build(source, HYDRAVIT_BUILD=mode, **NO_COMPILER)
    assert result.returncode
    assert f"hydravit: HYDRAVIT_BUILD={mode}, but no native library: cmake failed" in result.stderr


@pytest.mark.long
def test_failed_build_ships_no_earlier_library(source):
    earlier = source.parent / "built" / "hydravit_kernels" / "_C.so"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("built before")
    build(source, **NO_COMPILER)
    assert not earlier.exists()


@pytest.mark.long
@pytest.mark.needs("native")
def test_what_each_mode_makes_of_nvcc(source, tmp_path):
    """Of one that does not work, and notes its calls; the first build makes kernels for this processor only."""
    calls, nvcc = tmp_path / "calls", tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n')
    nvcc.chmod(0o755)
    path = {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"}

    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", ".")
    result = python(*install, cwd=source, HYDRAVIT_BUILD="cpu", HYDRAVIT_CPU_ISAS="native", **path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not calls.exists()
    result = python("-m", "hydravit_kernels", cwd=tmp_path / "site", HYDRAVIT_BUILD="cpu")
    assert str(tmp_path / "site") in result.stdout, result.stderr
    assert "none: switched off for this build" in result.stdout
    best = next(isa for isa in ISAS if not why_not(f"isa {isa}"))
    built = "portable" if best == "portable" else f"portable {best}"
    assert f" {built}; this processor runs {best}\n" in result.stdout

    result, _ = build(source, HYDRAVIT_BUILD="cuda", **path)
    assert result.returncode and calls.exists()
    assert "HYDRAVIT_BUILD=cuda, but no native library: cmake failed" in result.stderr

    result, target = build(source, HYDRAVIT_BUILD="auto", **path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " True " in load(target, HYDRAVIT_BUILD="cpu").stdout
    built = f'"cpu_isas": "{_native.build_info["cpu_isas"]}"'
    assert built in (target / "hydravit_kernels" / "_build_info.py").read_text()
    result = load(target, HYDRAVIT_BUILD="cuda")
    assert "has no CUDA kernels: CMake found no working nvcc" in result.stderr


@pytest.fixture
def make(source):
    """What `make` would run in a clone where these stamps are there, newer than every source."""
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    (source / ".venv").mkdir()

    def run(target, *stamps):
        for stamp in stamps:
            (source / ".venv" / stamp).touch()
        result = subprocess.run(["make", "-n", target], cwd=source, capture_output=True, text=True, check=True)
        return result.stdout

    return run


@pytest.mark.needs("program make")
def test_the_demo_installs_and_builds_no_more_than_it_needs(make):
    fresh = make("demo")
    (install,) = [line for line in fresh.splitlines() if " -e " in line]
    assert "-e '.[demo]'" in install and install.startswith("HYDRAVIT_BUILD=cpu HYDRAVIT_CPU_ISAS=native ")
    assert "hydravit demo" in make("demo", "torch", "demo") and "pip" not in make("demo")


@pytest.mark.needs("program make")
def test_the_tests_bring_the_rest_and_the_demo_then_needs_nothing(make):
    after = make("test", "torch", "demo")
    assert "-e '.[test]'" in after and "HYDRAVIT_" not in after and "-m venv" not in after
    assert "touch .venv/demo .venv/test" in after
    for target in ("demo", "test"):
        assert "pip" not in make(target, "torch", "demo", "test")


@pytest.mark.needs("program make")
def test_make_help_fits_a_screen():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 120
