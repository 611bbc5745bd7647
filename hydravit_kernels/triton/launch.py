"""How kernels are launched: on which device, in tiles of which size, for which rows.

Tile sizes go by device and problem, never by width: one configuration serves all, so another width compiles nothing.
Those below follow from shared memory and registers; none was measured on a GPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
ROWS, CHUNK = 32, 64  # rows and columns that a norm or a sum takes at a time, so that no block grows with the width


class Tiles(NamedTuple):
    """Rows and columns of a program's result, depth of one step of its loop; of attention: queries, keys, -."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By compute capability and bytes per element: of a product, of one that ends with the derivative of GELU (its tile is
# there twice), of a weight's gradient, of attention forward and backward.
_HOPPER = {
    "product": {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(128, 64, 32, 8, 3)},
    "gelu_backward": {2: Tiles(128, 64, 64, 8, 3), 4: Tiles(64, 64, 32, 8, 3)},
    "gradient": {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(64, 64, 32, 8, 3)},
    "attention": {2: Tiles(64, 64, 0, 4, 2), 4: Tiles(32, 32, 0, 4, 2)},
    "attention_backward": {2: Tiles(64, 64, 0, 4, 2), 4: Tiles(32, 32, 0, 8, 1)},
}
_AMPERE = {
    "product": {2: Tiles(128, 128, 32, 8, 3), 4: Tiles(128, 64, 32, 8, 2)},
    "gelu_backward": {2: Tiles(128, 64, 32, 8, 3), 4: Tiles(64, 64, 32, 8, 2)},
    "gradient": {2: Tiles(128, 128, 32, 8, 3), 4: Tiles(64, 64, 32, 8, 2)},
    "attention": {2: Tiles(64, 64, 0, 4, 2), 4: Tiles(32, 32, 0, 4, 1)},
    "attention_backward": {2: Tiles(64, 32, 0, 4, 1), 4: Tiles(32, 32, 0, 8, 1)},
}
_ANY = {  # small enough for 64 KiB of shared memory
    "product": {2: Tiles(64, 64, 32, 8, 2), 4: Tiles(64, 64, 16, 4, 2)},
    "gelu_backward": {2: Tiles(64, 32, 32, 4, 2), 4: Tiles(64, 32, 16, 4, 2)},
    "gradient": {2: Tiles(64, 64, 32, 8, 2), 4: Tiles(64, 64, 16, 8, 2)},
    "attention": {2: Tiles(64, 32, 0, 4, 1), 4: Tiles(32, 32, 0, 4, 1)},
    "attention_backward": {2: Tiles(32, 32, 0, 4, 1), 4: Tiles(16, 16, 0, 4, 1)},
}
_SMALL = {  # for the interpreter: several tiles also of what is small enough for it
    "product": dict.fromkeys((2, 4), Tiles(64, 64, 64, 1, 1)),
    "gelu_backward": dict.fromkeys((2, 4), Tiles(64, 64, 64, 1, 1)),
    "gradient": dict.fromkeys((2, 4), Tiles(64, 64, 32, 1, 1)),
    "attention": dict.fromkeys((2, 4), Tiles(16, 32, 0, 1, 1)),
    "attention_backward": dict.fromkeys((2, 4), Tiles(16, 32, 0, 1, 1)),
}
_BY_CAPABILITY = {(9, 0): _HOPPER, (8, 0): _AMPERE}


@functools.cache
def table(device: torch.device) -> dict[str, dict[int, Tiles]]:
    """Of the device's kind, by problem and bytes per element; whoever looks for better ones changes it."""
    if INTERPRETED:
        return _SMALL
    if torch.version.hip:
        return _ANY  # such a GPU's capability is no compute capability
    return _BY_CAPABILITY.get(torch.cuda.get_device_capability(device), _ANY)


def tiles(problem: str, like: Tensor, align: int, weight: Tensor | None = None) -> Tiles:
    """For activations like these, times such a weight; ``align`` divides all sizes and offsets.

    Where that makes no vectors of 16 bytes, addresses alone would take the registers of large tiles. A weight in more
    precision than the activations is read in thinner tiles, so that as many fit into shared memory.
    """
    size = like.element_size()
    found = table(like.device) if align * size >= 16 or INTERPRETED else _ANY
    t = found[problem][size]
    return t if weight is None or weight.element_size() <= size else t._replace(depth=t.depth // 2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision() -> str:
    """Of products of float32: TensorFloat-32 where PyTorch's own products may use it, and the GPU is NVIDIA's."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRETED and not torch.version.hip
    return "tf32" if allowed else "ieee"


@triton.jit
def _tf32(x):
    """Rounded to nearest: tensor cores would cut the bits off that they do not take, always towards zero."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r, r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in float32, ``total`` None for zero; ``PRECISION`` (see ``precision``) is of float32."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = _tf32(a), _tf32(b)
    return tl.dot(a, b, total, input_precision=PRECISION)


def launch(kernel, grid: tuple[int, ...], like: Tensor, *arguments, tiles: Tiles | None = None, **options) -> None:
    """``kernel`` on the current stream of the device of ``like``; an empty grid is nothing to do."""
    if math.prod(grid) == 0:
        return
    if tiles is not None:
        options.update(num_warps=tiles.warps, num_stages=tiles.stages)
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **options)


class Batch(NamedTuple):
    """The rows of a call's activations. Rows of a group share a slice: all rows, or with ``subnet`` an image's."""

    images: int
    tokens: int
    subnet: Tensor | None

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def groups(self) -> int:
        return 1 if self.subnet is None else self.images

    @property
    def rows_per_group(self) -> int:
        return self.rows if self.subnet is None else self.tokens

    def new(self, like: Tensor, width: int) -> Tensor:
        """Rows of this width in the dtype of ``like``; zero where an image may leave some unwritten."""
        return like.new_empty(self.rows, width) if self.subnet is None else like.new_zeros(self.rows, width)


class Splits(NamedTuple):
    """How a sum over rows is cut, so that few and narrow sums still fill the device, evenly.

    Each of ``count`` parts takes ``groups_per_split`` groups of ``rows_per_group`` rows, one after the other; without
    one slice per image a group is just a piece of the rows.
    """

    count: int
    groups: int
    groups_per_split: int
    rows_per_group: int


def split_rows(batch: Batch, programs: int, tile_rows: int, least: int, device: torch.device) -> Splits:
    """For a sum of which ``programs`` run beside each other anyway.

    The fewest pieces that give every multiprocessor ``least`` programs, and most of them equally many: the device is
    as late as its last multiprocessor.
    """
    programs, processors = max(programs, 1), _multiprocessors(device)
    wanted = triton.cdiv(least * processors, programs)
    while wanted * programs < 0.9 * processors * triton.cdiv(wanted * programs, processors):
        wanted += 1
    wanted = max(1, min(wanted, batch.groups * triton.cdiv(batch.rows_per_group, tile_rows)))
    if batch.subnet is None:
        rows = triton.cdiv(triton.cdiv(batch.rows, wanted), tile_rows) * tile_rows
        count = triton.cdiv(batch.rows, max(rows, 1))
        return Splits(count, count, 1, rows)
    groups = triton.cdiv(batch.images, wanted)
    return Splits(triton.cdiv(batch.images, max(groups, 1)), batch.images, groups, batch.tokens)
