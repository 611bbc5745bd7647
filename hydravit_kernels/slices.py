"""What one subnetwork reads of one layer: offsets and lengths, nothing else.

A slice is a few integers (and the attention scale). It names contiguous intervals of the full weights, so a kernel
needs only base pointers, lengths and strides, and a new nesting method is a new set of integers, not a new kernel.
Across the ops the integers travel as one flat ``SymInt[]``: one slice for the whole batch, or several, one after the
other, of which every image picks one (the ``subnet`` argument of the ops).

Sources of the methods: HydraViT (arXiv 2409.17978), Scala (arXiv 2412.04786), SKD (arXiv 2511.11683).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class EmbedSlice(NamedTuple):
    """The interval of the residual stream; all the stem needs to know."""

    embed_offset: int
    embed: int


class HeadSlice(NamedTuple):
    """The classifier: ``classes`` rows of ``head.weight`` (those of the width's own, if it has one), embed columns."""

    embed_offset: int
    embed: int
    class_offset: int
    classes: int


class AttentionSlice(NamedTuple):
    """One attention block of a subnetwork. All lengths in channels (rows or columns of the full weights).

    Head ``h`` uses rows ``[role_row + h * pitch, role_row + h * pitch + head_dim)`` of ``qkv.weight`` for the query and
    key roles, ``value_dim`` of them for the value role, and columns ``[proj_column + h * pitch, ... + value_dim)`` of
    ``proj.weight``. ``heads == 0`` skips the branch, its norm and its biases: the block is the identity.
    """

    embed_offset: int
    embed: int
    query_row: int
    key_row: int
    value_row: int
    proj_column: int
    heads: int
    head_dim: int
    value_dim: int
    pitch: int
    scale: float


class MlpSlice(NamedTuple):
    """One MLP block of a subnetwork: ``hidden`` rows of ``fc1``, columns of ``fc2``. ``hidden == 0`` skips it."""

    embed_offset: int
    embed: int
    hidden_offset: int
    hidden: int


def flatten(slices: Sequence[NamedTuple]) -> list[int]:
    """The integers of one or several slices in order, as the ops take them; the attention scale, last, is left out."""
    return [value for entry in slices for value in (entry[:-1] if isinstance(entry, AttentionSlice) else entry)]


def widest(slices: Sequence[NamedTuple]) -> int:
    """Channels of the residual stream that serves all of ``slices``; a narrower image leaves the rest zero."""
    width = slices[0].embed
    for entry in slices[1:]:
        width = max(width, entry.embed)
    return width
