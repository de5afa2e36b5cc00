"""Convex polygons, many at a time: areas, centres, and the parts that lines cut off."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Polygons:
    """Convex polygons with their vertices in counterclockwise order.

    Attributes:
        vertices: Positions, ``(P, V, 2)``; those after the last are copies of the last.
        count: Number of vertices of each, ``(P,)``.
    """

    vertices: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.count)

    @classmethod
    def window(cls, limits: Sequence[Sequence[float | int]], device: torch.device) -> "Polygons":
        """One rectangle, ``((first s, last s), (first t, last t))``."""
        (a, b), (c, d) = limits
        corners = [[[a, c], [b, c], [b, d], [a, d]]]
        vertices = torch.tensor(corners, dtype=torch.float64, device=device)
        return cls(vertices, torch.tensor([4], device=device))

    @property
    def inside(self) -> Tensor:
        """Which columns hold vertices, ``(P, V)``."""
        columns = torch.arange(self.vertices.shape[1], device=self.count.device)
        return columns < self.count[:, None]

    def chosen(self, numbers: Tensor) -> "Polygons":
        """Some of them."""
        return Polygons(self.vertices[numbers], self.count[numbers])

    def joined(self, other: "Polygons") -> "Polygons":
        """These and others."""
        width = max(self.vertices.shape[1], other.vertices.shape[1])
        parts = [_widened(p.vertices, width) for p in (self, other)]
        return Polygons(torch.cat(parts), torch.cat([self.count, other.count]))

    def next_vertices(self) -> Tensor:
        """The vertex after each vertex; of the last, the first."""
        after = self.vertices.roll(-1, 1)
        rows = torch.arange(len(self), device=self.count.device)
        after[rows, self.count - 1] = self.vertices[:, 0]
        return after

    def areas(self) -> Tensor:
        """Area of each, ``(P,)``."""
        return self._crosses().sum(1) / 2

    def centres(self) -> Tensor:
        """Centroid of each, ``(P, 2)``; the mean of the vertices where the area is zero."""
        crosses = self._crosses()
        # relative to the first vertex, so that small polygons far from the origin keep their digits
        first = self.vertices[:, :1]
        a = self.vertices - first
        b = self.next_vertices() - first
        total = crosses.sum(1)
        moment = ((a + b) * crosses[..., None]).sum(1) / 3
        mean = (a * self.inside[..., None]).sum(1) / self.count[:, None]
        flat = total <= 0
        centre = torch.where(flat[:, None], mean, moment / torch.where(flat, 1.0, total)[:, None])
        return first[:, 0] + centre

    def _crosses(self) -> Tensor:
        """Twice the signed area of the triangle of each edge and the first vertex, ``(P, V)``."""
        first = self.vertices[:, :1]
        a = self.vertices - first
        b = self.next_vertices() - first
        return (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]) * self.inside

    def values(self, planes: Tensor) -> Tensor:
        """Affine functions ``(P, 3)``, constant and slopes, at the vertices: ``(P, V)``."""
        return planes[:, :1] + (self.vertices * planes[:, None, 1:]).sum(2)

    def kept(self, values: Tensor) -> "Polygons":
        """The part of each where a function, given at the vertices ``(P, V)``, is not negative.

        A polygon that has no area left has no vertices.
        """
        rows = torch.arange(len(self), device=self.count.device)
        inside = self.inside
        after = values.roll(-1, 1)
        after[rows, self.count - 1] = values[:, 0]
        crosses = inside & ((values > 0) & (after < 0) | (values < 0) & (after > 0))
        # the same weights from both sides, so that neighbours share the vertex bit for bit
        low = torch.where(values < after, values, after)
        high = torch.where(values < after, after, values)
        start = torch.where((values < after)[..., None], self.vertices, self.next_vertices())
        end = torch.where((values < after)[..., None], self.next_vertices(), self.vertices)
        gap = torch.where(crosses, high - low, 1.0)
        cut = start + (end - start) * (-low / gap)[..., None]
        # each vertex that stays is followed by the cut of its edge
        stays = inside & (values >= 0)
        both = torch.stack([self.vertices, cut], 2).flatten(1, 2)
        taken = torch.stack([stays, crosses], 2).flatten(1)
        return _compacted(both, taken)

    def listed(self) -> list[Tensor]:
        """The vertices of each as a tensor of its own, ``(n, 2)``."""
        counts = self.count.tolist()
        return [vertices[:n] for vertices, n in zip(self.vertices, counts, strict=True)]


def _widened(vertices: Tensor, width: int) -> Tensor:
    missing = width - vertices.shape[1]
    return torch.cat([vertices, vertices[:, -1:].expand(-1, missing, -1)], 1)


def _compacted(points: Tensor, taken: Tensor) -> Polygons:
    """Polygons of the points that are taken, in order; fewer than three are none."""
    order = (~taken).to(torch.int8).argsort(dim=1, stable=True)
    count = taken.sum(1)
    count = torch.where(count < 3, 0, count)
    width = max(1, int(count.max())) if len(count) else 1
    last = (count - 1).clamp_min(0)[:, None]
    columns = torch.arange(width, device=points.device)[None].minimum(last)
    places = order.gather(1, columns)
    return Polygons(points.gather(1, places[..., None].expand(-1, -1, 2)), count)
