"""From region to region to the nearest decision boundary."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.analysis.boundaries import Boundary, boundaries
from adjointbackmap.analysis.crossings import NORMS
from adjointbackmap.analysis.kinks import (
    Extended,
    Watch,
    Watched,
    kink_distances,
    one_image,
    signs_of,
)
from adjointbackmap.analysis.lines import FLOAT64, region_line
from adjointbackmap.analysis.nearest import Walls, nearest_point
from adjointbackmap.capture.precision import exact
from adjointbackmap.display import Shown, Summary
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.operators import pull, push
from adjointbackmap.engine.pattern import pattern_of
from adjointbackmap.engine.program import IMAGE

AT_ONCE = 16  # walls of one operation that are added in one round
# The found point lies behind the boundary by this share of the distance; more, if the model still
# gives the class of the image.
BEHIND = (1e-9, 1e-7, 1e-5)
# A value is behind its kink if it is further than this share of the operation's largest value.
ROUNDING = 1e-11
OVERSHOOT = 1.02  # of a way, so that it crosses the boundary that it is aimed at
# A walk ends where another region brings it nearer by less than this share.
GAIN = 1e-9
# A walk that finds no region with a boundary takes so many steps to the nearest boundary of the
# region where each begins, and then halves the way back so often.
STEPS = 100
HALVINGS = 60
# If the steps lead nowhere, so many random ways are looked at, with lengths from 2**-6 to 2**9 of
# the image's.
RAYS = 64
DOUBLINGS = (-6, 10)
NOTHING = "Neither steps towards the nearest class boundary nor random ways led to another class."

Bounds = tuple[float | int, float | int]


@dataclass(frozen=True, repr=False)
class RegionWalk(Shown):
    """A point of another class near an image, made by :func:`region_walk`.

    Attributes:
        norm: ``"l2"`` or ``"linf"``.
        predicted: The class of the image.
        point: The nearest point of another class that was found, ``(C, H, W)``; ``None`` if none
            was found.
        found: The class of the point, by the untouched model in float64.
        upper: Distance of the point; infinite without one. It is an upper bound on the distance to
            the nearest point of another class.
        lower: The smaller of the distances to the nearest kink and to the nearest boundary in the
            image's region. No point of another class is nearer. ``None`` if the kinks of an
            operation are not measured.
        regions: Number of regions that were visited.
        distances: Distance of the boundary in each region that has one, in the order of the walk.
        finished: Whether the walk ended because no neighbouring region brought it nearer.
        by_bisection: Whether the point is from steps towards boundaries or from random ways, and a
            bisection, because no visited region gave one. It may then be far from the nearest.
    """

    norm: str
    predicted: int
    point: Tensor | None
    found: int | None
    upper: float
    lower: float | None
    regions: int
    distances: tuple[float, ...]
    finished: bool
    by_bisection: bool = False

    @property
    def reason(self) -> str:
        """Why there is no point, in one sentence; empty if there is one."""
        return NOTHING if self.point is None else ""

    def _summary(self) -> Summary:
        lower = "not known" if self.lower is None else f"{self.lower:.4g}"
        facts = {
            "predicted class": str(self.predicted),
            "class of the point": f"no point found. {NOTHING}"
            if self.found is None
            else str(self.found),
            "distance": f"{lower} to {self.upper:.4g} in {self.norm}",
            "regions visited": f"{self.regions:,}",
        }
        return Summary("RegionWalk", facts)


def region_walk(
    network: Network,
    x: Tensor,
    norm: str = "l2",
    regions: int = 1000,
    bounds: Bounds | None = None,
) -> RegionWalk:
    r"""Walk through linear regions to a near point of another class [Croce2020].

    In each region the network is affine. From the image, the walk goes towards the nearest class
    boundary of the image's region, through all regions on the way, and is aimed again where it
    ends. In the first region that holds a boundary, the point of the boundary that is nearest to
    the image is computed exactly: a quadratic program in l2, a linear one in l-infinity, with the
    kinks of all units as constraints. The walk goes on through the walls that bound this point, as
    long as it comes nearer. If it finds no point, steps to the nearest boundary of the region where
    each begins, or random ways, look for another class without a count of regions. A bisection of
    the way back then gives the point.
    All numbers are float64.

    Args:
        network: Traced piecewise-affine network whose output is one number per class.
        x: One image.
        norm: ``"l2"`` or ``"linf"``.
        regions: Largest number of regions to visit.
        bounds: Smallest and largest value of a pixel, such as ``(0, 1)``; ``None`` for no bounds.

    Returns:
        The point, and bounds on the distance to the nearest point of another class.

    Raises:
        ImportError: If SciPy is not installed.
        UnsupportedOperation: If the kinks of an operation are unknown.
        ValueError: If an argument does not fit, or the image is outside its bounds.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Linear(2, 2, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> walk = region_walk(trace(model, torch.zeros(1, 2)), torch.tensor([3.0, 1.0]), "linf")
        >>> round(walk.upper, 6), walk.lower, walk.found
        (1.0, 1.0, 1)
    """
    check_network(network)
    network.check_piecewise_affine("region_walk")
    if norm not in NORMS:
        msg = f"norm must be one of {', '.join(NORMS)}. Got {norm!r}."
        raise ValueError(msg)
    if regions < 1:
        msg = f"regions must be at least 1. Got {regions}: give the most regions to visit."
        raise ValueError(msg)
    image = one_image(network, x, FLOAT64)[0]
    if (
        bounds is not None
        and not bounds[0] <= float(image.min()) <= float(image.max()) <= bounds[1]
    ):
        least, largest = float(image.min()), float(image.max())
        msg = f"x must lie in bounds={bounds}. Got {least:.4g} to {largest:.4g}: give its range."
        raise ValueError(msg)
    walker = _Walker(network, image, norm, regions, bounds)
    walker.run()
    if walker.point is None:
        walker.bisect()
    return walker.result()


class _Walker:
    """The state of a walk."""

    def __init__(
        self, network: Network, x: Tensor, norm: str, regions: int, bounds: Bounds | None
    ) -> None:
        self.network = network
        self.x = x
        self.norm = norm
        self.most = regions
        self.bounds = bounds
        self.predicted = self.class_at(x)
        count = network.layers[OUTPUT].out_shape[0]
        self.others = [c for c in range(count) if c != self.predicted]
        self.visited = 0
        self.distances: list[float] = []
        self.point: Tensor | None = None
        self.finished = False
        self.by_bisection = False

    def class_at(self, point: Tensor) -> int:
        """The class of a point, by the untouched model."""
        layer = self.network.layers[OUTPUT]
        return int(record(self.network, point[None], [layer]).outputs[OUTPUT].argmax())

    def length(self, step: Tensor) -> float:
        """Length of a step in the norm."""
        return float(torch.linalg.vector_norm(step, 2 if self.norm == "l2" else torch.inf))

    def run(self) -> None:
        """Find a region with a boundary, then go nearer."""
        inside = self.reach_boundary()
        best = torch.inf
        while inside is not None and self.visited <= self.most:
            region = _Region(self, inside)
            found = region.nearest()
            distance = torch.inf if found is None else self.length(found[0] - self.x)
            if found is None or distance >= best * (1 - GAIN):
                self.finished = True
                return
            best = distance
            point, plane = found
            self.distances.append(distance)
            self.keep(region, point, plane)
            if self.visited == self.most:
                return
            inside = self.beyond(point, plane)
            self.finished = inside is None

    def reach_boundary(self) -> Tensor | None:
        """A point in the first region on the way that holds a boundary.

        The way goes to the nearest plane of the region where it starts, through all regions in
        between, and is aimed again where it ends.
        """
        here = self.x
        while self.visited < self.most:
            planes = boundaries(self.network, here, self.predicted, self.others)
            steps = [step for step in map(self.step_onto, planes) if step is not None]
            if not steps:
                self.visited += 1
                return None
            step = min(steps, key=self.length)
            end = self.inside(here + OVERSHOOT * step)
            line = region_line(self.network, here, end, regions=self.most - self.visited)
            other = line.values()[:, 1].argmax(1) != self.predicted
            if other.any():
                first = int(other.nonzero()[0])
                self.visited += first + 1
                return line.at(line.middles[first])
            self.visited += line.regions
            here = line.at(line.t[-1])
        return None

    def bisect(self) -> None:
        """Keep a point of another class, found without a count of regions, and a way back."""
        end = self.by_steps()
        if end is None:
            end = self.by_rays()
        if end is None:
            return
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self.class_at(torch.lerp(self.x, end, middle)) == self.predicted:
                low = middle
            else:
                high = middle
        self.point = torch.lerp(self.x, end, high)
        self.by_bisection = True

    def by_steps(self) -> Tensor | None:
        """A point of another class, by steps to the nearest plane of each region."""
        here = self.x
        for _ in range(STEPS):
            planes = boundaries(self.network, here, self.predicted, self.others)
            steps = [step for step in map(self.step_onto, planes) if step is not None]
            if not steps:
                return None
            moved = self.inside(here + OVERSHOOT * min(steps, key=self.length))
            if self.class_at(moved) != self.predicted:
                return moved
            if torch.equal(moved, here):
                return None
            here = moved
        return None

    def by_rays(self) -> Tensor | None:
        """A point of another class, on random ways that become longer and longer."""
        generator = torch.Generator().manual_seed(0)
        ways = torch.randn(RAYS, *self.x.shape, generator=generator, dtype=FLOAT64)
        ways = (ways if self.norm == "l2" else ways.sign()).to(self.x.device)
        ways /= ways.flatten(1).norm(dim=1).view(-1, *(1,) * self.x.dim())
        size = max(1.0, float(self.x.norm()))
        layer = self.network.layers[OUTPUT]
        for doubled in range(*DOUBLINGS):
            points = self.inside(self.x + 2.0**doubled * size * ways)
            classes = record(self.network, points, [layer]).outputs[OUTPUT].argmax(1)
            found = (classes != self.predicted).nonzero().flatten()
            if len(found):
                return points[int(found[0])]
        return None

    def step_onto(self, plane: Boundary) -> Tensor | None:
        """The shortest step from a plane's point onto it, inside the bounds.

        Pixels that would leave the bounds stay at them, and the others move on.
        """
        free = torch.ones_like(plane.x, dtype=torch.bool)
        fixed = torch.zeros_like(plane.x)
        while True:
            weights = plane.weights * free
            if not weights.any():
                return None
            left = plane.value + float((plane.weights * fixed).sum())
            along = weights if self.norm == "l2" else weights.sign()
            step = fixed - left * along / (weights * along).sum()
            if self.bounds is None:
                return step
            moved = plane.x + step
            outside = ((moved < self.bounds[0]) | (moved > self.bounds[1])) & free
            if not outside.any():
                return step
            fixed = torch.where(outside, moved.clamp(*self.bounds) - plane.x, fixed)
            free = free & ~outside

    def beyond(self, point: Tensor, plane: Boundary) -> Tensor | None:
        """A point in the region behind the walls that bound a point, on the way to the plane."""
        nearest = self.step_onto(replace(plane, x=self.x))
        if nearest is None:
            return None
        target = self.x + nearest
        size = self.length(target - point)
        if size <= GAIN * self.length(point - self.x):
            return None
        line = region_line(self.network, point, target, regions=4)
        wide = line.widths * size > GAIN * self.length(point - self.x)
        if not wide.any():
            return None
        self.visited += 1
        return line.at(line.middles[wide][0])

    def keep(self, region: "_Region", point: Tensor, plane: Boundary) -> None:
        """Keep a point behind the boundary, if the model gives it another class."""
        for behind in BEHIND:
            found = region.solve(plane, behind)
            if found is None:  # the region ends at its boundary
                found = self.inside(self.x + (1 + behind) * (point - self.x))
            if self.class_at(found) != self.predicted:
                self.point = found
                return

    def inside(self, point: Tensor) -> Tensor:
        """A point inside the bounds."""
        return point if self.bounds is None else point.clamp(*self.bounds)

    def result(self) -> RegionWalk:
        """What was found, and the lower bound."""
        point = self.point
        upper = torch.inf if point is None else self.length(point - self.x)
        return RegionWalk(
            self.norm,
            self.predicted,
            point,
            None if point is None else self.class_at(point),
            upper,
            self.lower(),
            self.visited,
            tuple(self.distances),
            self.finished,
            self.by_bisection,
        )

    def lower(self) -> float | None:
        """The nearest kink or boundary in the image's region."""
        kinks = kink_distances(self.network, self.x, sweep=torch.float32)
        if kinks.unmeasured:
            return None
        nearest = kinks.nearest(self.norm)
        planes = boundaries(self.network, self.x, self.predicted, self.others)
        found = [plane.distance(self.norm) for plane in planes]
        return min([*found, torch.inf if nearest is None else nearest.distance(self.norm)])


class _Region:
    """The region of a point: the values whose kinks are its walls."""

    def __init__(self, walker: _Walker, inside: Tensor) -> None:
        self.walker = walker
        self.inside = inside
        network = walker.network
        watch = Watch(pattern_of(network, inside[None], 1.0))
        self.pattern: Extended = watch.extended()
        self.watched: list[Watched] = watch.found
        with exact(inside.device):
            self.infinite = push(
                self.pattern, signs_of(self.pattern.program), [w.value for w in self.watched]
            )
        self.here = self.values(inside)
        self.planes = boundaries(network, inside, walker.predicted, walker.others)

    def values(self, point: Tensor) -> list[Tensor]:
        """Values of this region's affine map at any point, flat, one tensor per operation."""
        given = {IMAGE: point[None]}
        for entry in self.pattern.program.entries:
            given[entry.slot] = entry.value[None]
        targets = [watched.value for watched in self.watched]
        with exact(point.device):
            found = push(self.pattern, given, targets)
        values = (found[target.slot] for target in targets)
        return [
            point.new_zeros(prod(target.shape)) if value is None else value[0].flatten()
            for target, value in zip(targets, values, strict=True)
        ]

    def nearest(self) -> tuple[Tensor, Boundary] | None:
        """The point of the region's boundaries that is nearest to the image, and its boundary."""
        best = None
        # the shortest way to a plane is a lower bound, so that most planes need no program
        planes = [(replace(p, x=self.walker.x), p) for p in self.planes if p.weights.any()]
        planes.sort(key=lambda pair: pair[0].distance(self.walker.norm))
        least = torch.inf
        for moved, _ in planes:
            if moved.distance(self.walker.norm) >= least:
                break
            found = self.solve(moved, 0.0)
            if found is not None:
                length = self.walker.length(found - self.walker.x)
                if length < least:
                    least = length
                    best = (found, moved)
        return best

    def solve(self, plane: Boundary, behind: float) -> Tensor | None:
        """The nearest point of the region in which a boundary is crossed."""
        x = self.walker.x
        dual = float(torch.linalg.vector_norm(plane.weights, 2 if self.walker.norm == "l2" else 1))
        level = -plane.value - behind * max(abs(plane.value), dual * 1e-12)
        first = (plane.weights.flatten()[None].numpy(), np.array([level]))

        def outside(step: np.ndarray) -> Walls:
            return self.outside(x + torch.from_numpy(step).view_as(x))

        step = nearest_point(first, outside, self.walker.norm)
        if step is None:
            return None
        point = x + torch.from_numpy(step).view_as(x)
        return self.walker.inside(point)

    def outside(self, point: Tensor) -> Walls:
        """The walls that a point is furthest behind, as bounds on the step from the image."""
        rows = [np.zeros((0, point.numel()))]
        levels = [np.zeros(0)]
        for more, level in (*self.walls(point), *self.pixels(point)):
            rows.append(more)
            levels.append(level)
        return np.concatenate(rows), np.concatenate(levels)

    def walls(self, point: Tensor) -> Iterator[Walls]:
        """Walls of units, by operation."""
        for watched, here, there in zip(self.watched, self.here, self.values(point), strict=True):
            size = ROUNDING * max(float(here.abs().max()), float(there.abs().max()))
            for kink in watched.kinks:
                side = (here - kink).sign()
                side = torch.where((here - kink).abs() <= size, 0.0, side)
                signs = self.infinite[watched.value.slot]
                if signs is not None:  # an infinite unit never reaches its kink
                    side = side.masked_fill(signs[0].flatten() != 0, 0.0)
                past = -side * (there - kink)
                near = past.topk(min(AT_ONCE, len(past)))
                units = near.indices[near.values > size]
                if len(units):
                    yield self.rows(watched, units, side[units], there[units] - kink, point)

    def rows(
        self, watched: Watched, units: Tensor, side: Tensor, gap: Tensor, point: Tensor
    ) -> Walls:
        """``side * (value - kink) >= 0`` as bounds on the step from the image."""
        seeds = point.new_zeros(len(units), prod(watched.value.shape))
        seeds[torch.arange(len(units)), units] = side
        with exact(point.device):
            images, _ = pull(
                self.pattern, {watched.value.slot: seeds.view(-1, *watched.value.shape)}
            )
        slopes = images.flatten(1)
        # the value is affine: at the image it is that at the point minus the slope times the step
        at_image = side * gap - slopes @ (point - self.walker.x).flatten()
        return -slopes.numpy(), at_image.numpy()

    def pixels(self, point: Tensor) -> Iterator[Walls]:
        """Bounds of pixels that a point breaks."""
        if self.walker.bounds is None:
            return
        low, high = self.walker.bounds
        x = self.walker.x.flatten()
        for sign, past, room in (
            (1.0, point.flatten() - high, high - x),
            (-1.0, low - point.flatten(), x - low),
        ):
            units = (past > 0).nonzero().flatten()
            rows = np.zeros((len(units), len(x)))
            rows[np.arange(len(units)), units.numpy()] = sign
            yield rows, room[units].numpy()
