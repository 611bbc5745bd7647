"""What of the suite this machine can run, and why not the rest.

A test, a parameter of one or a whole file names what it takes, ``pytest.mark.needs("GPU")``. Where that is missing it
is left out, and the run ends with one line for all tests that miss the same. Nothing that is demanded is left out:
with ``HYDRAVIT_BUILD=cpu`` or ``cuda``, a missing library fails the import of hydravit_kernels, and so the run.
"""

import functools
import os
import shutil
from importlib.util import find_spec

import torch

from hydravit.data.arrays import FASHION_MNIST_FOLDER
from hydravit_kernels import CudaNetwork, _native, backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # instead of Triton's compiler, in this whole process
TRITON_DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ISAS = ("avx512", "avx2", "portable")


def native_why_not():
    return "" if _native.loaded else f"native {_native.why_not}"


def isa_why_not(isa):
    if not _native.loaded:
        return native_why_not()
    before = torch.ops.hydravit.cpu_isa()
    try:
        torch.ops.hydravit.set_cpu_isa(isa)
    except RuntimeError:
        return "this processor has none, or the library no kernels for it"
    torch.ops.hydravit.set_cpu_isa(before)
    return ""


def backend_why_not(name, device="cpu"):
    reason = backends.report(device)[name]
    return "" if reason == "available" else f"{name} {reason}"


def gpu_why_not():
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def triton_compiler_why_not():
    return "TRITON_INTERPRET=1 replaces it" if INTERPRETED else WHY_NOT["package"]("triton")


# By the first word of what is needed; some take the rest of the words.
WHY_NOT = {
    "backend": backend_why_not,
    "isa": isa_why_not,
    "native": native_why_not,
    "triton": lambda: backend_why_not("triton", TRITON_DEVICE),
    "triton_interpreter": lambda: "" if INTERPRETED else "TRITON_INTERPRET=1 is not set",
    "triton_compiler": triton_compiler_why_not,
    "GPU": gpu_why_not,
    "cuda_network": lambda: gpu_why_not() or CudaNetwork.why_not(torch.device("cuda")),
    "fashion-mnist": lambda: "" if FASHION_MNIST_FOLDER.is_dir() else "Debian's package for it is not installed",
    "package": lambda name: "" if find_spec(name) else "it is not installed",
    "program": lambda name: "" if shutil.which(name) else "it was not found",
}


@functools.cache
def why_not(need):
    """The reason why something that a test needs is missing here, or ""."""
    kind, *name = need.split()
    return WHY_NOT[kind](*name)
