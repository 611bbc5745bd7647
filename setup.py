"""Builds hydravit_kernels/_C.so, and _cuda.so where nvcc is, with CMake.

The outcome is recorded in hydravit_kernels/_build_info.py.

HYDRAVIT_BUILD says what must come of it:
    auto (or unset)  as much as this machine allows: CPU and CUDA kernels, CPU kernels only, or pure Python
    cpu              CPU kernels; nvcc is not looked for
    cuda             CPU and CUDA kernels
    none             no library
What ``cpu`` or ``cuda`` asks for must be built, or the build fails.
HYDRAVIT_CPU_ISAS names the instruction sets of the CPU kernels, see CMakeLists.txt; without it, they are built for all.
HYDRAVIT_TORCH_DIR names the directory of the torch package to build against; without it, the installed one is found.
"""

import atexit
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("HYDRAVIT_BUILD") or "auto"
# Sources may lie where nobody can write, such as a mounted checkout; then all is made in a folder of its own.
ELSEWHERE = None if os.access(ROOT, os.W_OK) else Path(tempfile.mkdtemp(prefix="hydravit-"))
TORCH_FLOOR = (2, 11)
LIBRARIES = ("_C.so", "_cuda.so")


class NotBuilt(Exception):
    """Why there is no library."""


def find_torch() -> tuple[Path, str]:
    """Directory and version of torch, not imported: under build isolation it cannot be, although it is there."""
    if named := os.environ.get("HYDRAVIT_TORCH_DIR"):
        candidates = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for directory in candidates:
        version_file = directory / "version.py"
        if version_file.is_file():
            version = re.search(r"__version__ = '([^']+)'", version_file.read_text(encoding="utf-8")).group(1)
            if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_FLOOR:
                raise NotBuilt(f"torch {version} is older than {'.'.join(map(str, TORCH_FLOOR))}")
            return directory, version
    raise NotBuilt("torch was not found at build time: install it first, then this package again")


def find_program(name: str) -> str | None:
    """A program of this Python's environment (which need not be activated), or of the system."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def run(*command) -> None:
    command = [str(part) for part in command]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    print(result.stdout.encode("ascii", "backslashreplace").decode(), flush=True)  # on any terminal
    if result.returncode:
        error = re.search(r"^[^\n]*\berror\b.*", result.stdout, re.I | re.M | re.S)
        summary = " ".join((error.group() if error else result.stdout).split())
        raise NotBuilt(f"{Path(command[0]).name} failed: {summary[:300]}")


def build_native() -> tuple[list[Path], dict]:
    """Compile, incrementally where it was done before; return the libraries and what is in them."""
    if MODE == "none":
        raise NotBuilt("switched off by HYDRAVIT_BUILD=none")
    torch_root, torch_version = find_torch()
    cmake, ninja = find_program("cmake"), find_program("ninja")
    if not cmake:
        raise NotBuilt("cmake was not found")
    # CMake never looks for a compiler twice, so another toolchain gets another directory.
    toolchain = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDACXX")] + [shutil.which("nvcc")]
    build = (ELSEWHERE or ROOT / "build") / f"native-{hashlib.sha256(repr(toolchain).encode()).hexdigest()[:8]}"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    isas = os.environ.get("HYDRAVIT_CPU_ISAS") or "all"
    options = [f"-DTORCH_ROOT={torch_root}", f"-DPython_EXECUTABLE={sys.executable}", f"-DHYDRAVIT_CPU_ISAS={isas}"]

    def compile_with(cuda: str) -> dict:
        run(cmake, "-S", ROOT, "-B", build, *generator, *options, f"-DHYDRAVIT_CUDA={cuda}")
        run(cmake, "--build", build, "--parallel", os.cpu_count() or 1)
        return json.loads((build / "build_info.json").read_text(encoding="utf-8"))

    try:
        info = compile_with({"auto": "AUTO", "cpu": "OFF", "cuda": "ON"}[MODE])
    except NotBuilt as reason:
        if MODE != "auto":
            raise
        info = {**compile_with("OFF"), "cuda_why_not": str(reason)}  # an nvcc that does not work costs no CPU kernels
    built = LIBRARIES if info["cuda_architectures"] else LIBRARIES[:1]
    return [build / name for name in built], {**info, "torch": torch_version}


class BuildNative(build_ext):
    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib)) / "hydravit_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:  # never ship an earlier build's, never overwrite one that a process has loaded
            (package / name).unlink(missing_ok=True)
        try:
            libraries, info = build_native()
            for library in libraries:
                shutil.copy(library, package)
        except NotBuilt as reason:
            if MODE in ("cpu", "cuda"):
                raise SystemExit(f"hydravit: HYDRAVIT_BUILD={MODE}, but no native library: {reason}") from None
            info = {"why_not": str(reason)}
            print(f"hydravit: no native library ({reason}); the package works without it, in plain PyTorch")
        text = f'"""Written by setup.py."""\n\nBUILD_INFO = {json.dumps(info, indent=4)}\n'
        (package / "_build_info.py").write_text(text, encoding="utf-8")

    def get_outputs(self):
        package = Path(self.build_lib) / "hydravit_kernels"
        return [str(package / name) for name in (*LIBRARIES, "_build_info.py") if (package / name).exists()]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    def get_tag(self):
        if list(Path(self.bdist_dir).rglob("_cuda.so")):  # a module of the Python that built it
            return super().get_tag()
        return "py3", "none", super().get_tag()[2]  # _C.so depends on the platform, not on Python


if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"HYDRAVIT_BUILD={MODE!r}: expected auto, cpu, cuda or none")

if ELSEWHERE:
    atexit.register(shutil.rmtree, ELSEWHERE, ignore_errors=True)

setup(
    options={"build": {"build_base": str(ELSEWHERE)}, "egg_info": {"egg_base": str(ELSEWHERE)}} if ELSEWHERE else {},
    license="MIT",  # here, because old and new setuptools want it spelt differently in pyproject.toml
    ext_modules=[Extension("hydravit_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
