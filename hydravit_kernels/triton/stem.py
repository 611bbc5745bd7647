"""Stem: patch embedding, class and register tokens, position embedding; arguments as in ``ops.py``.

One product whose rows are the tokens: it gathers the patches from the images while it reads them, and its tiles get
bias or token and the position before they are stored. The rows of the class and register tokens multiply zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hydravit_kernels.triton.checks import (
    as_rows,
    check_activation,
    check_buffers,
    check_subnet,
    check_tensor,
    check_vectors,
    check_weight,
)
from hydravit_kernels.triton.gradients import Patches, add_weight_gradient, patch_values
from hydravit_kernels.triton.launch import CHUNK, ROWS, Batch, dot, launch, precision, tiles
from hydravit_kernels.triton.parts import part_at, part_of, stem_parts
from hydravit_kernels.triton.product import product


# Grid: (groups * tiles of rows * tiles of columns,).
@triton.jit(do_not_specialize=["rows_per_group", "column_tiles", "cls_tokens", "position_start"])
def _stem_kernel(
    images, weight, bias, cls_token, reg_token, pos_embed, y,
    weight_stride, cls_stride, reg_stride, pos_stride, y_stride,
    slices, patches, rows_per_group, column_tiles, cls_tokens, position_start,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    tiles_per_group = tl.cdiv(rows_per_group, ROWS)
    group = row_tile // tiles_per_group
    part = part_of(slices, group, ALIGN)
    if column_tile * COLUMNS >= part.rows:
        return
    i = row_tile % tiles_per_group * ROWS + tl.arange(0, ROWS)
    row = group * rows_per_group + i
    row_here = i < rows_per_group
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < part.rows
    n_place = part.row + n

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, part.columns, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_here = k < part.columns
        mask = row_here[:, None] & k_here[None, :]
        a = patch_values(images, row, k, mask, patches, PATCH_HEIGHT, PATCH_WIDTH)  # [ROWS, DEPTH]
        place = k[:, None] + n_place[None, :] * weight_stride
        b = tl.load(weight + place, mask=k_here[:, None] & n_here[None, :], other=0.0)  # [DEPTH, COLUMNS]
        total = dot(a, b.to(a.dtype), total, PRECISION)

    token = row % patches.tokens
    if bias is not None:
        value = tl.load(bias + n_place, mask=n_here, other=0.0).to(tl.float32)
        total += tl.where((token >= patches.prefix)[:, None], value[None, :], 0.0)
    if cls_token is not None:
        mask = (row_here & (token < cls_tokens))[:, None] & n_here[None, :]
        total += tl.load(cls_token + token[:, None] * cls_stride + n_place[None, :], mask=mask, other=0.0)
    if reg_token is not None:
        register = token - cls_tokens
        mask = (row_here & (register >= 0) & (token < patches.prefix))[:, None] & n_here[None, :]
        total += tl.load(reg_token + register[:, None] * reg_stride + n_place[None, :], mask=mask, other=0.0)
    if pos_embed is not None:
        position = token - position_start
        mask = (row_here & (position >= 0))[:, None] & n_here[None, :]
        total += tl.load(pos_embed + position[:, None] * pos_stride + n_place[None, :], mask=mask, other=0.0)
    mask = row_here[:, None] & n_here[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * y_stride + n[None, :], total.to(y.dtype.element_ty), mask=mask)


# Grid: (tokens, chunks of columns, slices).
@triton.jit(do_not_specialize=["images", "tokens"])
def _token_sums_kernel(
    grad, sums, grad_stride, sums_columns, slices, images, tokens,
    ALIGN: tl.constexpr, IMAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, index = tl.program_id(0), tl.program_id(2)
    part = part_at(slices, index, ALIGN)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_here = n < part.rows
    total = tl.zeros((IMAGES, COLUMNS), tl.float32)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        here = image < images
        if slices.subnet is not None:
            here = here & (tl.load(slices.subnet + image, mask=here, other=-1) == index)
        row = image.to(tl.int64) * tokens + token
        mask = here[:, None] & n_here[None, :]
        total += tl.load(grad + row[:, None] * grad_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    place = (index * tokens + token) * sums_columns + n
    tl.store(sums + place, tl.sum(total, 0), mask=n < sums_columns)


class _Layout:
    """Where an image's tokens come from."""

    def __init__(self, images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet):
        check_activation("images", images)
        full, channels, self.patch_height, self.patch_width = weight.shape
        self.parts = stem_parts(tuple(slices), weight[:1].numel())
        if images.dim() != 4 or images.shape[1] != channels:
            raise RuntimeError(f"images: shape (B, {channels}, height, width) expected, {tuple(images.shape)} given")
        check_subnet(subnet, images, len(self.parts.parts))
        check_weight("weight", weight, images, self.parts, (None, channels, self.patch_height, self.patch_width))
        check_vectors(images, full, bias=bias)
        for name, token in (("cls_token", cls_token), ("reg_token", reg_token), ("pos_embed", pos_embed)):
            if token is not None:
                check_tensor(name, token, images, (1, None, full))
        self.grid = images.shape[2] // self.patch_height, images.shape[3] // self.patch_width
        self.cls_tokens = 0 if cls_token is None else cls_token.shape[1]
        self.prefix = self.cls_tokens + (0 if reg_token is None else reg_token.shape[1])
        tokens = self.prefix + self.grid[0] * self.grid[1]
        # The first token that has a position.
        self.position_start = 0 if pos_embed is None else tokens - pos_embed.shape[1]
        if self.position_start not in (0, self.prefix):
            expected = f"{tokens} or {tokens - self.prefix}"
            raise RuntimeError(f"pos_embed: {expected} positions expected, {pos_embed.shape[1]} given")
        self.batch = Batch(images.shape[0], tokens, subnet)
        self.patches = Patches(*images.stride(), self.grid[1], tokens, self.prefix)


def stem(images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet):
    layout = _Layout(images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet)
    batch, parts = layout.batch, layout.parts
    t = tiles("product", images, parts.align, weight)
    y = batch.new(images, parts.rows)
    column_tiles = triton.cdiv(parts.rows, t.columns)
    strides = [0 if token is None else token.stride(1) for token in (cls_token, reg_token, pos_embed)]
    launch(
        _stem_kernel, (batch.groups * triton.cdiv(batch.rows_per_group, t.rows) * column_tiles,), images,
        images, weight, bias, cls_token, reg_token, pos_embed, y,
        weight.stride(0), *strides, y.stride(0),
        parts.slices(subnet), layout.patches, batch.rows_per_group, column_tiles,
        layout.cls_tokens, layout.position_start,
        PATCH_HEIGHT=layout.patch_height, PATCH_WIDTH=layout.patch_width, ALIGN=parts.align, PRECISION=precision(),
        ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, tiles=t,
    )  # fmt: skip
    return y.view(batch.images, batch.tokens, parts.rows)


def stem_backward(
    grad, images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet, x_grad,
    grad_weight, grad_bias, grad_cls_token, grad_reg_token, grad_pos_embed,
):  # fmt: skip
    layout = _Layout(images, weight, bias, cls_token, reg_token, pos_embed, slices, subnet)
    batch, parts = layout.batch, layout.parts
    check_buffers(
        images, weight=(weight, grad_weight), bias=(bias, grad_bias), cls_token=(cls_token, grad_cls_token),
        reg_token=(reg_token, grad_reg_token), pos_embed=(pos_embed, grad_pos_embed),
    )  # fmt: skip
    grad = as_rows("grad", grad, images, batch.images, batch.tokens, parts.rows)
    add_weight_gradient(
        batch, grad, images, grad_weight, parts,
        patches=layout.patches, patch_size=(layout.patch_height, layout.patch_width),
    )  # fmt: skip
    if any(b is not None for b in (grad_bias, grad_cls_token, grad_reg_token, grad_pos_embed)):
        _add_token_sums(layout, grad, grad_bias, grad_cls_token, grad_reg_token, grad_pos_embed)
    if not x_grad:
        return images.new_empty(0)
    return _images_gradient(layout, product(batch, grad, weight, parts, transposed=True), images)


def _add_token_sums(layout, grad, grad_bias, grad_cls_token, grad_reg_token, grad_pos_embed):
    """What every image adds to the same place: the tokens themselves, their positions, the patches' bias."""
    batch, parts = layout.batch, layout.parts
    sums = grad.new_empty(len(parts.parts), batch.tokens, parts.rows, dtype=torch.float32)
    launch(
        _token_sums_kernel, (batch.tokens, triton.cdiv(parts.rows, CHUNK), len(parts.parts)), grad,
        grad, sums, grad.stride(0), parts.rows, parts.slices(batch.subnet), batch.images, batch.tokens,
        ALIGN=parts.align, IMAGES=ROWS, COLUMNS=CHUNK,
    )  # fmt: skip
    for part, of_tokens in zip(parts.parts, sums, strict=True):
        channels, of_tokens = slice(part.row, part.row + part.rows), of_tokens[:, : part.rows]
        ranges = (
            (grad_cls_token, 0, layout.cls_tokens),
            (grad_reg_token, layout.cls_tokens, layout.prefix),
            (grad_pos_embed, layout.position_start, batch.tokens),
        )
        for buffer, first, last in ranges:
            if buffer is not None:
                buffer[0, :, channels] += of_tokens[first:last]
        if grad_bias is not None:
            grad_bias[channels] += of_tokens[layout.prefix :].sum(0)


def _images_gradient(layout, d_patches, images):
    """Every pixel is in one patch, or beyond the last one."""
    (down, across), height, width = layout.grid, layout.patch_height, layout.patch_width
    patches = d_patches.view(layout.batch.images, layout.batch.tokens, d_patches.shape[1])[:, layout.prefix :]
    pixels = patches.unflatten(2, (images.shape[1], height, width)).unflatten(1, (down, across))
    pixels = pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    d_images = torch.zeros_like(images, memory_format=torch.contiguous_format)
    d_images[:, :, : down * height, : across * width] = pixels
    return d_images
