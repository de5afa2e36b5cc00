"""The parts of linear regions on which one class is predicted, and the boundaries between them."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointbackmap.analysis.map_walk import at, pieces_of
from adjointbackmap.analysis.polygons import Polygons

NEAR = 8  # roundings within which two scores on an edge are equal
DIGITS = 1e-9  # share of the window's size below which two vertices are one
EDGES_AT_ONCE = 2**22  # pairs of edges and vertices


@dataclass(frozen=True)
class Cells:
    """Parts of polygons on which one class has the largest score.

    Attributes:
        polygons: The parts.
        region: Number of the polygon that each is a part of, ``(C,)``.
        classes: Class of each, ``(C,)``.
    """

    polygons: Polygons
    region: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Polyline:
    """A piece of a decision boundary.

    Attributes:
        points: Positions ``(n, 2)``, joined by straight lines.
        classes: The two classes that meet there.
    """

    points: Tensor
    classes: tuple[int, int]


Segments = tuple[Tensor, Tensor]  # ends (S, 2, 2), and classes (S, 2)


def cells_of(polygons: Polygons, scores: Tensor, rounding: float) -> Cells:
    """Cut polygons by the class with the largest score.

    Args:
        polygons: The polygons.
        scores: Coefficients of the scores, ``(P, 3, classes)``.
        rounding: Rounding of a score.
    """
    planes = scores.transpose(1, 2)  # (P, classes, 3)
    ones = torch.ones_like(polygons.vertices[..., :1])
    values = torch.cat([ones, polygons.vertices], 2) @ scores  # (P, V, classes)
    winner = at(scores, polygons.centres()).argmax(1)
    own = values.gather(2, winner[:, None, None].expand(-1, values.shape[1], 1))[..., 0]
    whole = (values.amax(2) <= own + rounding).all(1)
    single = whole.nonzero().flatten()
    several = (~whole).nonzero().flatten()
    parts, origin, classes = pieces_of(polygons.chosen(several), planes[several], rounding)
    region = torch.cat([single, several[origin]])
    order = region.argsort(stable=True)
    joined = polygons.chosen(single).joined(parts)
    labels = torch.cat([winner[single], classes])
    return Cells(joined.chosen(order), region[order], labels[order])


def inner_segments(cells: Cells, scores: Tensor, rounding: float) -> tuple[Segments, bool]:
    """Edges of cells inside of a linear region, on which two scores are equal.

    Returns:
        The edges; and whether two scores are equal on the edge of a linear region. Then the class
        may change across that edge, as it may where the network jumps.
    """
    polygons = cells.polygons
    own = scores[cells.region]
    ones = torch.ones_like(polygons.vertices[..., :1])
    values = torch.cat([ones, polygons.vertices], 2) @ own  # (C, V, classes)
    mine = cells.classes[:, None, None].expand(-1, values.shape[1], 1)
    gaps = (values - values.gather(2, mine)).abs()
    gaps = gaps.scatter(2, mine, torch.inf)  # no boundary with itself
    rows = torch.arange(len(polygons), device=gaps.device)
    after = gaps.roll(-1, 1)
    after[rows, polygons.count - 1] = gaps[:, 0]
    both = torch.maximum(gaps, after)
    gap, other = both.min(2)
    level = (gap <= NEAR * rounding) & polygons.inside
    # of the classes of each region, ``(regions, classes)``
    present = scores.new_zeros(len(scores), scores.shape[2], dtype=torch.bool)
    present[cells.region, cells.classes] = True
    meets = present[cells.region].gather(1, other)
    tied = bool((level & ~meets).any())
    cell, edge = (level & meets & (other > cells.classes[:, None])).nonzero(as_tuple=True)
    ends = torch.stack([polygons.vertices[cell, edge], polygons.next_vertices()[cell, edge]], 1)
    return (ends, torch.stack([cells.classes[cell], other[cell, edge]], 1)), tied


def outer_segments(cells: Cells, size: float) -> Segments:
    """Edges between linear regions across which the class jumps.

    Args:
        cells: The cells.
        size: Size of the window.
    """
    polygons = cells.polygons
    cell, edge = polygons.inside.nonzero(as_tuple=True)
    ends = torch.stack([polygons.vertices[cell, edge], polygons.next_vertices()[cell, edge]], 1)
    corners = polygons.vertices[cell, edge].unique(dim=0)
    ends, owner = _subdivided(ends, cell, corners, DIGITS * size)
    keys = (ends.mean(1) / (DIGITS * size)).round().to(torch.int64)
    _, number, count = keys.unique(dim=0, return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    first = count.cumsum(0) - count
    shared = (count == 2).nonzero().flatten()
    one, other = order[first[shared]], order[first[shared] + 1]
    classes = torch.stack([cells.classes[owner[one]], cells.classes[owner[other]]], 1)
    differs = classes[:, 0] != classes[:, 1]
    inside = cells.region[owner[one]] == cells.region[owner[other]]
    chosen = differs & ~inside
    return ends[one[chosen]], classes[chosen].sort(1).values


def _subdivided(ends: Tensor, owner: Tensor, corners: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Edges cut at the corners of other cells that lie on them."""
    found: list[Tensor] = []
    owners: list[Tensor] = []
    size = max(1, EDGES_AT_ONCE // max(1, len(corners)))
    for start in range(0, len(ends), size):
        some = ends[start : start + size]
        along = some[:, 1] - some[:, 0]
        length = along.norm(dim=1, keepdim=True).clamp_min(near)
        unit = along / length
        offset = corners[None] - some[:, :1]  # (edges, corners, 2)
        place = (offset * unit[:, None]).sum(2)
        away = (offset[..., 0] * unit[:, None, 1] - offset[..., 1] * unit[:, None, 0]).abs()
        on_edge = (away < near) & (place > near) & (place < length - near)
        place = torch.where(on_edge, place, torch.inf).sort(1).values
        most = int(on_edge.sum(1).max()) if len(some) else 0
        stops = torch.cat([place[:, :most], torch.full_like(length, torch.inf)], 1)
        stops = stops.minimum(length)
        starts = torch.cat([torch.zeros_like(length), stops[:, :-1]], 1)
        row, piece = (stops - starts > near).nonzero(as_tuple=True)
        parts = torch.stack([starts[row, piece], stops[row, piece]], 1)[..., None]
        found.append(some[row, :1] + parts * unit[row, None])
        owners.append(owner[start : start + size][row])
    return torch.cat(found), torch.cat(owners)


def polylines(segments: Segments, size: float) -> list[Polyline]:
    """Segments of the same two classes joined at their common ends.

    Args:
        segments: The segments.
        size: Size of the window.
    """
    ends, classes = segments
    keys = (ends / (DIGITS * size)).round().to(torch.int64).tolist()
    by_classes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (one, other) in enumerate(classes.tolist()):
        by_classes[one, other].append(number)
    found = []
    for pair, numbers in by_classes.items():
        links: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for number in numbers:
            for side in (0, 1):
                links[_key(keys, number, side)].append((number, side))
        found += [Polyline(line, pair) for line in _chained(numbers, keys, links, ends)]
    return found


def _key(keys: list[list[list[int]]], number: int, side: int) -> tuple[int, int]:
    """The rounded end of a segment."""
    s, t = keys[number][side]
    return s, t


def _chained(
    numbers: list[int],
    keys: list[list[list[int]]],
    links: dict[tuple[int, int], list[tuple[int, int]]],
    ends: Tensor,
) -> list[Tensor]:
    """Chains of segments; a chain ends where not exactly two segments meet."""
    left = set(numbers)

    def follow(number: int, side: int) -> list[Tensor]:
        """Points from a side of a segment on."""
        points = [ends[number, side]]
        while True:
            here = links[_key(keys, number, side)]
            others = [(n, s) for n, s in here if n in left]
            if len(here) != 2 or not others:
                return points
            number, near = others[0]
            left.discard(number)
            side = 1 - near
            points.append(ends[number, side])

    chains = []
    for number in numbers:
        if number in left:
            left.discard(number)
            forward = follow(number, 1)
            backward = follow(number, 0)
            chains.append(torch.stack([*backward[::-1], *forward]))
    return chains
