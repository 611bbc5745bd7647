"""Regions: the entries of the parameters that take part in the same optimizer steps.

A region holds the entries that the same subnetworks read, in all layers, so that all its entries have taken part in the
same steps. A new subnetwork splits the regions. If widths are nested, each adds one region: the entries that the next
narrower width does not read. Every entry of every parameter is in exactly one region.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hydravit.config import HydraViTConfig
from hydravit.geometry import parameter_slices
from hydravit_kernels import Subnetwork, rectangles_of

# A part of a parameter: an interval ``(start, length)`` per axis.
Box = tuple[tuple[int, int], ...]

# How many tables of rectangles are kept.
_CACHED_TABLES = 256


@dataclass(eq=False)
class Region:
    """Entries that have taken part in the same steps.

    Attributes:
        boxes: disjoint boxes per parameter name.
        age: the number of steps that the entries took part in, which bias correction counts.
        readers: the subnetworks, of those seen so far, that read the entries.
    """

    boxes: dict[str, list[Box]]
    age: int = 0
    readers: set[Subnetwork] = field(default_factory=set)


class Regions:
    """All regions of a model's parameters.

    Args:
        parameters: by name; only their shapes and strides count.
        groups: the index of each parameter's group, by the parameter's name.
        found: disjoint regions that cover the parameters.
    """

    def __init__(
        self, config: HydraViTConfig, parameters: Mapping[str, Tensor], groups: Mapping[str, int], found: list[Region]
    ):
        self.all = found
        self._config, self._parameters, self._groups = config, parameters, groups
        self._known: set[Subnetwork] = set()
        self._table = functools.lru_cache(_CACHED_TABLES)(self._make_table)

    def read_by(self, subnetworks: frozenset[Subnetwork]) -> dict[int, tuple[Region, ...]]:
        """Return the regions that at least one of these subnetworks reads, by their age."""
        for subnetwork in subnetworks - self._known:
            self._split(subnetwork)
        by_age: dict[int, tuple[Region, ...]] = {}
        for region in self.all:
            if not region.readers.isdisjoint(subnetworks):
                by_age[region.age] = (*by_age.get(region.age, ()), region)
        return by_age

    def table(self, sets: Iterable[tuple[Region, ...]]) -> Tensor:
        """Return the rectangles of sets of regions, for ``kernels.adamw``.

        Each set has one step per parameter group: the step of set ``i`` has index ``group * number of sets + i``. Equal
        sets get the same tensor again, because backends keep what they derive from it.
        """
        return self._table(tuple(sets))

    def _make_table(self, sets: tuple[tuple[Region, ...], ...]) -> Tensor:
        rows = []
        # The outer loop is over parameters, because the regions of one parameter lie side by side in memory.
        for index, (name, parameter) in enumerate(self._parameters.items()):
            for i, regions in enumerate(sets):
                step = self._groups[name] * len(sets) + i
                for box in join(box for region in regions for box in region.boxes.get(name, ())):
                    rows += [(index, step, *rectangle) for rectangle in rectangles_of(parameter, box)]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 6)

    def _split(self, subnetwork: Subnetwork) -> None:
        """Split every region into the entries that a new subnetwork reads, and the others."""
        slices = parameter_slices(self._config, subnetwork)
        read = {}
        for name, parameter in self._parameters.items():
            axes = slices.get(name, ())  # a parameter without slices is read whole
            whole = [((0, size),) for size in parameter.shape[len(axes) :]]
            read[name] = list(itertools.product(*axes, *whole))
        regions = []
        for region in self.all:
            inside: dict[str, list[Box]] = {}
            outside: dict[str, list[Box]] = {}
            for name, boxes in region.boxes.items():
                shared = [intersection(box, other) for box in boxes for other in read[name]]
                inside[name] = join(box for box in shared if box)
                outside[name] = join(rest for box in boxes for rest in subtract(box, read[name]))
            for part, readers in ((inside, {*region.readers, subnetwork}), (outside, region.readers)):
                part = {name: boxes for name, boxes in part.items() if boxes}
                if part:
                    regions.append(Region(part, region.age, readers))
        self.all = regions
        self._known.add(subnetwork)
        self._table.cache_clear()


def intersection(a: Box, b: Box) -> Box | None:
    """Return the box that two boxes share, or None."""
    shared = []
    for (a_start, a_length), (b_start, b_length) in zip(a, b, strict=True):
        start, stop = max(a_start, b_start), min(a_start + a_length, b_start + b_length)
        if start >= stop:
            return None
        shared.append((start, stop - start))
    return tuple(shared)


def subtract(box: Box, others: Iterable[Box]) -> list[Box]:
    """Return the part of a box that lies in none of the others, as disjoint boxes."""
    left = [box]
    for other in others:
        left = [part for box in left for part in _around(box, intersection(box, other))]
    return left


def _around(box: Box, hole: Box | None) -> list[Box]:
    """Return a box without the hole inside it: per axis, the parts below and above the hole."""
    if hole is None:
        return [box]
    parts = []
    for axis, ((start, length), (hole_start, hole_length)) in enumerate(zip(box, hole, strict=True)):
        for begin, end in ((start, hole_start), (hole_start + hole_length, start + length)):
            if begin < end:
                parts.append((*hole[:axis], (begin, end - begin), *box[axis + 1 :]))
    return parts


def join(boxes: Iterable[Box]) -> list[Box]:
    """Return the same entries in fewer boxes: two that touch along one axis and agree in all others become one."""
    boxes, before = list(boxes), None
    while boxes != before:
        before = boxes
        for axis in range(len(boxes[0]) if boxes else 0):
            boxes = _join_along(axis, boxes)
    return boxes


def _join_along(axis: int, boxes: list[Box]) -> list[Box]:
    def others(box: Box) -> Box:
        return (*box[:axis], *box[axis + 1 :])

    joined: list[Box] = []
    for box in sorted(boxes, key=lambda box: (others(box), box[axis])):
        start, length = box[axis]
        if joined and others(joined[-1]) == others(box) and sum(joined[-1][axis]) == start:
            start, before = joined.pop()[axis]
            length += before
        joined.append((*box[:axis], (start, length), *box[axis + 1 :]))
    return joined
