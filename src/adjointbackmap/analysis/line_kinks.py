"""Where units meet their kinks in the intervals of a segment, on which all inputs are linear."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointbackmap.analysis.tracks import Constant, Kept, interpolated
from adjointbackmap.engine.program import Step
from adjointbackmap.rules.kinks import Levels, Order

PAIRS_AT_ONCE = 2**22  # numbers of one batch of pairs whose order is compared


@dataclass(frozen=True)
class Setting:
    """Units that are set to their kink: values at the ends of each interval, linear between.

    Attributes:
        slot: Number of the value.
        unit: Flat place in the value, ``(M,)``.
        first: Value at the left end of the interval, ``(M,)``.
        last: Value at its right end, ``(M,)``.
    """

    slot: int
    unit: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Crossings:
    """Units that meet a kink inside an interval.

    Attributes:
        interval: The interval, ``(M,)``.
        weight: Place in the interval, between 0 and 1; exactly 0 or 1 where the unit is at its kink
            within rounding at an end, ``(M,)``.
        unsure: Uncertainty of this place, ``(M,)``.
        settings: Which units are at which value there.
    """

    interval: Tensor
    weight: Tensor
    unsure: Tensor
    settings: list[Setting]

    @classmethod
    def of(
        cls, interval: Tensor, before: Tensor, after: Tensor, rounding: float
    ) -> tuple["Crossings", Tensor]:
        """Crossings from the distances to the kink at both ends, and which of them count.

        A unit that stays within rounding of its kink on the whole interval does not cross it.
        """
        total = before + after
        at_left = before <= rounding
        at_right = after <= rounding
        weight = before / total
        weight = torch.where(at_left, 0.0, torch.where(at_right, 1.0, weight))
        counts = ~(at_left & at_right)
        return cls(interval, weight, rounding / total, []), counts

    def chosen(self, counts: Tensor) -> "Crossings":
        """Some of them."""
        settings = [
            Setting(s.slot, s.unit[counts], s.first[counts], s.last[counts]) for s in self.settings
        ]
        return Crossings(self.interval[counts], self.weight[counts], self.unsure[counts], settings)


def level_crossings(
    step: Step, kink: Levels, tracks: Sequence[Kept], intervals: int, rounding: float
) -> list[Crossings]:
    """Where an input, or the difference of two, takes the values of a kink.

    Args:
        step: The step.
        kink: Its kinks.
        tracks: Its inputs.
        intervals: Number of intervals.
        rounding: Rounding of what crosses.
    """
    of = [i for i in kink.of if i < len(tracks)]
    found = []
    for at in kink.at:
        if len(of) == 1 and not callable(at) and not isinstance(tracks[of[0]], Constant):
            found.append(_single(step, of[0], float(at), tracks, intervals, rounding))
        else:
            found.append(_difference(step, of, at, tracks, intervals, rounding))
    return [crossings for crossings in found if len(crossings.interval)]


def _single(
    step: Step, of: int, at: float, tracks: Sequence[Kept], intervals: int, rounding: float
) -> Crossings:
    track = tracks[of]
    above = type(track)(track.rows > at).ends(intervals)
    below = type(track)(track.rows < at).ends(intervals)
    crosses = (above[0] & below[1]) | (below[0] & above[1])
    interval, unit = crosses.flatten(1).nonzero(as_tuple=True)
    left, right = (end.reshape(intervals, -1)[interval, unit] for end in track.ends(intervals))
    crossings, counts = Crossings.of(interval, (left - at).abs(), (right - at).abs(), rounding)
    level = torch.full_like(left, at)
    crossings.settings.append(Setting(step.inputs[of].slot, unit, level, level))
    return crossings.chosen(counts)


def _difference(
    step: Step,
    of: Sequence[int],
    at: float | Tensor | Callable[..., Tensor],
    tracks: Sequence[Kept],
    intervals: int,
    rounding: float,
) -> Crossings:
    """The first input against the second plus a value; only the first is set to its kink."""
    first = tracks[of[0]].ends(intervals)
    level = at(*middles(tracks, intervals)) if callable(at) else at
    if isinstance(level, Tensor):
        level = level.to(first[0].dtype)
    others = tracks[of[1]].ends(intervals) if len(of) > 1 else (0.0, 0.0)
    targets = [other + level for other in others]
    gaps = [end - target for end, target in zip(first, targets, strict=True)]
    gaps = [gap.nan_to_num(0.0) for gap in gaps]  # of two infinities none wins
    crosses = (gaps[0] > 0) & (gaps[1] < 0) | (gaps[0] < 0) & (gaps[1] > 0)
    interval, unit = crosses.flatten(1).nonzero(as_tuple=True)
    left, right = (gap.flatten(1)[interval, unit].abs() for gap in gaps)
    crossings, counts = Crossings.of(interval, left, right, rounding)
    is_whole = gaps[0].shape == first[0].shape
    if is_whole and not isinstance(tracks[of[0]], Constant):
        ends = [
            torch.as_tensor(target, dtype=left.dtype, device=left.device)
            .expand(gaps[0].shape)
            .flatten(1)[interval, unit]
            for target in targets
        ]
        crossings.settings.append(Setting(step.inputs[of[0]].slot, unit, *ends))
    return crossings.chosen(counts)


def middles(tracks: Sequence[Kept], intervals: int) -> list[Tensor]:
    """Values in the middle of every interval."""
    return [middle(*track.ends(intervals)) for track in tracks]


def middle(left: Tensor, right: Tensor) -> Tensor:
    """Values half way between two ends."""
    return left if left is right else interpolated(left, right, 0.5)


def order_crossings(
    step: Step, kink: Order, track: Kept, places: Tensor, intervals: int, rounding: float
) -> list[Crossings]:
    """Where two elements of a group change their order.

    Args:
        step: The step.
        kink: Its kinks.
        track: The input whose elements are compared.
        places: Flat places of each group's elements, ``(groups, elements)``.
        intervals: Number of intervals.
        rounding: Rounding of a difference.
    """
    if isinstance(track, Constant) or places.shape[1] < 2:
        return []
    ends = [end.reshape(intervals, -1) for end in track.ends(intervals)]
    is_maximum = not kink.running and kink.ranks(places.shape[1]) == (0, 0)
    looked_at = _order(kink, track.rows, places, is_maximum)
    orders = type(track)(looked_at).ends(intervals)
    differs = (orders[0] != orders[1]).flatten(2).any(2)
    interval, group = differs.nonzero(as_tuple=True)
    if not len(interval):
        return []
    members = places[group]
    sign = 1.0 if kink.largest else -1.0
    first, last = (
        (sign * end[interval[:, None], members.clamp_min(0)]).masked_fill(members < 0, -torch.inf)
        for end in ends
    )
    find = _envelope if is_maximum else _pairs
    found = []
    for those, one, other in find(kink, first, last, rounding):
        a, b = first[those], last[those]
        gaps = [
            (end.gather(1, one[:, None]) - end.gather(1, other[:, None]))[:, 0].abs()
            for end in (a, b)
        ]
        crossings, counts = Crossings.of(interval[those], gaps[0], gaps[1], rounding)
        winner = [sign * end.gather(1, one[:, None])[:, 0] for end in (a, b)]
        for element in (one, other):
            unit = members[those].gather(1, element[:, None])[:, 0]
            crossings.settings.append(Setting(step.inputs[kink.of].slot, unit, *winner))
        found.append(crossings.chosen(counts))
    return [crossings for crossings in found if len(crossings.interval)]


def _order(kink: Order, rows: Tensor, places: Tensor, is_maximum: bool) -> Tensor:
    """What the operation takes at every row, ``(rows, groups, ...)``: the winner, or the order."""
    lost = -torch.inf if kink.largest else torch.inf
    flat = rows.reshape(len(rows), -1)
    values = flat[:, places.clamp_min(0)]
    if (places < 0).any():
        values = values.masked_fill(places < 0, lost)
    if is_maximum:
        return (values.max(2) if kink.largest else values.min(2)).indices[..., None]
    return values.argsort(dim=2, descending=kink.largest, stable=True)


Found = list[tuple[Tensor, Tensor, Tensor]]  # numbers of groups, and two elements of each


def _envelope(kink: Order, first: Tensor, last: Tensor, rounding: float) -> Found:
    """Winners of groups from one end of their interval to the other, one after the other."""
    top = first.max(1, keepdim=True).values
    # of those that are level at the left end, the one that rises most wins right after it
    rising = last.masked_fill(first < top - rounding, -torch.inf)
    current = rising.max(1).indices
    group = torch.arange(len(first), device=first.device)
    found: Found = []
    rise = last - first
    for _ in range(first.shape[1]):
        a, b = first[group], last[group]
        own = current[:, None]
        gain = rise[group].nan_to_num(0.0) - rise[group].nan_to_num(0.0).gather(1, own)
        when = (a.gather(1, own) - a) / gain
        overtakes = b > b.gather(1, own)
        when = torch.where(overtakes & (gain > 0), when, torch.inf)
        weight, nxt = when.min(1)
        goes_on = weight.isfinite()
        if not bool(goes_on.any()):
            break
        group, current = group[goes_on], current[goes_on]
        nxt = nxt[goes_on]
        found.append((group, current, nxt))
        current = nxt
    return found


def _pairs(kink: Order, first: Tensor, last: Tensor, rounding: float) -> Found:
    """Pairs of elements that change their order at ranks that matter."""
    elements = first.shape[1]
    one, other = torch.triu_indices(elements, elements, 1, device=first.device)
    number = torch.arange(elements, device=first.device)
    lowest, highest = kink.ranks(elements)
    found: Found = []
    step = max(1, PAIRS_AT_ONCE // max(1, len(one)))
    for start in range(0, len(first), step):
        a, b = first[start : start + step], last[start : start + step]
        before = (a[:, one] - a[:, other]).nan_to_num(0.0)
        after = (b[:, one] - b[:, other]).nan_to_num(0.0)
        group, pair = ((before > 0) & (after < 0) | (before < 0) & (after > 0)).nonzero(
            as_tuple=True
        )
        if not len(group):
            continue
        p, q = one[pair], other[pair]
        da, db = before[group, pair].abs(), after[group, pair].abs()
        weight = da / (da + db)
        at = torch.lerp(a[group], b[group], weight[:, None]).nan_to_num(-torch.inf)
        level = at.gather(1, p[:, None])
        above = at > level + rounding
        above &= (number != p[:, None]) & (number != q[:, None])
        if kink.running:
            above &= number <= q[:, None]
        rank = above.sum(1)
        matters = (rank + 1 >= lowest) & (rank <= highest)
        found.append((start + group[matters], p[matters], q[matters]))
    return found
