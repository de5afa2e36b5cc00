"""Values of a network along a segment: one row for each point, or two for each interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Insertion:
    """New points in the intervals between the old ones.

    Attributes:
        interval: Interval of each new point, in order, ``(M,)``.
        weight: Place in its interval, between 0 and 1, ``(M,)``.
        old: New numbers of the old points, ``(K + 1,)``.
        new: Numbers of the new points, ``(M,)``.
    """

    interval: Tensor
    weight: Tensor
    old: Tensor
    new: Tensor

    @classmethod
    def of(cls, interval: Tensor, weight: Tensor, points: int) -> "Insertion":
        """New points, in order, between ``points`` old ones."""
        numbers = torch.arange(points, device=interval.device)
        # an old point moves up by the number of new points in the intervals before it
        old = numbers + torch.searchsorted(interval, numbers)
        new = interval + 1 + torch.arange(len(interval), device=interval.device)
        return cls(interval, weight, old, new)

    @property
    def points(self) -> int:
        """Number of points afterwards."""
        return len(self.old) + len(self.new)

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """Values at the new points, linear in each interval; an infinity is a constant."""
        first = left[self.interval]
        last = right[self.interval]
        weight = self.weight.view(-1, *(1,) * (left.dim() - 1)).to(left.dtype)
        return interpolated(first, last, weight)


def interpolated(left: Tensor, right: Tensor, weight: Tensor | float) -> Tensor:
    """Values between two ends; an infinity is a constant, and its difference is no number."""
    found = torch.lerp(left, right, weight)
    # a sum is no number if one of its terms is none: cheaper than a look at each
    return torch.where(left.isinf(), left, found) if found.sum().isnan() else found


class Track:
    """A value of the network along the segment, ``K`` intervals between ``K + 1`` points.

    Its subclasses say how the numbers at the ends of the intervals are kept.
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


class Constant(Track):
    """A value that is the same everywhere, ``(1, *shape)``."""

    def ends(self, intervals: int) -> tuple[Tensor, Tensor]:
        """Values at the left and at the right end of every interval."""
        rows = self.rows.expand(intervals, *self.rows.shape[1:])
        return rows, rows

    def inserted(self, insertion: Insertion) -> "Constant":
        """The value with new points."""
        return self

    def part(self, first: int, last: int) -> "Constant":
        """The value between two points."""
        return self

    def put(self, point: Tensor, side: Tensor, unit: Tensor, value: Tensor) -> None:
        """Set units at points: a constant has no kink."""


class Continuous(Track):
    """A value without jumps, one row for each point: ``(K + 1, *shape)``."""

    def ends(self, intervals: int) -> tuple[Tensor, Tensor]:
        """Values at the left and at the right end of every interval."""
        return self.rows[:-1], self.rows[1:]

    def inserted(self, insertion: Insertion) -> "Continuous":
        """The value with new points."""
        rows = self.rows.new_empty(insertion.points, *self.rows.shape[1:])
        rows[insertion.old] = self.rows
        rows[insertion.new] = insertion.between(self.rows[:-1], self.rows[1:])
        return Continuous(rows)

    def part(self, first: int, last: int) -> "Continuous":
        """The value between two points."""
        return Continuous(self.rows[first : last + 1])

    def put(self, point: Tensor, side: Tensor, unit: Tensor, value: Tensor) -> None:
        """Set units at points; both sides are one."""
        self.rows.view(len(self.rows), -1)[point, unit] = value


class Jumping(Track):
    """A value that may jump at every point: the two ends of each interval, ``(2 K, *shape)``."""

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "Jumping":
        """From the values at both ends of the intervals."""
        return cls(torch.stack([left, right], 1).flatten(0, 1))

    def ends(self, intervals: int) -> tuple[Tensor, Tensor]:
        """Values at the left and at the right end of every interval."""
        return self.rows[0::2], self.rows[1::2]

    def inserted(self, insertion: Insertion) -> "Jumping":
        """The value with new points, where it does not jump."""
        left, right = self.ends(0)
        new = insertion.between(left, right)
        rows = left.new_empty(insertion.points - 1, 2, *left.shape[1:])
        # an old interval begins at its left point and ends at its right one
        rows[insertion.old[:-1], 0] = left
        rows[insertion.old[1:] - 1, 1] = right
        rows[insertion.new, 0] = new
        rows[insertion.new - 1, 1] = new
        return Jumping(rows.flatten(0, 1))

    def part(self, first: int, last: int) -> "Jumping":
        """The value between two points."""
        return Jumping(self.rows[2 * first : 2 * last])

    def put(self, point: Tensor, side: Tensor, unit: Tensor, value: Tensor) -> None:
        """Set units at points: left of the point, right of it (``side`` -1, 1) or both (0)."""
        rows = self.rows.view(len(self.rows), -1)
        left = (side <= 0) & (point > 0)
        right = (side >= 0) & (2 * point < len(rows))
        rows[2 * point[left] - 1, unit[left]] = value[left]
        rows[2 * point[right], unit[right]] = value[right]


Kept = Constant | Continuous | Jumping


def spread(tracks: Sequence[Kept]) -> list[Tensor]:
    """Rows of several values, each for the same points or interval ends."""
    count = max(len(track.rows) for track in tracks)
    return [
        track.rows.expand(count, *track.rows.shape[1:])
        if isinstance(track, Constant)
        else track.rows
        for track in tracks
    ]


def doubled(track: Kept, intervals: int) -> Kept:
    """A value without jumps, kept as one that may jump."""
    return Jumping.of(*track.ends(intervals)) if isinstance(track, Continuous) else track
