"""Crossings become points of a segment. Those that are within their uncertainty share one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointbackmap.analysis.line_kinks import Crossings
from adjointbackmap.analysis.tracks import Insertion


def together(crossings: Sequence[Crossings]) -> Crossings:
    """Several sets of crossings as one, without their settings."""
    columns = zip(*((c.interval, c.weight, c.unsure) for c in crossings), strict=True)
    interval, weight, unsure = (torch.cat(column) for column in columns)
    return Crossings(interval, weight, unsure, [])


@dataclass(frozen=True)
class Merged:
    """Crossings as points: those that are one within their uncertainty share a point.

    Attributes:
        insertion: The new points.
        t: Their places.
        unsure: Their uncertainties.
        point: Number of each crossing's point afterwards.
        side: 1 if a crossing is at an old point on the left of its interval, -1 on the right, 0 if
            its point is new.
        weight: Place of each crossing's point in its old interval, between 0 and 1.
        t_of_crossings: Place of each crossing.
    """

    insertion: Insertion
    t: Tensor
    unsure: Tensor
    point: Tensor
    side: Tensor
    weight: Tensor
    t_of_crossings: Tensor

    @classmethod
    def of(cls, t: Tensor, sure: Tensor, found: Crossings) -> "Merged":
        """Merge crossings with each other and with the points at ``t``."""
        left = t[found.interval]
        width = t[found.interval + 1] - left
        place = left + found.weight * width
        unsure = found.unsure * width
        unsure = unsure.clamp_max(width)  # a crossing cannot leave its interval
        # old points come first among equal places, so that a stable sort keeps them first
        places = torch.cat([t, place])
        sizes = torch.cat([sure, unsure])
        order = places.argsort(stable=True)
        upper = (places + sizes)[order].cummax(0).values
        lower = (places - sizes)[order]
        begins = torch.ones_like(order, dtype=torch.bool)
        begins[1:] = lower[1:] > upper[:-1]
        cluster = torch.empty_like(order)
        cluster[order] = begins.cumsum(0) - 1
        return cls._placed(t, found, place, unsure, cluster)

    @classmethod
    def _placed(
        cls, t: Tensor, found: Crossings, place: Tensor, unsure: Tensor, cluster: Tensor
    ) -> "Merged":
        """Points from the clusters of old points and crossings."""
        points = len(t)
        count = int(cluster.max()) + 1
        of_old, of_new = cluster[:points], cluster[points:]
        has_old = torch.zeros(count, dtype=torch.bool, device=t.device)
        has_old[of_old] = True
        # the end of its interval that a crossing joins, if its cluster has old points
        at_left = (of_old[found.interval] == of_new) & (found.weight <= 0.5)
        at_right = (of_old[found.interval + 1] == of_new) & ~at_left
        at_left |= (of_old[found.interval] == of_new) & ~at_right
        joins = at_left | at_right
        # a cluster of crossings alone is a new point, at the crossing that is the surest
        fresh = (~joins).nonzero().flatten()
        by_size = fresh[unsure[fresh].argsort(stable=True)]
        first = _first_of_each(of_new[by_size], by_size)
        first = first[place[first].argsort(stable=True)]
        insertion = Insertion.of(found.interval[first], found.weight[first], points)
        number = torch.full((count,), -1, dtype=torch.int64, device=t.device)
        number[of_new[first]] = insertion.new
        point = number[of_new]
        point = torch.where(at_left, insertion.old[found.interval], point)
        point = torch.where(at_right, insertion.old[found.interval + 1], point)
        reach = torch.zeros(count, dtype=t.dtype, device=t.device)
        centre = reach.clone()
        centre[of_new[first]] = place[first]
        spread_of = (place - centre[of_new]).abs() + unsure
        reach.scatter_reduce_(0, of_new, spread_of, "amax")
        weights = reach.new_zeros(count)
        weights[of_new[first]] = found.weight[first]
        weight = torch.where(at_left, 0.0, torch.where(at_right, 1.0, weights[of_new]))
        side = at_left.to(torch.int8) - at_right.to(torch.int8)
        return cls(insertion, place[first], reach[of_new[first]], point, side, weight, place)


def _first_of_each(groups: Tensor, numbers: Tensor) -> Tensor:
    """The first number of each group."""
    order = groups.argsort(stable=True)
    sorted_groups = groups[order]
    begins = torch.ones_like(order, dtype=torch.bool)
    begins[1:] = sorted_groups[1:] != sorted_groups[:-1]
    return numbers[order[begins]]
