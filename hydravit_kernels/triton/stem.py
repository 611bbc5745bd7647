"""Stem: patch embedding, class and register tokens, position embedding; arguments as in ``ops.py``.

Forward is one product whose rows are the tokens. It reads the patches from the images in place, and its epilogue adds
the bias or the token, and the position. The rows of class and register tokens multiply zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hydravit_kernels.parameters import StemParameters
from hydravit_kernels.triton.checks import (
    check_activation,
    check_buffers,
    check_tensor,
    check_vectors,
    check_weight,
    check_width_index,
    rows_like,
)
from hydravit_kernels.triton.gradients import Patches, add_weight_gradient, patch_values
from hydravit_kernels.triton.launch import CHUNK, ROWS, Batch, dot, launch, precision, tiles
from hydravit_kernels.triton.product import product
from hydravit_kernels.triton.slices import slice_at, slice_of, stem_product


@triton.jit(do_not_specialize=["rows_per_group", "column_tiles", "cls_tokens", "position_start"])
def _stem_kernel(
    images, weight, bias, cls_token, reg_token, pos_embed, y,
    weight_stride, cls_stride, reg_stride, pos_stride, y_stride,
    slices, patches, rows_per_group, column_tiles, cls_tokens, position_start,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K_STEP: tl.constexpr,
):  # fmt: skip
    """Compute one tile ``[ROWS, COLUMNS]`` of ``y``, in steps of ``K_STEP`` pixels of a patch.

    Grid: (groups * row tiles of a group * column tiles,)

    images: (images, channels, height, width), strides in ``patches``
    weight: the full (embed, channels * PATCH_HEIGHT * PATCH_WIDTH)
    bias: (embed,) or None
    cls_token, reg_token, pos_embed: (count, embed) or None. Token ``position_start`` has the first position.
    y: (images * tokens, columns)
    """
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = row_tile // tiles_per_group
    s = slice_of(slices, group, ALIGN)
    if column_tile * COLUMNS >= s.rows:
        return
    i = row_tile % tiles_per_group * ROWS + tl.arange(0, ROWS)
    row = group * rows_per_group + i
    row_here = i < rows_per_group
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < s.rows
    full_n = s.first_row + n

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, s.columns, K_STEP):
        k = start + tl.arange(0, K_STEP)
        k_here = k < s.columns
        mask = row_here[:, None] & k_here[None, :]
        a = patch_values(images, row, k, mask, patches, PATCH_HEIGHT, PATCH_WIDTH)  # [ROWS, K_STEP]
        place = k[:, None] + full_n[None, :] * weight_stride
        b = tl.load(weight + place, mask=k_here[:, None] & n_here[None, :], other=0.0)  # [K_STEP, COLUMNS]
        total = dot(a, b.to(a.dtype), total, PRECISION)

    token = row % patches.tokens
    if bias is not None:
        value = tl.load(bias + full_n, mask=n_here, other=0.0).to(tl.float32)
        total += tl.where((token >= patches.prefix_tokens)[:, None], value[None, :], 0.0)
    if cls_token is not None:
        mask = (row_here & (token < cls_tokens))[:, None] & n_here[None, :]
        total += tl.load(cls_token + token[:, None] * cls_stride + full_n[None, :], mask=mask, other=0.0)
    if reg_token is not None:
        register = token - cls_tokens
        mask = (row_here & (register >= 0) & (token < patches.prefix_tokens))[:, None] & n_here[None, :]
        total += tl.load(reg_token + register[:, None] * reg_stride + full_n[None, :], mask=mask, other=0.0)
    if pos_embed is not None:
        position = token - position_start
        mask = (row_here & (position >= 0))[:, None] & n_here[None, :]
        total += tl.load(pos_embed + position[:, None] * pos_stride + full_n[None, :], mask=mask, other=0.0)
    mask = row_here[:, None] & n_here[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * y_stride + n[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "tokens"])
def _token_sums_kernel(
    grad, sums, grad_stride, sums_columns, slices, images, tokens,
    ALIGN: tl.constexpr, IMAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum ``COLUMNS`` columns of one token over the images of one slice, ``[IMAGES, COLUMNS]`` at a time.

    Grid: (tokens, column chunks, slices)

    grad: (images * tokens, columns)
    sums: (slices, tokens, sums_columns) float32, the result
    """
    token, index = tl.program_id(0), tl.program_id(2)
    s = slice_at(slices, index, ALIGN)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < s.rows
    total = tl.zeros((IMAGES, COLUMNS), tl.float32)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        here = image < images
        if slices.width_index is not None:
            here = here & (tl.load(slices.width_index + image, mask=here, other=-1) == index)
        row = image.to(tl.int64) * tokens + token
        mask = here[:, None] & n_here[None, :]
        total += tl.load(grad + row[:, None] * grad_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    place = (index * tokens + token) * sums_columns + n
    tl.store(sums + place, tl.sum(total, 0), mask=n < sums_columns)


class _Layout:
    """The checked arguments of forward and backward, and which of an image's tokens come from where."""

    def __init__(self, images, p: StemParameters, slices, width_index):
        check_activation("images", images)
        full, channels, self.patch_height, self.patch_width = p.weight.shape
        self.embedding = stem_product(tuple(slices), p.weight[:1].numel())
        if images.dim() != 4 or images.shape[1] != channels:
            raise RuntimeError(f"images: shape (B, {channels}, height, width) expected, {tuple(images.shape)} given")
        check_width_index(width_index, images, len(self.embedding.each))
        check_weight("weight", p.weight, images, self.embedding, (None, channels, self.patch_height, self.patch_width))
        check_vectors(images, full, p, "bias")
        for name in ("cls_token", "reg_token", "pos_embed"):
            if (token := getattr(p, name)) is not None:
                check_tensor(name, token, images, (1, None, full))
        self.grid = images.shape[2] // self.patch_height, images.shape[3] // self.patch_width
        self.cls_tokens = 0 if p.cls_token is None else p.cls_token.shape[1]
        self.prefix_tokens = self.cls_tokens + (0 if p.reg_token is None else p.reg_token.shape[1])
        tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        self.position_start = 0 if p.pos_embed is None else tokens - p.pos_embed.shape[1]
        # Positions belong to all tokens or to the patches, which come last.
        if self.position_start not in (0, self.prefix_tokens):
            expected = f"{tokens} or {tokens - self.prefix_tokens}"
            raise RuntimeError(f"pos_embed: {expected} positions expected, {p.pos_embed.shape[1]} given")
        self.batch = Batch(images.shape[0], tokens, width_index)
        self.patches = Patches._make((*images.stride(), self.grid[1], tokens, self.prefix_tokens))


def stem(images, p: StemParameters, slices, width_index):
    layout = _Layout(images, p, slices, width_index)
    batch, embedding = layout.batch, layout.embedding
    t = tiles("product", images, embedding.align, p.weight)
    y = batch.new(images, embedding.rows)
    column_tiles = triton.cdiv(embedding.rows, t.columns)
    strides = [0 if token is None else token.stride(1) for token in (p.cls_token, p.reg_token, p.pos_embed)]
    launch(
        _stem_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, t.rows) * column_tiles,), images,
        images, *p, y, p.weight.stride(0), *strides, y.stride(0),
        embedding.argument(width_index), layout.patches, batch.rows_per_group, column_tiles,
        layout.cls_tokens, layout.position_start,
        PATCH_HEIGHT=layout.patch_height, PATCH_WIDTH=layout.patch_width, ALIGN=embedding.align, PRECISION=precision(),
        ROWS=t.rows, COLUMNS=t.columns, K_STEP=t.k_step, tiles=t,
    )  # fmt: skip
    return y.view(batch.images, batch.tokens, embedding.rows)


def stem_backward(grad, images, p: StemParameters, slices, width_index, x_grad, buffers: StemParameters):
    layout = _Layout(images, p, slices, width_index)
    batch, embedding = layout.batch, layout.embedding
    check_buffers(images, p, buffers)
    grad = rows_like(images, "grad", grad, batch.images, batch.tokens, embedding.rows)
    add_weight_gradient(
        batch, grad, images, buffers.weight, embedding,
        patches=layout.patches, patch_size=(layout.patch_height, layout.patch_width),
    )  # fmt: skip
    if any(buffer is not None for buffer in buffers[1:]):
        _add_token_sums(layout, grad, buffers)
    if not x_grad:
        return images.new_empty(0)
    return _images_gradient(layout, product(batch, grad, p.weight, embedding, transposed=True), images)


def _add_token_sums(layout, grad, buffers: StemParameters):
    """Add the gradients of what every image reads: the tokens, the positions, and the bias of the patches."""
    batch, embedding = layout.batch, layout.embedding
    sums = grad.new_empty(len(embedding.each), batch.tokens, embedding.rows, dtype=torch.float32)
    launch(
        _token_sums_kernel, (batch.tokens, triton.cdiv(embedding.rows, CHUNK), len(embedding.each)), grad,
        grad, sums, grad.stride(0), embedding.rows, embedding.argument(batch.width_index), batch.images, batch.tokens,
        ALIGN=embedding.align, IMAGES=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    ranges = (
        (buffers.cls_token, 0, layout.cls_tokens),
        (buffers.reg_token, layout.cls_tokens, layout.prefix_tokens),
        (buffers.pos_embed, layout.position_start, batch.tokens),
    )
    for s, of_tokens in zip(embedding.each, sums, strict=True):
        channels, of_tokens = slice(s.first_row, s.first_row + s.rows), of_tokens[:, : s.rows]
        for buffer, start, stop in ranges:
            if buffer is not None:
                buffer[0, :, channels] += of_tokens[start:stop]
        if buffers.bias is not None:
            buffers.bias[channels] += of_tokens[layout.prefix_tokens :].sum(0)


def _images_gradient(layout, d_patches, images):
    """Put the gradients of the patches where their pixels are. Pixels beyond the last whole patch have none."""
    (down, across), height, width = layout.grid, layout.patch_height, layout.patch_width
    patches = d_patches.view(layout.batch.images, layout.batch.tokens, d_patches.shape[1])[:, layout.prefix_tokens :]
    pixels = patches.unflatten(2, (images.shape[1], height, width)).unflatten(1, (down, across))
    pixels = pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    d_images = torch.zeros_like(images, memory_format=torch.contiguous_format)
    d_images[:, :, : down * height, : across * width] = pixels
    return d_images
