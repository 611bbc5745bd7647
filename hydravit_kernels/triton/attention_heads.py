"""Softmax attention of heads that lie side by side, in tiles (FlashAttention-2, arXiv 2307.08691).

``qkv (B * N, width)`` has an image's queries, keys and values in the front of its rows, head by head; ``attended
(B * Nq, width)`` its results for the first ``Nq`` tokens, the queries. One program takes one tile of one head of one
image, and loops over the other axis, so nothing is added by two programs and the bits are the same every time. Scores
are never stored: backward computes them again from the saved ``logsumexp (B, heads * N)`` of the scaled scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import Batch, dot, launch, precision, tiles
from hydravit_kernels.triton.parts import AttentionParts, part_of, scale_table

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


class _Head(NamedTuple):
    """One head of one image: where it lies in rows of ``qkv`` and of ``attended``, and among the statistics."""

    exists: bool  # in the image's slice
    tile: int  # of the image's tokens that this program takes
    first_row: int
    first_query: int
    first_statistic: int
    query_column: int
    key_column: int
    value_column: int
    attended_column: int
    head_dim: int
    value_dim: int
    scale: float  # of the scores


@triton.jit
def _head(slices, scale, scales, tokens, queries, logsumexp_stride, tiled, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """This program's; the tiles of a head follow each other: they share what they loop over."""
    tiles_per_image = tl.cdiv(tiled, ROWS)
    image, index = (tl.program_id(0) // tiles_per_image).to(tl.int64), tl.program_id(1)
    part = part_of(slices, image, ALIGN)
    if slices.subnet is not None:
        scale = tl.load(scales + tl.load(slices.subnet + image))
    column, value_column = index * part.head_dim, index * part.value_dim
    return _Head(
        column < part.query_length,
        tl.program_id(0) % tiles_per_image,
        image * tokens,
        image * queries,
        image * logsumexp_stride + index * queries,
        column,
        part.query_length + column,
        2 * part.query_length + value_column,
        value_column,
        part.head_dim,
        part.value_dim,
        scale,
    )


@triton.jit
def _rows(base, first_row, i, stride, column, channel, tokens, channels):
    """``[tokens, channels]`` of a head whose first column is ``column``; zero outside."""
    place = (first_row + i)[:, None] * stride + column + channel[None, :]
    return tl.load(base + place, mask=(i < tokens)[:, None] & (channel < channels)[None, :], other=0.0)


# Grid: (images * tiles of queries, heads).
@triton.jit(do_not_specialize=["logsumexp_stride", "tokens", "queries"])
def _forward_kernel(
    qkv, attended, logsumexp, qkv_stride, attended_stride, logsumexp_stride, slices, scale, scales, tokens, queries,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    head = _head(slices, scale, scales, tokens, queries, logsumexp_stride, queries, ALIGN, QUERIES)
    if not head.exists:
        return
    i = head.tile * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, HEAD)
    e = tl.arange(0, VALUE)

    q = _rows(qkv, head.first_row, i, qkv_stride, head.query_column, d, queries, head.head_dim)  # [QUERIES, HEAD]
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, VALUE), tl.float32)
    for start in range(0, tokens, KEYS):
        j = start + tl.arange(0, KEYS)
        k = _rows(qkv, head.first_row, j, qkv_stride, head.key_column, d, tokens, head.head_dim)
        score = dot(q, tl.trans(k), None, PRECISION) * (head.scale * _LOG2_E)
        score = tl.where((j < tokens)[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp2(largest - new_largest)
        p = tl.exp2(score - new_largest[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        v = _rows(qkv, head.first_row, j, qkv_stride, head.value_column, e, tokens, head.value_dim)
        result = dot(p.to(v.dtype), v, result * shrink[:, None], PRECISION)
        largest = new_largest

    result /= weight[:, None]
    here = i < queries
    place = (head.first_query + i)[:, None] * attended_stride + head.attended_column + e[None, :]
    mask = here[:, None] & (e < head.value_dim)[None, :]
    tl.store(attended + place, result.to(attended.dtype.element_ty), mask=mask)
    if logsumexp is not None:
        tl.store(logsumexp + head.first_statistic + i, largest * _LN_2 + tl.log(weight), mask=here)


# Grid: (images * tiles of queries, heads). Also leaves each query's sum of gradient times result for the other kernel.
@triton.jit(do_not_specialize=["logsumexp_stride", "tokens", "queries"])
def _query_gradient_kernel(
    qkv, attended, logsumexp, grad, delta, d_qkv, qkv_stride, attended_stride, logsumexp_stride, grad_stride,
    slices, scale, scales, tokens, queries,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    head = _head(slices, scale, scales, tokens, queries, logsumexp_stride, queries, ALIGN, QUERIES)
    if not head.exists:
        return
    i = head.tile * QUERIES + tl.arange(0, QUERIES)
    here = i < queries
    d = tl.arange(0, HEAD)
    e = tl.arange(0, VALUE)

    q = _rows(qkv, head.first_row, i, qkv_stride, head.query_column, d, queries, head.head_dim)  # [QUERIES, HEAD]
    g = _rows(grad, head.first_query, i, grad_stride, head.attended_column, e, queries, head.value_dim)
    o = _rows(attended, head.first_query, i, attended_stride, head.attended_column, e, queries, head.value_dim)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    statistics = head.first_statistic + i
    tl.store(delta + statistics, row_delta, mask=here)
    shift = tl.load(logsumexp + statistics, mask=here, other=0.0) * _LOG2_E

    result = tl.zeros((QUERIES, HEAD), tl.float32)
    for start in range(0, tokens, KEYS):
        j = start + tl.arange(0, KEYS)
        k = _rows(qkv, head.first_row, j, qkv_stride, head.key_column, d, tokens, head.head_dim)
        v = _rows(qkv, head.first_row, j, qkv_stride, head.value_column, e, tokens, head.value_dim)
        score = dot(q, tl.trans(k), None, PRECISION) * (head.scale * _LOG2_E)
        p = tl.where((j < tokens)[None, :], tl.exp2(score - shift[:, None]), 0.0)
        dp = dot(g, tl.trans(v), None, PRECISION)
        d_score = p * (dp - row_delta[:, None])
        result = dot(d_score.to(k.dtype), k, result, PRECISION)
    place = (head.first_row + i)[:, None] * qkv_stride + head.query_column + d[None, :]
    mask = here[:, None] & (d < head.head_dim)[None, :]
    tl.store(d_qkv + place, (result * head.scale).to(d_qkv.dtype.element_ty), mask=mask)


# Grid: (images * tiles of keys, heads).
@triton.jit(do_not_specialize=["logsumexp_stride", "tokens", "queries"])
def _key_value_gradient_kernel(
    qkv, logsumexp, grad, delta, d_qkv, qkv_stride, logsumexp_stride, grad_stride,
    slices, scale, scales, tokens, queries,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    head = _head(slices, scale, scales, tokens, queries, logsumexp_stride, tokens, ALIGN, KEYS)
    if not head.exists:
        return
    j = head.tile * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    e = tl.arange(0, VALUE)

    k = _rows(qkv, head.first_row, j, qkv_stride, head.key_column, d, tokens, head.head_dim)  # [KEYS, HEAD]
    v = _rows(qkv, head.first_row, j, qkv_stride, head.value_column, e, tokens, head.value_dim)
    dk = tl.zeros((KEYS, HEAD), tl.float32)
    dv = tl.zeros((KEYS, VALUE), tl.float32)
    for start in range(0, queries, QUERIES):
        i = start + tl.arange(0, QUERIES)
        here = i < queries
        q = _rows(qkv, head.first_row, i, qkv_stride, head.query_column, d, queries, head.head_dim)
        g = _rows(grad, head.first_query, i, grad_stride, head.attended_column, e, queries, head.value_dim)
        statistics = head.first_statistic + i
        shift = tl.load(logsumexp + statistics, mask=here, other=0.0) * _LOG2_E
        row_delta = tl.load(delta + statistics, mask=here, other=0.0)
        score = dot(k, tl.trans(q), None, PRECISION) * (head.scale * _LOG2_E)  # [KEYS, QUERIES]
        p = tl.where(here[None, :], tl.exp2(score - shift[None, :]), 0.0)
        dv = dot(p.to(g.dtype), g, dv, PRECISION)
        dp = dot(v, tl.trans(g), None, PRECISION)
        d_score = p * (dp - row_delta[None, :])
        dk = dot(d_score.to(q.dtype), q, dk, PRECISION)
    row = (head.first_row + j)[:, None] * qkv_stride
    here = (j < tokens)[:, None]
    place = row + head.key_column + d[None, :]
    tl.store(d_qkv + place, (dk * head.scale).to(d_qkv.dtype.element_ty), mask=here & (d < head.head_dim)[None, :])
    place = row + head.value_column + e[None, :]
    tl.store(d_qkv + place, dv.to(d_qkv.dtype.element_ty), mask=here & (e < head.value_dim)[None, :])


def _constants(parts: AttentionParts) -> dict:
    """Blocks as wide as the widest head; a product takes 16 channels at least."""
    head, value = (max(getattr(part, name) for part in parts.qkv.parts) for name in ("head_dim", "value_dim"))
    blocks = {"HEAD": max(16, triton.next_power_of_2(head)), "VALUE": max(16, triton.next_power_of_2(value))}
    return {"ALIGN": parts.qkv.align, "PRECISION": precision(), **blocks}


def _slices(batch: Batch, parts: AttentionParts, scales: Sequence[float], device: torch.device) -> tuple:
    """The slices, and the scale: as a number, or as one per slice."""
    table = None if batch.subnet is None else scale_table(tuple(scales), device)
    return parts.qkv.slices(batch.subnet), scales[0], table


def attention_heads(
    batch: Batch, queries: Batch, qkv: Tensor, parts: AttentionParts, scales: Sequence[float], logsumexp: Tensor | None
) -> Tensor:
    """``attended``, rows of ``queries``, from ``qkv``, rows of ``batch``; fills ``logsumexp`` if given."""
    t, attended = tiles("attention", qkv, parts.qkv.align), queries.new(qkv, parts.proj.columns)
    launch(
        _forward_kernel, (batch.images * triton.cdiv(queries.tokens, t.rows), parts.heads), qkv,
        qkv, attended, logsumexp, qkv.stride(0), attended.stride(0), parts.heads * batch.tokens,
        *_slices(batch, parts, scales, qkv.device), batch.tokens, queries.tokens,
        **_constants(parts), QUERIES=t.rows, KEYS=t.columns, tiles=t,
    )  # fmt: skip
    return attended


def attention_heads_backward(
    batch: Batch,
    queries: Batch,
    grad: Tensor,
    qkv: Tensor,
    attended: Tensor,
    logsumexp: Tensor,
    parts: AttentionParts,
    scales: Sequence[float],
) -> Tensor:
    """Gradient of ``qkv`` from the gradient ``grad`` of ``attended``."""
    t, heads = tiles("attention_backward", qkv, parts.qkv.align), parts.heads
    delta, d_qkv = torch.empty_like(logsumexp), batch.new(qkv, qkv.shape[1])
    if queries.tokens < batch.tokens:
        d_qkv.zero_()  # nobody writes the gradients of the other queries
    common = (*_slices(batch, parts, scales, qkv.device), batch.tokens, queries.tokens)
    options = {**_constants(parts), "QUERIES": t.rows, "KEYS": t.columns, "tiles": t}
    launch(
        _query_gradient_kernel, (batch.images * triton.cdiv(queries.tokens, t.rows), heads), qkv,
        qkv, attended, logsumexp, grad, delta, d_qkv,
        qkv.stride(0), attended.stride(0), heads * batch.tokens, grad.stride(0), *common, **options,
    )  # fmt: skip
    launch(
        _key_value_gradient_kernel, (batch.images * triton.cdiv(batch.tokens, t.columns), heads), qkv,
        qkv, logsumexp, grad, delta, d_qkv,
        qkv.stride(0), heads * batch.tokens, grad.stride(0), *common, **options,
    )  # fmt: skip
    return d_qkv
