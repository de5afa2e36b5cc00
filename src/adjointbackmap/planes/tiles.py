"""Tiles: squares of neighbouring positions, whose units share the windows of their cotangents."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from adjointbackmap.engine.cotangent_windows import size_of, window_of, windows_before
from adjointbackmap.engine.program import Program
from adjointbackmap.engine.workspace import held, vectors_within, whole, work_of
from adjointbackmap.planes.query import Query
from adjointbackmap.rules import Value


@dataclass(frozen=True)
class Cost:
    """What a cotangent costs whose windows are those of a tile in the middle of a map.

    Attributes:
        products: Multiply-adds.
        numbers: Numbers that it writes.
        held: Most numbers that it has in memory at a time.
        largest: Numbers in its largest window.
    """

    products: float
    numbers: float
    held: int
    largest: int


@dataclass(frozen=True)
class Tile:
    """Some units of a query, and the positions that they are at.

    Attributes:
        positions: Rows and columns of the map.
        units: Indices of the units among the chosen ones, those of a position together.
    """

    positions: tuple[range, ...]
    units: Tensor


@dataclass(frozen=True)
class Tiling:
    """The positions of a query's units divided into square tiles.

    Attributes:
        side: Rows and columns of a tile.
        cost: What each unit costs.
        at_once: Most units of all images in a batch.
        batches: Number of batches for one image, if the units are spread evenly. All images
            together have at least one batch for each tile.
    """

    side: int
    cost: Cost
    at_once: int
    batches: float

    @classmethod
    def of(cls, query: Query, side: int) -> "Tiling":
        """The tiles of a side."""
        cost = _cost(query.program, query.target, side)
        fast = query.program.chunk_of(cost.largest)
        within = vectors_within(query.room, cost.held, query.dtype.itemsize)
        at_once = fast if within is None else min(fast, within)
        units = query.units.count
        images = len(query.images)
        tiles = min(units, prod(-(-len(axis) // side) for axis in query.units.box))
        return cls(side, cost, at_once, max(tiles, images * units / at_once) / images)

    def tiles(self, query: Query) -> Iterator[Tile]:
        """The tiles that have units."""
        flat = query.units.flat.flatten()
        places = query.units.positions(flat)
        box = query.units.box
        numbers = [place - axis.start for place, axis in zip(places, box, strict=True)]
        # units in the order of their tiles, and inside of a tile of their positions
        tile = _number([n // self.side for n in numbers], box)
        position = _number(numbers, box)
        order = (tile * prod(map(len, box)) + position).argsort(stable=True)
        _, sizes = tile[order].unique_consecutive(return_counts=True)
        for units in order.split(sizes.tolist()):
            yield Tile(query.units.box_of(flat[units]), units)


def tilings(query: Query) -> list[Tiling]:
    """The tilings from which the cheapest is taken: sides that are powers of two."""
    longest = max(map(len, query.units.box))
    return [Tiling.of(query, 2**n) for n in range((longest - 1).bit_length() + 1)]


def _number(places: list[Tensor], box: tuple[range, ...]) -> Tensor:
    """One number for the places along all axes of a box."""
    numbers = torch.zeros_like(places[0])
    for place, axis in zip(places, box, strict=True):
        numbers = numbers * len(axis) + place
    return numbers


def _cost(program: Program, target: Value, side: int) -> Cost:
    """What a cotangent costs, from the windows of a tile in the middle of the map."""

    def compute() -> Cost:
        starts = [max(0, n - side) // 2 for n in target.shape[1:]]
        axes = zip(starts, target.shape[1:], strict=True)
        middle = window_of([range(start, min(start + side, n)) for start, n in axes])
        windows = windows_before(program, target, middle)

        def size(value: Value) -> int:
            # gates alone read a value without a window
            return size_of(value, windows[value.slot]) if value.slot in windows else 0

        steps = program.upstream([target])
        shares = {step.output.slot: size(step.output) / whole(step.output) for step in steps}
        products, numbers = work_of(steps, shares)
        largest = max(size(value) for value in (program.image, *(s.output for s in steps)))
        return Cost(products, numbers, held(steps, size), max(1, largest))

    return program.once(("cotangent windows", target.slot, side), compute)
