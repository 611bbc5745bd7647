"""``python -m hydravit_kernels`` prints what was built, what runs on this machine, and why the rest does not."""

from __future__ import annotations

import platform
import sys

import torch

from hydravit_kernels import _native, backends
from hydravit_kernels.networks import CudaNetwork


def report() -> str:
    info = _native.build_info
    cuda = info.get("cuda_architectures")
    rows = {
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": f"{torch.__version__} running, {info.get('torch', 'none')} at build time",
        "library": str(_native.path) if _native.loaded else f"none: native {_native.why_not}",
    }
    if "cpu_isas" in info:
        rows["CPU kernels"] = info["cpu_isas"]
        if _native.loaded:
            rows["CPU kernels"] += f"; this processor runs {torch.ops.hydravit.cpu_isa()}"
        rows["CUDA kernels"] = f"{cuda}, by {info['cuda_compiler']}" if cuda else f"none: {info['cuda_why_not']}"
        rows["built by"] = f"{info['compiler']} for {info['processor']}, CMake {info['cmake']}"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name, state in backends.report(device).items():
            rows[f"{name} on {device}"] = state
    if torch.cuda.is_available():
        rows["CUDA network"] = CudaNetwork.why_not(torch.device("cuda")) or "available"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the library's path may have characters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    print(report())
