"""Softmax attention in tiles, forward and backward (FlashAttention-2, arXiv 2307.08691).

A row of ``qkv (B * N, columns)`` holds a token's queries, keys and values, Q | K | V, each head after head from its
first column on. A row of ``attended (B * Nq, columns)`` holds the heads' results for one of the first ``Nq`` tokens,
which are the queries. Scores are never stored. Backward computes them again, with the log-sum-exp of each query's
scaled scores that forward leaves in ``logsumexp``.

One program takes one tile of one head of one image and loops over the other axis. No two programs add to the same
place, so the bits are the same every time.

The arguments that all kernels share:

    qkv, d_qkv          ``(B * N, columns)``, both with rows ``qkv_stride`` apart
    attended, grad      ``(B * Nq, columns)``, the result of forward and its gradient
    logsumexp, delta    ``(B, heads * N)`` float32, of which an image uses ``heads * Nq``; delta is a query's sum of
                        ``grad * attended``
    scale, scales       the scale of the scores: one number, or with a slice per image one per slice on the device
    tokens, queries     ``N`` and ``Nq``
    QUERIES, KEYS       tile sizes
    HEAD, VALUE         powers of two that hold every slice's head_dim and value_dim
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydravit_kernels.triton.launch import Batch, dot, launch, precision, tiles
from hydravit_kernels.triton.slices import AttentionProducts, scale_table, slice_of

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


class _Head(NamedTuple):
    """The head of one image that a program works on.

    It begins at row ``qkv_row`` of ``qkv`` and ``attended_row`` of ``attended``, and at the named columns. Its queries
    begin at element ``statistic`` of ``logsumexp`` and ``delta``.
    """

    exists: bool  # a narrow image has fewer heads than the grid
    tile: int  # of the image's tokens, the index of the tile that the program takes
    qkv_row: int
    attended_row: int
    statistic: int
    query_column: int
    key_column: int
    value_column: int
    attended_column: int
    head_dim: int
    value_dim: int
    scale: float


@triton.jit
def _head(slices, scale, scales, tokens, queries, logsumexp_stride, tiled, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """Find the program's head, of which ``tiled`` tokens are cut into tiles of ``ROWS``.

    The tiles of a head follow each other in the grid, because they loop over the same rows.
    """
    tiles_per_image = tl.cdiv(tiled, ROWS)
    image, index = (tl.program_id(0) // tiles_per_image).to(tl.int64), tl.program_id(1)
    s = slice_of(slices, image, ALIGN)
    if slices.width_index is not None:
        scale = tl.load(scales + tl.load(slices.width_index + image))
    column, value_column = index * s.head_dim, index * s.value_dim
    return _Head(
        column < s.query_length,
        tl.program_id(0) % tiles_per_image,
        image * tokens,
        image * queries,
        image * logsumexp_stride + index * queries,
        column,
        s.query_length + column,
        2 * s.query_length + value_column,
        value_column,
        s.head_dim,
        s.value_dim,
        scale,
    )


@triton.jit
def _load(base, first_row, i, stride, first_column, d, rows, columns):
    """Rows ``i`` and columns ``d`` of a head: a tile ``[i, d]``, zero beyond its ``rows`` and ``columns``."""
    place = (first_row + i)[:, None] * stride + first_column + d[None, :]
    return tl.load(base + place, mask=(i < rows)[:, None] & (d < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["logsumexp_stride", "tokens", "queries"])
def _forward_kernel(
    qkv, attended, logsumexp, qkv_stride, attended_stride, logsumexp_stride, slices, scale, scales, tokens, queries,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries to all keys; store ``attended``, and ``logsumexp`` unless it is None.

    Grid: (images * query tiles, heads). Tiles: scores ``[QUERIES, KEYS]``, result ``[QUERIES, VALUE]``.
    """
    head = _head(slices, scale, scales, tokens, queries, logsumexp_stride, queries, ALIGN, QUERIES)
    if not head.exists:
        return
    i = head.tile * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, HEAD)
    e = tl.arange(0, VALUE)

    q = _load(qkv, head.qkv_row, i, qkv_stride, head.query_column, d, queries, head.head_dim)  # [QUERIES, HEAD]
    # The running maximum and sum of a query's softmax. Scores are in base 2, as exp2 is what the hardware computes.
    row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, VALUE), tl.float32)
    for start in range(0, tokens, KEYS):
        j = start + tl.arange(0, KEYS)
        k = _load(qkv, head.qkv_row, j, qkv_stride, head.key_column, d, tokens, head.head_dim)
        score = dot(q, tl.trans(k), None, PRECISION) * (head.scale * _LOG2_E)
        score = tl.where((j < tokens)[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        rescale = tl.exp2(row_max - new_max)
        p = tl.exp2(score - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _load(qkv, head.qkv_row, j, qkv_stride, head.value_column, e, tokens, head.value_dim)
        result = dot(p.to(v.dtype), v, result * rescale[:, None], PRECISION)
        row_max = new_max

    result /= row_sum[:, None]
    here = i < queries
    place = (head.attended_row + i)[:, None] * attended_stride + head.attended_column + e[None, :]
    mask = here[:, None] & (e < head.value_dim)[None, :]
    tl.store(attended + place, result.to(attended.dtype.element_ty), mask=mask)
    if logsumexp is not None:
        tl.store(logsumexp + head.statistic + i, row_max * _LN_2 + tl.log(row_sum), mask=here)


@triton.jit(do_not_specialize=["logsumexp_stride", "tokens", "queries"])
def _query_gradient_kernel(
    qkv, attended, logsumexp, grad, delta, d_qkv, qkv_stride, attended_stride, logsumexp_stride, grad_stride,
    slices, scale, scales, tokens, queries,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Compute the queries' part of ``d_qkv`` for one tile, and their ``delta`` for the kernel of keys and values.

    Grid: (images * query tiles, heads). Tiles: scores ``[QUERIES, KEYS]``, result ``[QUERIES, HEAD]``.
    """
    head = _head(slices, scale, scales, tokens, queries, logsumexp_stride, queries, ALIGN, QUERIES)
    if not head.exists:
        return
    i = head.tile * QUERIES + tl.arange(0, QUERIES)
    here = i < queries
    d = tl.arange(0, HEAD)
    e = tl.arange(0, VALUE)

    q = _load(qkv, head.qkv_row, i, qkv_stride, head.query_column, d, queries, head.head_dim)  # [QUERIES, HEAD]
    g = _load(grad, head.attended_row, i, grad_stride, head.attended_column, e, queries, head.value_dim)
    o = _load(attended, head.attended_row, i, attended_stride, head.attended_column, e, queries, head.value_dim)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    statistics = head.statistic + i
    tl.store(delta + statistics, row_delta, mask=here)
    row_logsumexp = tl.load(logsumexp + statistics, mask=here, other=0.0) * _LOG2_E

    result = tl.zeros((QUERIES, HEAD), tl.float32)
    for start in range(0, tokens, KEYS):
        j = start + tl.arange(0, KEYS)
        k = _load(qkv, head.qkv_row, j, qkv_stride, head.key_column, d, tokens, head.head_dim)
        v = _load(qkv, head.qkv_row, j, qkv_stride, head.value_column, e, tokens, head.value_dim)
        score = dot(q, tl.trans(k), None, PRECISION) * (head.scale * _LOG2_E)
        p = tl.where((j < tokens)[None, :], tl.exp2(score - row_logsumexp[:, None]), 0.0)
        dp = dot(g, tl.trans(v), None, PRECISION)
        d_score = p * (dp - row_delta[:, None])
        result = dot(d_score.to(k.dtype), k, result, PRECISION)
    place = (head.qkv_row + i)[:, None] * qkv_stride + head.query_column + d[None, :]
    mask = here[:, None] & (d < head.head_dim)[None, :]
    tl.store(d_qkv + place, (result * head.scale).to(d_qkv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["logsumexp_stride", "tokens", "queries"])
def _key_value_gradient_kernel(
    qkv, logsumexp, grad, delta, d_qkv, qkv_stride, logsumexp_stride, grad_stride,
    slices, scale, scales, tokens, queries,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Compute the keys' and values' part of ``d_qkv`` for one tile of keys.

    Grid: (images * key tiles, heads). Tiles: scores ``[KEYS, QUERIES]``, results ``[KEYS, HEAD]``, ``[KEYS, VALUE]``.
    """
    head = _head(slices, scale, scales, tokens, queries, logsumexp_stride, tokens, ALIGN, KEYS)
    if not head.exists:
        return
    j = head.tile * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    e = tl.arange(0, VALUE)

    k = _load(qkv, head.qkv_row, j, qkv_stride, head.key_column, d, tokens, head.head_dim)  # [KEYS, HEAD]
    v = _load(qkv, head.qkv_row, j, qkv_stride, head.value_column, e, tokens, head.value_dim)
    dk = tl.zeros((KEYS, HEAD), tl.float32)
    dv = tl.zeros((KEYS, VALUE), tl.float32)
    for start in range(0, queries, QUERIES):
        i = start + tl.arange(0, QUERIES)
        here = i < queries
        q = _load(qkv, head.qkv_row, i, qkv_stride, head.query_column, d, queries, head.head_dim)
        g = _load(grad, head.attended_row, i, grad_stride, head.attended_column, e, queries, head.value_dim)
        statistics = head.statistic + i
        row_logsumexp = tl.load(logsumexp + statistics, mask=here, other=0.0) * _LOG2_E
        row_delta = tl.load(delta + statistics, mask=here, other=0.0)
        score = dot(k, tl.trans(q), None, PRECISION) * (head.scale * _LOG2_E)  # [KEYS, QUERIES]
        p = tl.where(here[None, :], tl.exp2(score - row_logsumexp[None, :]), 0.0)
        dv = dot(p.to(g.dtype), g, dv, PRECISION)
        dp = dot(v, tl.trans(g), None, PRECISION)
        d_score = p * (dp - row_delta[None, :])
        dk = dot(d_score.to(q.dtype), q, dk, PRECISION)
    row = (head.qkv_row + j)[:, None] * qkv_stride
    here = (j < tokens)[:, None]
    place = row + head.key_column + d[None, :]
    tl.store(d_qkv + place, (dk * head.scale).to(d_qkv.dtype.element_ty), mask=here & (d < head.head_dim)[None, :])
    place = row + head.value_column + e[None, :]
    tl.store(d_qkv + place, dv.to(d_qkv.dtype.element_ty), mask=here & (e < head.value_dim)[None, :])


def _constants(products: AttentionProducts) -> dict:
    """What a kernel is compiled for, its tile apart. HEAD and VALUE are at least 16, as ``tl.dot`` demands."""
    each = products.qkv.each
    return {
        "ALIGN": products.qkv.align,
        "PRECISION": precision(),
        "HEAD": max(16, triton.next_power_of_2(max(s.head_dim for s in each))),
        "VALUE": max(16, triton.next_power_of_2(max(s.value_dim for s in each))),
    }


def _slices(batch: Batch, products: AttentionProducts, scales: Sequence[float], device: torch.device) -> tuple:
    """The arguments ``slices``, ``scale`` and ``scales``."""
    table = None if batch.width_index is None else scale_table(tuple(scales), device)
    return products.qkv.argument(batch.width_index), scales[0], table


def attention_heads(
    batch: Batch,
    queries: Batch,
    qkv: Tensor,
    products: AttentionProducts,
    scales: Sequence[float],
    logsumexp: Tensor | None,
) -> Tensor:
    """Compute ``attended``, whose rows are those of ``queries``, from ``qkv``, whose rows are those of ``batch``.

    It fills ``logsumexp`` if that is given.
    """
    t, attended = tiles("attention", qkv, products.qkv.align), queries.new(qkv, products.proj.columns)
    launch(
        _forward_kernel, (batch.images * triton.cdiv(queries.tokens, t.rows), products.heads), qkv,
        qkv, attended, logsumexp, qkv.stride(0), attended.stride(0), products.heads * batch.tokens,
        *_slices(batch, products, scales, qkv.device), batch.tokens, queries.tokens,
        **_constants(products), QUERIES=t.rows, KEYS=t.columns, tiles=t,
    )  # fmt: skip
    return attended


def attention_heads_backward(
    batch: Batch,
    queries: Batch,
    grad: Tensor,
    qkv: Tensor,
    attended: Tensor,
    logsumexp: Tensor,
    products: AttentionProducts,
    scales: Sequence[float],
) -> Tensor:
    """The gradient of ``qkv`` from ``grad``, that of ``attended``."""
    t, heads = tiles("attention_backward", qkv, products.qkv.align), products.heads
    delta, d_qkv = torch.empty_like(logsumexp), batch.new(qkv, qkv.shape[1])
    if queries.tokens < batch.tokens:
        d_qkv.zero_()  # no kernel writes the query gradients of the other tokens
    common = (*_slices(batch, products, scales, qkv.device), batch.tokens, queries.tokens)
    options = {**_constants(products), "QUERIES": t.rows, "KEYS": t.columns, "tiles": t}
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
