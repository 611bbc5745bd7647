"""The Triton kernels through Triton's own compiler, for GPUs that need not be there: they compile, they fit, once.

Nothing is launched. The interpreter replaces the compiler, so this is no test for a process that has it. What every
kernel needs is printed: ``pytest -rP tests/kernels/test_triton_compile.py``.
"""

import re
import subprocess

import pytest
import torch
from machine import why_not

from hydravit.config import resolve_config
from hydravit.geometry import every_width, scala
from hydravit_kernels import AttentionParameters, HeadParameters, MlpParameters, StemParameters
from hydravit_kernels.subnetwork import flatten

if reason := why_not("triton_compiler"):
    pytest.skip(f"Triton's compiler: {reason}", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hydravit_kernels import triton as kernels
from hydravit_kernels.triton import launch

SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have, by capability
# Bytes per thread, of which spilled registers are a part; before Hopper, some products of 16-bit values take most.
MOST_STACK = {75: 512, 80: 512, 90: 128}
BASE = resolve_config("base")


class Driver:
    """Of a GPU that is not there: enough to compile for it. Every capability is a device of its own."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiling(monkeypatch):
    """``compiling(capability)``: from now on a launch only compiles; what was compiled so far, without repetition."""
    run, compiled = JITFunction.run, {}

    def compile_only(kernel, *arguments, grid, warmup, **options):
        binary = run(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled[id(binary)] = binary

    def start(capability):
        table = launch._BY_CAPABILITY.get(divmod(capability, 10), launch._ANY)
        monkeypatch.setattr(launch, "tile_table", lambda device: table)
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return start


def run_all_ops(subnetworks, dtype, parameters_dtype, mixed=False, batch=2):
    """Forward, with and without saving, and every gradient of every block, on tensors of which nothing is read."""
    full, hidden, tokens = BASE.embed, BASE.hidden, BASE.tokens
    width_index = torch.zeros(batch, dtype=torch.int64) if mixed else None
    embed = max(s.embed.embed for s in subnetworks)

    def make(kind, *shapes):
        return kind(*(None if shape is None else torch.empty(shape, dtype=parameters_dtype) for shape in shapes))

    def zeros(p):
        return p._make(None if parameter is None else torch.zeros_like(parameter) for parameter in p)

    x = torch.empty(batch, tokens, embed, dtype=dtype)
    branch_scale, vector = torch.empty(batch, dtype=dtype), (full,)
    p = make(AttentionParameters, vector, vector, (3 * full, full), (3 * full,), (full, full), vector, vector)
    slices = [s.attention[0] for s in subnetworks]
    constants = (branch_scale, flatten(slices), [s.scale for s in slices], 1e-6, width_index, tokens)
    kernels.attention_block(x, p, *constants, False)
    _, *saved = kernels.attention_block(x, p, *constants, True)
    kernels.attention_block_backward(x, x, *saved, p, *constants, True, zeros(p))
    p = make(MlpParameters, vector, vector, (hidden, full), (hidden,), (full, hidden), vector, vector)
    constants = (branch_scale, flatten([s.mlp[0] for s in subnetworks]), 1e-6, width_index)
    kernels.mlp_block(x, p, *constants, False)
    _, *saved = kernels.mlp_block(x, p, *constants, True)
    kernels.mlp_block_backward(x, x, *saved, p, *constants, True, zeros(p))
    images = torch.empty(batch, 3, 224, 224, dtype=dtype)
    p = make(StemParameters, (full, 3, 16, 16), vector, (1, 1, full), None, (1, tokens, full))
    constants = (flatten([s.embed for s in subnetworks]), width_index)
    kernels.stem_backward(kernels.stem(images, p, *constants), images, p, *constants, False, zeros(p))
    p = make(HeadParameters, vector, vector, (1000, full), (1000,))
    constants = (0, 1, flatten([s.head for s in subnetworks]), 1e-6, width_index)
    kernels.head_backward(kernels.head(x, p, *constants), x, p, *constants, True, zeros(p))


def check_fits(compiled, capability, folder):
    """Shared memory is there, and registers suffice but for a few values per thread."""
    for i, binary in enumerate(compiled.values()):
        name, shared = binary.metadata.name, binary.metadata.shared
        file = folder / f"{i}.cubin"
        file.write_bytes(binary.asm["cubin"])
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        print(f"sm_{capability} {name:30} {registers:3} registers, {stack:3} bytes of stack, {shared:6} bytes shared")
        assert shared <= SHARED_MEMORY[capability], name
        assert stack <= MOST_STACK[capability], name


@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_compilation_serves_every_width(compiling, mixed, tmp_path):
    """And every batch; of training a model under autocast, forward and backward together some forty kernels.

    Those that multiply do it on Hopper's tensor cores, and copy 16 bytes at a time.
    """
    compiled, widths = compiling(90), every_width(BASE)

    def run(heads, batch):
        subnetworks = [widths[heads], widths[12]] if mixed else [widths[heads]]
        run_all_ops(subnetworks, torch.bfloat16, torch.float32, mixed, batch)

    run(12, 2)
    check_fits(compiled, 90, tmp_path)
    for binary in compiled.values():
        if "dot" in binary.asm["ttir"]:
            ptx = binary.asm["ptx"]
            assert "wgmma.mma_async" in ptx and "cp.async.cg.shared.global" in ptx, binary.metadata.name
    first = len(compiled)
    assert 20 <= first <= 40
    for heads in widths:
        run(heads, 2 + heads % 3)
    assert len(compiled) == first, [binary.metadata.name for binary in list(compiled.values())[first:]]


@pytest.mark.parametrize(
    "capability, dtype",
    [
        (capability, dtype)
        for capability in SHARED_MEMORY
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if capability >= 80 or dtype != torch.bfloat16
    ],
)
def test_the_optimizer(compiling, capability, dtype, tmp_path):
    """One kernel where memory can be read in vectors, and is, and one for the rest, whatever the numbers."""
    compiled, arrays = compiling(capability), torch.empty(5, 65, 320, dtype=dtype)

    def run(*rectangle, begin=0, averages=True):
        weight, gradient, first, second, average = arrays.flatten(1)[:, begin:]
        kernels.adamw(
            [weight], [gradient], [first], [second], [average] * averages,
            torch.tensor([(0, 0, *rectangle)]), torch.zeros(1, 8),
        )  # fmt: skip

    run(0, 65, 320, 64)
    [binary] = compiled.values()
    accesses = re.findall(r"(?:ld|st)\.global\.(v\d\.b32|b16)", binary.asm["ptx"])
    assert set(accesses) == {"v4.b32" if dtype == torch.float32 else "v2.b32"} and len(accesses) == 9  # four elements
    for columns in (8, 128, 320):
        run(16, 3, 320, columns, averages=columns > 8)
    assert len(compiled) == 1
    for begin, rectangle in ((0, (0, 65, 320, 1)), (0, (5, 2, 320, 64)), (3, (0, 16, 320, 63)), (1, (0, 1, 320, 320))):
        run(*rectangle, begin=begin)
    assert len(compiled) == 2
    check_fits(compiled, capability, tmp_path)


DTYPES = {
    "fp32": (torch.float32, torch.float32, "highest"),
    "tf32": (torch.float32, torch.float32, "high"),
    "bf16": (torch.bfloat16, torch.bfloat16, "highest"),
    "bf16, fp32 masters": (torch.bfloat16, torch.float32, "highest"),
    "fp16": (torch.float16, torch.float16, "highest"),
    "fp16, fp32 masters": (torch.float16, torch.float32, "highest"),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "capability, name",
    [
        (capability, name)
        for capability in SHARED_MEMORY
        for name in DTYPES
        if capability >= 80 or not name.startswith(("tf32", "bf16"))
    ],
)
def test_compiles_for(compiling, capability, name, tmp_path):
    """Also with heads whose rows lie apart, and where nothing is a multiple of 16."""
    dtype, parameters_dtype, products = DTYPES[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        compiled = compiling(capability)
        run_all_ops([every_width(BASE)[6]], dtype, parameters_dtype)
        if capability == 90 or name == "fp32":
            run_all_ops([scala(BASE, 204, suffix=True)], dtype, parameters_dtype)
        check_fits(compiled, capability, tmp_path)
    finally:
        torch.set_float32_matmul_precision(before)
