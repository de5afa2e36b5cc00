"""The regions of a network on a part of a plane: polygons are cut step by step.

On each polygon all steps before this one are affine: a value is ``a + b s + c t``. These three
coefficients of every unit are carried. A unit that changes its piece on a polygon cuts it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from adjointbackmap.analysis.line_walk import ROUNDINGS, needed_steps
from adjointbackmap.analysis.polygons import Polygons
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.pattern import pattern_of, value_of
from adjointbackmap.engine.program import IMAGE, Step
from adjointbackmap.engine.rounding import path_sizes
from adjointbackmap.rules import Value
from adjointbackmap.rules.infinite import Infinite, finite
from adjointbackmap.rules.kinks import Levels, Order

COEFFICIENTS = 3  # of an affine function of two coordinates
COPIES = 4
AT_ONCE = 2**24  # numbers at the vertices of some polygons that are looked at together
FAST = 2**24  # numbers of the coefficients that are processed together
MODULUS = 2**61 - 1  # fingerprints of gates are sums with random factors below it


@dataclass(frozen=True)
class Cuts:
    """Lines that cut polygons, in the order of the polygons.

    Attributes:
        polygon: Number of the polygon, ``(M,)``.
        planes: Affine functions, zero on the line, ``(M, E, 3)``. For one function the polygon is
            cut into two. For several it is cut into the parts where each of them is the largest.
        rounding: What counts as zero.
    """

    polygon: Tensor
    planes: Tensor
    rounding: float


@dataclass
class Part:
    """Some polygons before a step, with the coefficients of the values that later steps need.

    Attributes:
        step: Number of the step.
        polygons: The polygons.
        patterns: Fingerprint of the gates of each, ``(P,)``.
        rows: Row of each in the values, ``(P,)``: parts of one polygon share a row.
        values: Coefficients ``(rows, 3, *shape)``, keyed by slot.
    """

    step: int
    polygons: Polygons
    patterns: Tensor
    rows: Tensor
    values: dict[int, Tensor]

    def chosen(self, numbers: Tensor) -> "Part":
        """Some of the polygons; the values are shared."""
        polygons = self.polygons.chosen(numbers)
        return Part(self.step, polygons, self.patterns[numbers], self.rows[numbers], self.values)

    def of(self, value: Value) -> Tensor:
        """Coefficients of a value for each polygon, ``(P, 3, *shape)``."""
        return self.values[value.slot][self.rows]

    def settle(self) -> None:
        """Give each polygon a row of its own."""
        self.values = {slot: value[self.rows] for slot, value in self.values.items()}
        self.rows = torch.arange(len(self.rows), device=self.rows.device)


class MapWalk:
    """The steps of a network, prepared for a part of a plane.

    Args:
        network: Traced network.
        origin: Image at the origin of the plane, ``(1, *in_shape)``, in float64.
        directions: The images that the coordinates multiply, ``(2, *in_shape)``.
        limits: First and last value of each coordinate.
        target: Value whose coefficients are wanted.
        memory: Bytes for the coefficients that are carried.
    """

    def __init__(
        self,
        network: Network,
        origin: Tensor,
        directions: Tensor,
        limits: Sequence[Sequence[float | int]],
        target: Value,
        memory: int,
    ) -> None:
        self.network = network
        self.program = network.program(origin.dtype)
        self.target = target
        wanted = {id(step) for step in needed_steps(self.program)}
        wanted |= {id(step) for step in self.program.upstream([target])}
        self.steps = [step for step in self.program.steps if id(step) in wanted]
        self.gated = [bool(step.rule.kinks()) for step in self.steps]
        self.last = {i.slot: n for n, step in enumerate(self.steps) for i in step.inputs}
        self.last[target.slot] = len(self.steps)
        self.window = Polygons.window(limits, origin.device)
        self.image = torch.cat([origin, directions])
        self.rounding = self._rounding(limits)
        self.room = self._polygons(memory)
        self.generator = torch.Generator().manual_seed(0)
        self.factors: dict[int, Tensor] = {}

    def _rounding(self, limits: Sequence[Sequence[float | int]]) -> dict[int, float]:
        """Largest rounding error of each value that is compared."""
        corners = self.window.vertices[0]
        shape = (-1, *(1,) * (self.image.dim() - 1))
        reach = torch.tensor([max(abs(a), abs(b)) for a, b in limits])
        reach = reach.to(self.image).view(shape)
        largest = self.image[:1].abs() + (self.image[1:].abs() * reach).sum(0, keepdim=True)
        centre = corners.mean(0).view(shape)
        middle = self.image[:1] + (self.image[1:] * centre).sum(0, keepdim=True)
        targets = {
            value.slot: value
            for step, gated in zip(self.steps, self.gated, strict=True)
            for value in step.inputs
            if gated
        }
        targets[self.target.slot] = self.target
        with exact(middle.device):
            sizes = path_sizes(pattern_of(self.network, middle, 1.0), largest, targets.values())
        eps = torch.finfo(middle.dtype).eps
        return {slot: ROUNDINGS * eps * float(size.max()) for slot, size in sizes.items()}

    def _polygons(self, memory: int) -> int:
        """Polygons of the largest part that fits in memory, with the parts that wait."""
        live: dict[int, int] = {IMAGE: prod(self.program.image.shape)}
        peak = waiting = 0
        for n, step in enumerate(self.steps):
            if self.gated[n]:
                waiting += sum(live.values())
            live[step.output.slot] = prod(step.output.shape)
            peak = max(peak, sum(live.values()))
            live = {slot: size for slot, size in live.items() if self.last.get(slot, -1) > n}
        numbers = COEFFICIENTS * (COPIES * peak + waiting)
        return max(2, min(memory // (8 * max(1, numbers)), max(32, FAST // (3 * max(1, peak)))))

    # the walk

    def run(self) -> Iterator[Part]:
        """Finished parts of the window, one after the other."""
        with exact(self.image.device):
            zero = torch.zeros(1, dtype=torch.int64, device=self.image.device)
            waiting = [Part(0, self.window, zero, zero, self._inputs())]
            while waiting:
                part = waiting.pop()
                while part.step < len(self.steps):
                    if self._subdivide(part):
                        self._advance(part)
                    if len(part.polygons) > self.room:
                        numbers = torch.arange(len(part.polygons), device=self.image.device)
                        waiting.append(part.chosen(numbers[self.room :]))
                        _become(part, part.chosen(numbers[: self.room]))
                yield part

    def _inputs(self) -> dict[int, Tensor]:
        """Coefficients of the image and of the entries: slopes of the entries are zero."""
        values = {IMAGE: self.image[None]}
        for entry in self.program.entries:
            value = entry.value.new_zeros(1, COEFFICIENTS, *entry.value.shape)
            value[:, 0] = entry.value
            values[entry.slot] = value
        return values

    def _subdivide(self, part: Part) -> bool:
        """Cut the polygons where units of the part's step meet a kink.

        Returns:
            Whether all cuts are made. Otherwise there are too many polygons: with some of them the
            same step is looked at again.
        """
        step = self.steps[part.step]
        for kink in step.rule.kinks() or () if self.gated[part.step] else ():
            for cuts in self._cuts(part, step, kink):
                done, finished = cut(part, cuts, 2 * self.room)
                _become(part, done)
                if not finished:
                    return False
        return True

    def _advance(self, part: Part) -> None:
        """Compute the value of the part's step."""
        step = self.steps[part.step]
        part.settle()
        part.values[step.output.slot] = self._output(part, step)
        n = part.step
        for slot in [slot for slot in part.values if self.last.get(slot, -1) <= n]:
            del part.values[slot]
        part.step += 1

    def _output(self, part: Part, step: Step) -> Tensor:
        """Coefficients of a step's output."""
        count = len(part.polygons)
        if isinstance(step.rule, Infinite):
            value = step.rule.value.new_zeros(count, COEFFICIENTS, *step.output.shape)
            value[:, 0] = step.rule.value
            return value
        inputs = [part.values[value.slot] for value in step.inputs]
        centres = part.polygons.centres()
        at_centre = [at(value, centres) for value in inputs]
        gates = step.rule.gates(1.0, *at_centre)
        if self.gated[part.step]:
            self._mark(part, gates)
        folded = [finite(value).flatten(0, 1) for value in inputs]
        found = step.rule.forward(gates, *folded).unflatten(0, (count, COEFFICIENTS))
        if any(value.slot in self.program.infinite for value in step.inputs):
            whole = value_of(self.program, step, gates, at_centre, count)
            found = found.clone()
            found[:, 0] = torch.where(whole.isinf(), whole, found[:, 0])
        return found

    def _mark(self, part: Part, gates: Sequence[Tensor]) -> None:
        """Add the gates to the fingerprint of each polygon's activation pattern."""
        for number, gate in enumerate(gates):
            key = part.step * 8 + number
            flat = gate.flatten(1)
            if key not in self.factors:
                drawn = torch.randint(MODULUS, (flat.shape[1],), generator=self.generator)
                self.factors[key] = drawn.to(flat.device)
            codes = flat.view(torch.int64) if flat.is_floating_point() else flat.to(torch.int64)
            # the low bits of numbers such as 1.0 are all zero, and a product would lose the rest
            codes = codes ^ (codes >> 52) ^ (codes >> 20)
            part.patterns = part.patterns + (codes * self.factors[key]).sum(1)

    # cuts

    def _cuts(self, part: Part, step: Step, kink: Levels | Order) -> Iterator[Cuts]:
        """The lines on which the units of a step meet one of its kinks."""
        if isinstance(kink, Levels):
            of = [i for i in kink.of if i < len(step.inputs)]
            rounding = sum(self.rounding[step.inputs[i].slot] for i in of)
            for number in range(len(kink.at)):
                # earlier cuts have changed the part
                inputs = [part.of(value) for value in step.inputs]
                yield crossing(part.polygons, self._gap(part, inputs, of, kink, number), rounding)
        else:
            value = step.inputs[kink.of]
            places = kink.places(value.shape).to(self.image.device)
            rounding = 2 * self.rounding[value.slot]
            yield from contests(part.polygons, part.of(value), kink, places, rounding)

    def _gap(
        self, part: Part, inputs: Sequence[Tensor], of: Sequence[int], kink: Levels, number: int
    ) -> Tensor:
        """Coefficients of what is zero at a kink, ``(P, 3, units)``."""
        level = kink.at[number]
        if callable(level):
            level = level(*(at(value, part.polygons.centres()) for value in inputs))
        gap = inputs[of[0]]
        if len(of) > 1:
            gap = gap - inputs[of[1]]
        target = torch.as_tensor(level, dtype=gap.dtype, device=gap.device)
        if target.dim():
            shift = torch.zeros_like(gap[:, :, ...] - target.unsqueeze(1))
            shift[:, 0] = target
            gap = gap - shift
        elif float(target):
            gap = gap.clone()
            gap[:, 0] -= target
        return gap.flatten(2)


def at(value: Tensor, points: Tensor) -> Tensor:
    """Values ``(P, *shape)`` of coefficients ``(P, 3, *shape)`` at one point of each polygon."""
    shape = (-1, *(1,) * (value.dim() - 2))
    s, t = (points[:, axis].view(shape) for axis in (0, 1))
    return value[:, 0] + s * value[:, 1] + t * value[:, 2]


def _become(part: Part, other: Part) -> None:
    """Replace the contents of a part."""
    part.polygons, part.patterns = other.polygons, other.patterns
    part.rows, part.values = other.rows, other.values


def crossing(polygons: Polygons, gaps: Tensor, rounding: float) -> Cuts:
    """Which functions ``(P, 3, units)`` change their sign on a polygon by more than rounding."""
    homogeneous = torch.cat([torch.ones_like(polygons.vertices[..., :1]), polygons.vertices], 2)
    each = polygons.vertices.shape[1] * gaps.shape[2]
    size = max(1, AT_ONCE // max(1, each))
    found = []
    for start in range(0, len(polygons), size):
        part = slice(start, start + size)
        values = (homogeneous[part] @ gaps[part].nan_to_num(0.0, 0.0, 0.0)).sub_(0.0)
        crosses = (values.amin(1) < -rounding) & (values.amax(1) > rounding)
        crosses &= gaps[part, 0].isfinite()
        polygon, unit = crosses.nonzero(as_tuple=True)
        found.append((polygon + start, unit))
    polygon = torch.cat([p for p, _ in found])
    unit = torch.cat([u for _, u in found])
    return Cuts(polygon, gaps[polygon, :, unit][:, None], rounding)


def contests(
    polygons: Polygons, value: Tensor, kink: Order, places: Tensor, rounding: float
) -> Iterator[Cuts]:
    """The lines on which elements of groups change their order."""
    if places.shape[1] < 2:
        return
    value = value.flatten(2)
    value = value if kink.largest else -value
    homogeneous = torch.cat([torch.ones_like(polygons.vertices[..., :1]), polygons.vertices], 2)
    is_maximum = not kink.running and kink.ranks(places.shape[1]) == (0, 0)
    polygon, group = _contested(value, homogeneous, places, rounding, is_maximum)
    members = places[group]  # (M, E)
    planes = value[polygon[:, None], :, members.clamp_min(0)]  # (M, E, 3)
    planes = planes.clone()
    planes[..., 0] = planes[..., 0].masked_fill(members < 0, -torch.inf)
    if is_maximum:
        yield Cuts(polygon, planes, rounding)
        return
    one, other = torch.triu_indices(places.shape[1], places.shape[1], 1, device=places.device)
    gaps = (planes[:, one] - planes[:, other]).flatten(0, 1)  # (M * pairs, 3)
    owner = polygon.repeat_interleave(len(one))
    yield Cuts(owner, gaps[:, None], rounding)


def _contested(
    value: Tensor, homogeneous: Tensor, places: Tensor, rounding: float, is_maximum: bool
) -> tuple[Tensor, Tensor]:
    """Polygons and groups whose order is not the same at all vertices."""
    found = []
    each = homogeneous.shape[1] * places.numel()
    size = max(1, AT_ONCE // max(1, each))
    for start in range(0, len(value), size):
        part = slice(start, start + size)
        at_vertices = homogeneous[part] @ value[part].nan_to_num(0.0, 0.0, 0.0)
        members = at_vertices[:, :, places.clamp_min(0)]  # (P, V, groups, E)
        missing = (places < 0) | value[part, 0][:, places.clamp_min(0)].isinf()
        members = members.masked_fill(missing[:, None], -torch.inf)
        if is_maximum:
            # the winner at one vertex, if it is beaten at another
            winner = members[:, :1].argmax(3, keepdim=True)
            winner = winner.expand(-1, members.shape[1], -1, -1)
            own = members.gather(3, winner)[..., 0]
            differs = (members.amax(3) > own + rounding).any(1)
        else:
            order = members.argsort(dim=3, stable=True)
            differs = (order != order[:, :1]).flatten(3).any(3).any(1)
        polygon, group = differs.nonzero(as_tuple=True)
        found.append((polygon + start, group))
    return torch.cat([p for p, _ in found]), torch.cat([g for _, g in found])


def cut(part: Part, cuts: Cuts, limit: int) -> tuple[Part, bool]:
    """Cut the polygons of a part, one line of each at a time.

    Args:
        part: The part.
        cuts: The lines.
        limit: Number of polygons at which to stop.

    Returns:
        The part, and whether all cuts are made.
    """
    if not len(cuts.polygon):
        return part, True
    order = cuts.polygon.argsort(stable=True)
    planes = cuts.planes[order]
    counts = torch.bincount(cuts.polygon, minlength=len(part.polygons))
    stop = counts.cumsum(0)
    nxt = stop - counts  # the next line of each polygon
    parent = torch.arange(len(part.polygons), device=nxt.device)
    polygons = part.polygons
    while True:
        left = (nxt < stop).nonzero().flatten()
        if not len(left) or len(polygons) > limit:
            break
        done = (nxt >= stop).nonzero().flatten()
        pieces, origin, _ = pieces_of(polygons.chosen(left), planes[nxt[left]], cuts.rounding)
        polygons = polygons.chosen(done).joined(pieces)
        parent = torch.cat([parent[done], parent[left][origin]])
        nxt, stop = (
            torch.cat([nxt[done], nxt[left][origin] + 1]),
            torch.cat([stop[done], stop[left][origin]]),
        )
    by_parent = parent.argsort(stable=True)
    chosen = part.chosen(parent[by_parent])
    chosen.polygons = polygons.chosen(by_parent)
    return chosen, not len(left)


def pieces_of(
    polygons: Polygons, planes: Tensor, rounding: float
) -> tuple[Polygons, Tensor, Tensor]:
    """The parts of polygons; for each its polygon, and the function that is the largest on it.

    Args:
        polygons: The polygons.
        planes: One function for each, ``(P, 1, 3)``, or several, ``(P, E, 3)``.
        rounding: What counts as zero.
    """
    if planes.shape[1] == 1:
        both = torch.cat([planes, torch.zeros_like(planes)], 1)
        return pieces_of(polygons, both, rounding)
    candidates = planes.shape[1]
    numbers = torch.arange(len(polygons), device=planes.device)
    found = Polygons(polygons.vertices[:0], polygons.count[:0])
    origin = numbers[:0]
    winner = numbers[:0]
    for one in range(candidates):
        alive = numbers[planes[:, one, 0] > -torch.inf]
        kept = polygons.chosen(alive)
        for other in range(candidates):
            if other == one or not len(alive):
                continue
            gap = planes[alive, one] - planes[alive, other].nan_to_num(0.0)
            gap[planes[alive, other, 0].isinf()] = 0.0
            values = kept.values(gap)
            values = torch.where(values.abs() <= rounding, 0.0, values)
            # of two that are equal everywhere, the first wins
            tie = (values == 0).all(1) & (other < one) & ~planes[alive, other, 0].isinf()
            values = torch.where(tie[:, None], -1.0, values)
            kept = kept.kept(values)
            nonempty = kept.count > 0
            kept, alive = kept.chosen(nonempty.nonzero().flatten()), alive[nonempty]
        found = found.joined(kept)
        origin = torch.cat([origin, alive])
        winner = torch.cat([winner, torch.full_like(alive, one)])
    return found, origin, winner
