"""``python -m bench.gpu.resources``: what every CUDA kernel takes of an SM, as ptxas says; needs nvcc, no GPU.

Writes csrc/cuda/resources.csv, which is committed: registers of a thread, bytes of stack and of spilled registers. The
first line names the compiler and the fingerprint of the sources; tests/bench/gpu/test_resources.py fails when the
sources have another fingerprint. Raises a ``RuntimeError`` when ptxas serializes wgmma or mends its order, or when a
disassembler is at hand and finds no wgmma.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
REPORT = SOURCES / "resources.csv"
ARCHITECTURES = ("sm_80", "sm_90a")
FIELDS = ("architecture", "kernel", "registers", "stack", "spill_stores", "spill_loads")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for.*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes "
    r"spill stores, (?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)


def main() -> int:
    rows = [row for architecture in ARCHITECTURES for row in resources(architecture)]
    REPORT.write_text(text(rows))
    print(REPORT.read_text())
    return int(any(int(row["spill_stores"]) + int(row["spill_loads"]) for row in rows))


def fingerprint() -> str:
    """A hash of the code that the kernels are compiled from: edited comments and line breaks do not change it."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    text = "".join(f"{path.name}\n{without_comments(path.read_text())}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Literals come first, because what looks like a comment inside them is none. A quote after a digit separates digits.
_LITERAL_OR_GAP = re.compile(
    r"""(?P<literal>R"(?P<mark>[^\s()\\]*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\])*"|(?<!\w)(?:u8|[uUL])?'(?:\\.|[^'\\])+')"""
    r"""|(?:\s|\\\n|//(?:\\\n|[^\n])*|/\*.*?\*/)+""",
    re.S,
)


def without_comments(source: str) -> str:
    """C++ without comments, and without whitespace but where it keeps two words or two operators apart."""

    def shorten(match: re.Match) -> str:
        if match["literal"]:
            return match.group()
        neighbours = source[max(match.start() - 1, 0) : match.start()] + source[match.end() : match.end() + 1]
        return " " if re.fullmatch(r"\w\w|[-+<>&|=*/:]{2}", neighbours) else ""

    return _LITERAL_OR_GAP.sub(shorten, source)


def text(rows: list[dict[str, str]]) -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    file = io.StringIO()
    file.write(f"# nvcc {re.search(r'V([0-9.]+)', version).group(1)}, sources {fingerprint()}\n")
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read() -> tuple[str, list[dict[str, str]]]:
    """The first line and the rows of the committed report."""
    first, *lines = REPORT.read_text().splitlines()
    return first, list(csv.DictReader(lines))


def resources(architecture: str) -> Iterator[dict[str, str]]:
    """A row for each kernel, with the flags of CMakeLists.txt."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-I", str(SOURCES.parent), "-Xptxas", "-v"]
    flags.append(f"-arch={architecture}")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            cubin = Path(folder) / "out.cubin"
            command = ["nvcc", *flags, "-cubin", "-o", str(cubin), str(source)]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            if warning := re.search(r".*\(C75\d\d\).*", log):  # wgmma serialized, or fences and waits put in
                raise RuntimeError(f"{source.name}: {warning.group()}")
            if architecture == "sm_90a" and source.name == "phases.cu" and wgmmas(cubin) == 0:
                raise RuntimeError(f"{source.name}: no wgmma in its machine code")
            for match in sorted(_ENTRY.finditer(log), key=lambda match: match["kernel"]):
                values = {field: match[field] for field in FIELDS[2:]}
                yield {"architecture": architecture, "kernel": _readable(match["kernel"]), **values}


def wgmmas(cubin: Path) -> int | None:
    """Count the wgmma instructions; None: neither the toolkit's disassembler nor Triton's was found."""
    triton = importlib.util.find_spec("triton")
    folders = (triton.submodule_search_locations if triton else None) or ()
    places = [f"{folder}/backends/nvidia/bin" for folder in folders]
    disassembler = shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *places]))
    if disassembler is None:
        return None
    code = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return code.count("HGMMA")


def _readable(mangled: str) -> str:
    """``product_kernel<Bf16, k32x32, kBulk>`` of what the compiler calls it."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"hydravit::cuda::|\(anonymous namespace\)::|^void ", "", name)
    for enum in ("TileShape", "Loader"):
        members = re.search(rf"enum class {enum} : int {{ ([^}}]+) }}", (SOURCES / "phase.h").read_text()).group(1)
        for value, member in enumerate(members.split(", ")):
            name = name.replace(f"({enum}){value}", member)
    return re.match(r"\w+(<[^>]*>)?", name).group()


if __name__ == "__main__":
    raise SystemExit(main())
