"""The regions of a network on a segment, step by step: values are carried, and points inserted.

Between two neighbouring points all steps before this one are affine. So a unit that changes its
piece in between does so at a place that is found by interpolation. The place becomes a new point.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from adjointbackmap.analysis.line_kinks import (
    Crossings,
    level_crossings,
    middles,
    order_crossings,
)
from adjointbackmap.analysis.line_points import Merged, together
from adjointbackmap.analysis.tracks import (
    Constant,
    Continuous,
    Insertion,
    Jumping,
    Kept,
    doubled,
    spread,
)
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.pattern import pattern_of, value_of
from adjointbackmap.engine.program import IMAGE, Program, Step, UnsupportedOperation
from adjointbackmap.engine.rounding import path_sizes
from adjointbackmap.rules import Value
from adjointbackmap.rules.kinks import Levels, Order

# A value has an error of at most this many units of rounding of what is summed along its paths.
ROUNDINGS = 32
COPIES = 3  # an operation holds its inputs, its output and one copy more
# Numbers of the rows that are processed together. More of them do not fit into the caches, and
# fewer pay for the start of each operation.
NUMBERS = 2**25


@dataclass(frozen=True)
class FlipRecord:
    """Gates of one step that change: place on the segment, unit, gate before and after."""

    step: int
    t: Tensor
    unit: Tensor
    before: Tensor
    after: Tensor

    def until(self, t: float) -> "FlipRecord":
        """Those up to a place."""
        kept = self.t <= t
        return FlipRecord(
            self.step, self.t[kept], self.unit[kept], self.before[kept], self.after[kept]
        )


@dataclass(frozen=True)
class Isolated:
    """Places where a comparison such as ``==`` holds at one point alone."""

    step: int
    t: Tensor
    unit: Tensor


@dataclass
class Found:
    """What a walk has found so far, from the start of the segment to ``t[-1]``.

    Attributes:
        t: Points, in order: the ends, and all breakpoints.
        unsure: Uncertainty of each point.
        flips: Gates that change.
        isolated: Comparisons that hold at one point alone.
        pending: Step and point -> gates on one side of the point, until the other side is there.
    """

    t: Tensor
    unsure: Tensor
    flips: list[FlipRecord] = field(default_factory=list)
    isolated: list[Isolated] = field(default_factory=list)
    pending: dict[tuple[int, float], tuple[str, Tensor]] = field(default_factory=dict)


@dataclass
class Piece:
    """A part of the segment before a step: its points and the values that later steps need."""

    step: int
    t: Tensor
    unsure: Tensor
    values: dict[int, Kept]

    @property
    def intervals(self) -> int:
        """Number of intervals."""
        return len(self.t) - 1

    def part(self, first: int, last: int) -> "Piece":
        """The part between two points."""
        values = {slot: value.part(first, last) for slot, value in self.values.items()}
        points = slice(first, last + 1)
        return Piece(self.step, self.t[points], self.unsure[points], values)

    def insert(self, insertion: Insertion, t: Tensor, unsure: Tensor) -> None:
        """Insert points with their places and uncertainties."""
        places = self.t.new_empty(insertion.points)
        places[insertion.old] = self.t
        places[insertion.new] = t
        sizes = torch.empty_like(places)
        sizes[insertion.old] = self.unsure
        sizes[insertion.new] = unsure
        self.t = places
        self.unsure = sizes
        self.values = {slot: value.inserted(insertion) for slot, value in self.values.items()}


class Walk:
    """The steps of a network, prepared for segments between two images.

    Args:
        network: Traced network.
        start: First image, ``(1, *in_shape)``, in float64.
        end: Last image.
        memory: Bytes for the values that are carried.

    Raises:
        UnsupportedOperation: If the kinks of an operation are unknown.
    """

    def __init__(self, network: Network, start: Tensor, end: Tensor, memory: int) -> None:
        self.network = network
        self.start = start
        self.end = end
        self.program = network.program(start.dtype)
        self.steps = needed_steps(self.program)
        self.gated = [bool(step.rule.kinks()) for step in self.steps]
        self.last = {i.slot: n for n, step in enumerate(self.steps) for i in step.inputs}
        compared = [
            i
            for step, gated in zip(self.steps, self.gated, strict=True)
            if gated
            for i in step.inputs
        ]
        self.rounding = self.rounding_of(compared)
        self.room = self._rows(memory)
        self.places: dict[tuple[int, int], Tensor] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}  # of the gates of each step

    def rounding_of(self, values: Iterable[Value]) -> dict[int, float]:
        """Largest rounding error of values, keyed by slot."""
        targets = {value.slot: value for value in values}
        middle = torch.lerp(self.start, self.end, 0.5)
        largest = torch.maximum(self.start.abs(), self.end.abs())
        with exact(middle.device):
            sizes = path_sizes(pattern_of(self.network, middle, 1.0), largest, targets.values())
        eps = torch.finfo(middle.dtype).eps
        return {slot: ROUNDINGS * eps * float(size.max()) for slot, size in sizes.items()}

    def _rows(self, memory: int) -> int:
        """Points of the largest piece that fits in memory, with the pieces that wait."""
        live: dict[int, int] = {IMAGE: prod(self.program.image.shape)}
        peak = waiting = 0
        for n, step in enumerate(self.steps):
            size = prod(step.output.shape)
            if self.gated[n]:
                waiting += sum(live.values())
            live[step.output.slot] = size
            peak = max(peak, sum(live.values()))
            live = {slot: s for slot, s in live.items() if self.last.get(slot, -1) > n}
        numbers = 2 * (COPIES * peak + waiting)  # two rows for a point where values jump
        within = memory // (8 * max(1, numbers))
        fast = max(64, NUMBERS // max(1, peak))
        return max(4, min(within, fast))

    # the walk

    def run(self, found: Found, regions: int | None) -> None:
        """Go on from the last point found, until the end or until there are so many regions.

        Points without a flip are left out at the end, so there may be fewer regions.
        """
        first = found.t[-1:]
        t = torch.cat([first, torch.ones_like(first)])
        points = torch.lerp(self.start, self.end, t.view(-1, *(1,) * (self.start.dim() - 1)))
        values: dict[int, Kept] = {IMAGE: Continuous(points)}
        for entry in self.program.entries:
            values[entry.slot] = Constant(entry.value[None])
        waiting = [Piece(0, t, torch.zeros_like(t), values)]
        while waiting and (regions is None or len(found.t) - 1 < regions):
            piece = waiting.pop()
            left = None if regions is None else regions - (len(found.t) - 1)
            with exact(self.start.device):
                self._finish(piece, found, waiting, left)
            found.t = torch.cat([found.t, piece.t[1:]])
            found.unsure = torch.cat([found.unsure, piece.unsure[1:]])
        end = float(found.t[-1])
        found.flips = [flips.until(end) for flips in found.flips]

    def _finish(
        self, piece: Piece, found: Found, waiting: list[Piece], regions: int | None
    ) -> None:
        """Take a piece through all steps that are left; parts that do not fit wait."""
        while piece.step < len(self.steps):
            n = piece.step
            step = self.steps[n]
            if regions is not None and piece.intervals > regions:
                _become(piece, piece.part(0, regions))
            if self.gated[n] and any(
                not isinstance(piece.values[i.slot], Constant) for i in step.inputs
            ):
                self._subdivide(piece, found, waiting)
                self._compare(piece, found)
            piece.values[step.output.slot] = self._output(piece)
            for value in step.inputs:
                if self.last[value.slot] == n:
                    piece.values.pop(value.slot, None)
            if self.last.get(step.output.slot, -1) < 0:
                del piece.values[step.output.slot]
            piece.step += 1
        if regions is not None and piece.intervals > regions:
            _become(piece, piece.part(0, regions))

    def _subdivide(self, piece: Piece, found: Found, waiting: list[Piece]) -> None:
        """Insert a point wherever a unit of the piece's step meets a kink."""
        step = self.steps[piece.step]
        for number, kink in enumerate(step.rule.kinks() or ()):
            crossings = self._crossings(piece, number, kink)
            if not crossings:
                continue
            joined = together(crossings)
            merged = Merged.of(piece.t, piece.unsure, joined)
            if isinstance(kink, Levels) and kink.isolated:
                unit = torch.cat([s.unit for c in crossings for s in c.settings[:1]])
                found.isolated.append(Isolated(piece.step, merged.t_of_crossings, unit))
                continue
            if merged.insertion.points > self.room and merged.insertion.points > 3:
                self._cut(piece, merged, waiting)
                return self._subdivide(piece, found, waiting)
            piece.insert(merged.insertion, merged.t, merged.unsure)
            _set(piece, merged, crossings)
        return None

    def _cut(self, piece: Piece, merged: Merged, waiting: list[Piece]) -> None:
        """Keep the first points that fit; the rest waits."""
        insertion = merged.insertion
        cut = min(self.room - 1, insertion.points - 2)
        old = (insertion.old == cut).nonzero().flatten()
        if len(old):
            at = int(old)
        else:  # a new point: insert it alone
            (which,) = (insertion.new == cut).nonzero().flatten().tolist()
            one = slice(which, which + 1)
            alone = Insertion.of(insertion.interval[one], insertion.weight[one], len(piece.t))
            piece.insert(alone, merged.t[one], merged.unsure[one])
            at = int(alone.new)
        waiting.append(piece.part(at, piece.intervals))
        _become(piece, piece.part(0, at))

    def _crossings(self, piece: Piece, number: int, kink: Levels | Order) -> list[Crossings]:
        step = self.steps[piece.step]
        tracks = [piece.values[value.slot] for value in step.inputs]
        if isinstance(kink, Levels):
            rounding = sum(
                self.rounding[step.inputs[i].slot] for i in kink.of if i < len(step.inputs)
            )
            return level_crossings(step, kink, tracks, piece.intervals, rounding)
        value = step.inputs[kink.of]
        key = (piece.step, number)
        if key not in self.places:
            self.places[key] = kink.places(value.shape).to(piece.t.device)
        rounding = 2 * self.rounding[value.slot]
        return order_crossings(
            step, kink, tracks[kink.of], self.places[key], piece.intervals, rounding
        )

    # gates

    def _codes(self, piece: Piece) -> Tensor:
        """What says which piece the step is on, for each unit and interval: ``(K, ...)``."""
        step = self.steps[piece.step]
        tracks = [piece.values[value.slot] for value in step.inputs]
        kinks = step.rule.kinks() or ()
        inputs = middles(tracks, piece.intervals)
        first = kinks[0]
        if (
            len(kinks) == 1
            and isinstance(first, Levels)
            and not any(map(callable, first.at))
            and not first.isolated
            and first.of[0] == 0
        ):
            value = inputs[0] - inputs[1] if len(inputs) > 1 and len(first.of) > 1 else inputs[0]
            codes = [value > at for at in first.at if not callable(at)]
            if len(codes) == 1:
                return codes[0]
            return torch.stack(codes).sum(0, dtype=torch.int8)
        return step.rule.gates(1.0, *inputs)[0]

    def _compare(self, piece: Piece, found: Found) -> None:
        """Record the gates that differ between neighbouring intervals."""
        codes = self._codes(piece)
        if len(codes) == 1 != piece.intervals:
            return
        n = piece.step
        self.shapes[n] = tuple(codes.shape[1:])
        flat = codes.flatten(1)
        point, unit = (flat[1:] != flat[:-1]).nonzero(as_tuple=True)
        if len(point):
            t = piece.t[point + 1]
            found.flips.append(FlipRecord(n, t, unit, flat[point, unit], flat[point + 1, unit]))
        self._compare_at_end(found, n, float(piece.t[0]), "after", flat[0])
        self._compare_at_end(found, n, float(piece.t[-1]), "before", flat[-1])

    def _compare_at_end(self, found: Found, n: int, t: float, side: str, codes: Tensor) -> None:
        """The same between two pieces, once both are there."""
        if t in (0.0, 1.0):
            return
        known = found.pending.pop((n, t), None)
        if known is None or known[0] == side:
            found.pending[n, t] = (side, codes.clone())
            return
        before, after = (known[1], codes) if side == "after" else (codes, known[1])
        (unit,) = (before != after).nonzero(as_tuple=True)
        if len(unit):
            place = torch.full((len(unit),), t, dtype=found.t.dtype, device=codes.device)
            found.flips.append(FlipRecord(n, place, unit, before[unit], after[unit]))

    # values

    def _output(self, piece: Piece) -> Kept:
        """The value of the piece's step."""
        step = self.steps[piece.step]
        tracks = [piece.values[value.slot] for value in step.inputs]
        if all(isinstance(track, Constant) for track in tracks):
            return Constant(self._applied(step, [track.rows for track in tracks], 1))
        jumps = any(kink.jumps for kink in step.rule.kinks() or ())
        if not jumps and not any(isinstance(track, Jumping) for track in tracks):
            rows = spread(tracks)
            return Continuous(self._applied(step, rows, len(rows[0])))
        tracks = [doubled(track, piece.intervals) for track in tracks]
        rows = spread(tracks)
        if not self.gated[piece.step]:
            return Jumping(self._applied(step, rows, len(rows[0])))
        gates = step.rule.gates(1.0, *middles(tracks, piece.intervals))
        twice = tuple(gate.repeat_interleave(2, 0) if len(gate) > 1 else gate for gate in gates)
        return Jumping(value_of(self.program, step, twice, rows, len(rows[0])))

    def _applied(self, step: Step, rows: Sequence[Tensor], count: int) -> Tensor:
        gates = step.rule.gates(1.0, *rows)
        return value_of(self.program, step, gates, rows, count)


def _become(piece: Piece, other: Piece) -> None:
    """Replace the contents of a piece."""
    piece.t, piece.unsure, piece.values = other.t, other.unsure, other.values


def needed_steps(program: Program) -> list[Step]:
    """The steps with kinks, and those that they depend on.

    Raises:
        UnsupportedOperation: If the kinks of a step are unknown.
    """
    unknown = [step.op for step in program.steps if step.rule.kinks() is None]
    if unknown:
        msg = (
            f"Every operation must give its kinks. Got {', '.join(dict.fromkeys(unknown))}: "
            "add a method kinks to the rule, or cut the graph before it with until=."
        )
        raise UnsupportedOperation(msg)
    gated = [step for step in program.steps if step.rule.kinks()]
    before = program.upstream([value for step in gated for value in step.inputs])
    needed = {id(step) for step in (*gated, *before)}
    return [step for step in program.steps if id(step) in needed]


def _set(piece: Piece, merged: Merged, crossings: Sequence[Crossings]) -> None:
    """Set the units that cross exactly to their kinks."""
    start = 0
    for found in crossings:
        those = slice(start, start + len(found.interval))
        start = those.stop
        weight = merged.weight[those]
        for setting in found.settings:
            value = torch.lerp(setting.first, setting.last, weight.to(setting.first.dtype))
            track = piece.values[setting.slot]
            if not track.rows.is_contiguous():
                track.rows = track.rows.contiguous()
            track.put(merged.point[those], merged.side[those], setting.unit, value)
