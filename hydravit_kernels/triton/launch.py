"""How kernels are launched: on which device, in tiles of which size, for which rows.

Tile sizes depend on the device and the problem, never on the width, so that another width compiles nothing. Those below
were chosen by the shared memory and the registers they need; none was measured on a GPU yet. Kernels name their sizes
in ``do_not_specialize`` for the same reason: Triton would compile anew for a size of 1 and for multiples of 16.
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
# Norms and sums take this many rows and columns at a time, so that no block grows with the width.
ROWS, CHUNK = 32, 64


class Tiles(NamedTuple):
    """The tile of one program, and how it is compiled.

    A matrix product computes ``rows`` times ``columns`` of its result and takes ``k_step`` elements of the reduction
    axis K at a time. Attention takes ``rows`` queries and ``columns`` keys at a time, and all of the head: ``k_step``
    is 0.
    """

    rows: int
    columns: int
    k_step: int
    warps: int
    stages: int


# Problem -> bytes per element -> tiles, one table per kind of GPU. "gelu_backward" is a product whose epilogue
# multiplies with the derivative of GELU, for which it holds a second tile; "gradient" is the gradient of a weight.
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
_SMALL = {  # for the interpreter, whose problems are small: they too shall take several tiles
    "product": dict.fromkeys((2, 4), Tiles(64, 64, 64, 1, 1)),
    "gelu_backward": dict.fromkeys((2, 4), Tiles(64, 64, 64, 1, 1)),
    "gradient": dict.fromkeys((2, 4), Tiles(64, 64, 32, 1, 1)),
    "attention": dict.fromkeys((2, 4), Tiles(16, 32, 0, 1, 1)),
    "attention_backward": dict.fromkeys((2, 4), Tiles(16, 32, 0, 1, 1)),
}
_BY_CAPABILITY = {(9, 0): _HOPPER, (8, 0): _AMPERE}


@functools.cache
def tile_table(device: torch.device) -> dict[str, dict[int, Tiles]]:
    """The tiles for the device, by problem and bytes per element. The search for better ones changes this table."""
    if INTERPRETED:
        return _SMALL
    if torch.version.hip:
        return _ANY  # the capability of such a GPU is no compute capability
    return _BY_CAPABILITY.get(torch.cuda.get_device_capability(device), _ANY)


def tiles(problem: str, like: Tensor, align: int, weight: Tensor | None = None) -> Tiles:
    """The tiles for activations like ``like``, multiplied by ``weight`` if given.

    ``align`` divides all sizes and offsets. Where it allows no accesses of 16 bytes, the tiles are small, because the
    addresses of a large tile alone would fill the registers. Where the weight has more bytes per element than the
    activations, ``k_step`` is halved, so that as many stages fit into shared memory.
    """
    size = like.element_size()
    table = tile_table(like.device) if align * size >= 16 or INTERPRETED else _ANY
    t = table[problem][size]
    return t if weight is None or weight.element_size() <= size else t._replace(k_step=t.k_step // 2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision() -> str:
    """How float32 is multiplied: "tf32" where PyTorch's own products may use it and the GPU is NVIDIA's, or "ieee"."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRETED and not torch.version.hip
    return "tf32" if allowed else "ieee"


@triton.jit
def _tf32(x):
    """Round to the nearest TF32 number, because tensor cores truncate: their results would shrink towards zero."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r, r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in float32; a ``total`` of None is zero. ``PRECISION``, see ``precision``, concerns float32."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = _tf32(a), _tf32(b)
    return tl.dot(a, b, total, input_precision=PRECISION)


def launch(kernel, grid: tuple[int, ...], like: Tensor, *arguments, tiles: Tiles | None = None, **options) -> None:
    """Launch ``kernel`` on the current stream of the device of ``like``. An empty grid launches nothing."""
    if math.prod(grid) == 0:
        return
    if tiles is not None:
        options.update(num_warps=tiles.warps, num_stages=tiles.stages)
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **options)


class Batch(NamedTuple):
    """The rows of a call's activations, one per token, image after image.

    The rows of a group share a slice. All rows are one group, or each image is a group where ``width_index (B,)`` gives
    every image a slice of its own.
    """

    images: int
    tokens: int
    width_index: Tensor | None

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def groups(self) -> int:
        return 1 if self.width_index is None else self.images

    @property
    def rows_per_group(self) -> int:
        return self.rows if self.width_index is None else self.tokens

    def new(self, like: Tensor, columns: int) -> Tensor:
        """A new ``(rows, columns)`` in the dtype of ``like``; zeros where narrow images leave columns unwritten."""
        return like.new_empty(self.rows, columns) if self.width_index is None else like.new_zeros(self.rows, columns)


class RowSplits(NamedTuple):
    """How a sum over rows is split among programs, so that a sum of few columns still fills the device (split-K).

    Each of ``number`` partial sums takes ``groups_per_split`` of the ``groups``, which have ``rows_per_group`` rows.
    Where all images share a slice, a group is here a block of successive rows.
    """

    number: int
    groups: int
    groups_per_split: int
    rows_per_group: int


def split_rows(batch: Batch, programs: int, tile_rows: int, per_processor: int, device: torch.device) -> RowSplits:
    """Split the rows of a sum that has ``programs`` programs per split, which take ``tile_rows`` rows at a time.

    It takes the fewest splits with which every multiprocessor gets at least ``per_processor`` programs and the last
    wave of programs leaves few multiprocessors idle, because the slowest one determines the time.
    """
    programs, processors = max(programs, 1), _multiprocessors(device)
    wanted = triton.cdiv(per_processor * processors, programs)
    while wanted * programs < 0.9 * processors * triton.cdiv(wanted * programs, processors):
        wanted += 1
    wanted = max(1, min(wanted, batch.groups * triton.cdiv(batch.rows_per_group, tile_rows)))
    if batch.width_index is None:
        rows = triton.cdiv(triton.cdiv(batch.rows, wanted), tile_rows) * tile_rows
        number = triton.cdiv(batch.rows, max(rows, 1))
        return RowSplits(number, number, 1, rows)
    groups = triton.cdiv(batch.images, wanted)
    return RowSplits(triton.cdiv(batch.images, max(groups, 1)), batch.images, groups, batch.tokens)
