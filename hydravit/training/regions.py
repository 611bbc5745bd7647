"""Which entries of the parameters go through the optimizer together: regions, cut anew where a new width appears.

Between two neighbouring widths lies a ring of entries that the wider one reads and the narrower does not. In general a
region is what the same subnetworks read, whatever their offsets and layers, so that each of its entries has gone
through the same steps. Every entry of every parameter is in exactly one region.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hydravit.config import HydraViTConfig
from hydravit.geometry import parameter_slices
from hydravit_kernels import Subnetwork, rectangles_of

# Per axis the interval ``(start, length)``: a part of a parameter.
Box = tuple[tuple[int, int], ...]

# Sets of regions whose tables are kept.
_CACHED_TABLES = 256


@dataclass(eq=False)
class Region:
    """Entries with one history.

    Attributes:
        boxes: per parameter name disjoint boxes.
        done: how many of the optimizer's steps its entries have seen.
        age: how many of these moved them since their moments were zero, which is what bias correction counts.
        readers: the known subnetworks that read it.
    """

    boxes: dict[str, list[Box]]
    done: int = 0
    age: int = 0
    readers: set[Subnetwork] = field(default_factory=set)


class Regions:
    """All regions of a model's parameters.

    Args:
        parameters: by name; their shapes and strides count.
        groups: per name the index of its parameter group.
        found: disjoint regions that cover the parameters.
    """

    def __init__(
        self, config: HydraViTConfig, parameters: Mapping[str, Tensor], groups: Mapping[str, int], found: list[Region]
    ):
        self.all = found
        self._config, self._parameters, self._groups = config, parameters, groups
        self._index = {name: i for i, name in enumerate(parameters)}
        self._known: set[Subnetwork] = set()
        self._rectangles = functools.lru_cache(_CACHED_TABLES)(self._make_rectangles)
        self._table = functools.lru_cache(_CACHED_TABLES)(self._make_table)

    def read_by(self, subnetworks: Iterable[Subnetwork]) -> list[Region]:
        """The regions that one of these subnetworks reads."""
        subnetworks = frozenset(subnetworks)
        for geometry in subnetworks - self._known:
            self._cut(geometry)
        return [region for region in self.all if not region.readers.isdisjoint(subnetworks)]

    def table(self, sets: Iterable[Sequence[Region]], programs: int) -> Tensor:
        """``kernels.adamw``'s rectangles of these sets of regions, of which each has so many programs of its own.

        A set's programs are one per parameter group, in the order of the groups. The same sets get the same tensor
        again, so that a backend can keep what it makes of it.
        """
        return self._table(tuple(map(tuple, sets)), programs)

    def _make_table(self, sets: tuple[tuple[Region, ...], ...], programs: int) -> Tensor:
        shifts = torch.tensor([0, programs, 0, 0, 0, 0])
        table = torch.cat([self._rectangles(regions) + i * shifts for i, regions in enumerate(sets)])
        return table[table[:, 0].argsort(stable=True)]  # rings of one parameter lie side by side in memory

    def _make_rectangles(self, regions: tuple[Region, ...]) -> Tensor:
        """Of one set, with the parameter group in place of the program."""
        rows = []
        for name, parameter in self._parameters.items():
            for box in join(box for region in regions for box in region.boxes.get(name, ())):
                prefix = self._index[name], self._groups[name]
                rows += [(*prefix, *rectangle) for rectangle in rectangles_of(parameter, box)]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 6)

    def _cut(self, geometry: Subnetwork) -> None:
        """Note a new subnetwork: what it reads of a region becomes a region of its own."""
        slices = parameter_slices(self._config, geometry)
        read = {}
        for name, parameter in self._parameters.items():
            axes = slices.get(name, ())  # a parameter that nobody slices is read whole
            whole = [((0, size),) for size in parameter.shape[len(axes) :]]
            read[name] = list(itertools.product(*axes, *whole))
        regions = []
        for region in self.all:
            inside, outside = {}, {}
            for name, boxes in region.boxes.items():
                cut = [intersection(box, other) for box in boxes for other in read[name]]
                inside[name] = join(box for box in cut if box)
                outside[name] = join(rest for box in boxes for rest in subtract(box, read[name]))
            for boxes, readers in ((inside, {*region.readers, geometry}), (outside, region.readers)):
                boxes = {name: found for name, found in boxes.items() if found}
                if boxes:
                    regions.append(Region(boxes, region.done, region.age, readers))
        self.all = regions
        self._known.add(geometry)
        self._rectangles.cache_clear()
        self._table.cache_clear()


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None."""
    shared = []
    for (a_start, a_length), (b_start, b_length) in zip(a, b, strict=True):
        start, stop = max(a_start, b_start), min(a_start + a_length, b_start + b_length)
        if start >= stop:
            return None
        shared.append((start, stop - start))
    return tuple(shared)


def subtract(box: Box, others: Iterable[Box]) -> list[Box]:
    """What of a box lies in none of the others, as disjoint boxes."""
    left = [box]
    for other in others:
        left = [part for box in left for part in _around(box, intersection(box, other))]
    return left


def _around(box: Box, hole: Box | None) -> list[Box]:
    """A box without a hole inside it: axis by axis, what lies before and behind the hole."""
    if hole is None:
        return [box]
    parts = []
    for axis, ((start, length), (hole_start, hole_length)) in enumerate(zip(box, hole, strict=True)):
        for begin, end in ((start, hole_start), (hole_start + hole_length, start + length)):
            if begin < end:
                parts.append((*hole[:axis], (begin, end - begin), *box[axis + 1 :]))
    return parts


def join(boxes: Iterable[Box]) -> list[Box]:
    """The same entries in fewer boxes: those that differ in one axis, and touch there, become one."""
    boxes, before = list(boxes), None
    while boxes != before:
        before = boxes
        for axis in range(len(boxes[0]) if boxes else 0):
            boxes = _join_along(axis, boxes)
    return boxes


def _join_along(axis: int, boxes: list[Box]) -> list[Box]:
    joined: list[Box] = []
    for box in sorted(boxes, key=lambda box: (*box[:axis], *box[axis + 1 :], box[axis])):
        start, length = box[axis]
        if joined:
            before, (before_start, before_length), behind = joined[-1][:axis], joined[-1][axis], joined[-1][axis + 1 :]
            if (before, behind) == (box[:axis], box[axis + 1 :]) and before_start + before_length == start:
                joined[-1] = (*before, (before_start, before_length + length), *behind)
                continue
        joined.append(box)
    return joined
