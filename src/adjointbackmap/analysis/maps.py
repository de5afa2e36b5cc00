"""The linear regions of a network on a part of a plane, as exact polygons."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adjointbackmap.analysis.class_cells import (
    Cells,
    Polyline,
    cells_of,
    inner_segments,
    outer_segments,
    polylines,
)
from adjointbackmap.analysis.kinks import one_image
from adjointbackmap.analysis.lines import FLOAT64, has_jumps
from adjointbackmap.analysis.map_walk import MapWalk, at
from adjointbackmap.analysis.polygons import Polygons
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.planes.query import bytes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Limits = Sequence[Sequence[float | int]]
WINDOW = ((-0.25, 1.25), (-0.25, 1.25))  # the three images of a slice, and a margin around them


@dataclass(frozen=True)
class RegionMap:
    r"""The linear regions of a network on the plane :math:`x(s, t) = origin + s u + t v`.

    Made by :func:`region_map`.

    Attributes:
        network: The network.
        origin: Image at the origin, ``(C, H, W)``, in float64.
        u: Direction of the first coordinate.
        v: Direction of the second coordinate.
        limits: First and last value of ``s`` and of ``t``: the window.
        polygons: The polygons. Each lies in one linear region.
        patterns: A number for each polygon, ``(P,)``: equal for polygons whose gates are equal.
        coefficients: The output on each polygon, ``a + b s + c t``: ``(P, 3, *out)``.
        rounding: Rounding error of the output.
        budget: Number of polygons after which the map stops.
        memory: Bytes for the values that are carried.
    """

    network: Network
    origin: Tensor
    u: Tensor
    v: Tensor
    limits: tuple[tuple[float, float], tuple[float, float]]
    polygons: Polygons
    patterns: Tensor
    coefficients: Tensor
    rounding: float
    budget: int
    memory: int

    def __repr__(self) -> str:
        done = "" if self.complete else f", {self.covered:.1%} of the window"
        return f"RegionMap({len(self.polygons):,} polygons{done})"

    @property
    def window_area(self) -> float:
        """Area of the window, in units of ``s`` times units of ``t``."""
        (a, b), (c, d) = self.limits
        return (b - a) * (d - c)

    @property
    def size(self) -> float:
        """The longer side of the window."""
        return max(last - first for first, last in self.limits)

    @cached_property
    def areas(self) -> Tensor:
        """Area of each polygon, ``(P,)``."""
        return self.polygons.areas()

    @property
    def covered(self) -> float:
        """Share of the window that the polygons cover: 1 to rounding for a complete map."""
        return float(self.areas.sum()) / self.window_area

    @property
    def complete(self) -> bool:
        """Whether the polygons cover the window; otherwise the budget was met."""
        return abs(self.covered - 1) < 1e-9

    def at(self, places: Tensor) -> Tensor:
        """Images at positions ``(N, 2)``: ``(N, C, H, W)``."""
        shape = (-1, *(1,) * self.origin.dim())
        s, t = (places[:, axis].view(shape) for axis in (0, 1))
        return self.origin + s * self.u + t * self.v

    def vertices(self) -> list[Tensor]:
        """Vertices of each polygon, ``(n, 2)``, counterclockwise."""
        return self.polygons.listed()

    def values(self, places: Tensor, polygon: Tensor) -> Tensor:
        """The output at positions ``(N, 2)`` by the affine functions of polygons ``(N,)``."""
        return at(self.coefficients[polygon], places)

    # classes

    @property
    def has_classes(self) -> bool:
        """Whether the output is one score per class."""
        return self.coefficients.dim() == 3

    def _scores(self) -> Tensor:
        """Coefficients of the scores; one score alone is compared with zero.

        Raises:
            ValueError: If the output is not one number per class.
        """
        if not self.has_classes:
            shape = tuple(self.coefficients.shape[2:])
            msg = (
                "The output must be one number for each class. "
                f"Got shape {shape}: cut the network with until=."
            )
            raise ValueError(msg)
        if self.coefficients.shape[2] > 1:
            return self.coefficients
        return torch.cat([torch.zeros_like(self.coefficients), self.coefficients], 2)

    @cached_property
    def cells(self) -> Cells:
        """The parts of the polygons on which one class is predicted.

        A network with one output has class 1 where it is positive, else class 0.

        Raises:
            ValueError: If the output is not one number per class.
        """
        return cells_of(self.polygons, self._scores(), 2 * self.rounding)

    @cached_property
    def boundaries(self) -> list[Polyline]:
        """The decision boundaries, with the two classes that meet there.

        An edge between two polygons across which the class changes is a part of the boundary: there
        the network jumps, or two scores are equal on one side.

        Raises:
            ValueError: If the output is not one number per class.
        """
        inner, tied = inner_segments(self.cells, self._scores(), 2 * self.rounding)
        ends, classes = inner
        if tied or has_jumps(self.network.program(FLOAT64)):
            more, others = outer_segments(self.cells, self.size)
            ends = torch.cat([ends, more])
            classes = torch.cat([classes, others])
        return polylines((ends, classes), self.size)

    def class_areas(self) -> dict[int, float]:
        """Share of the covered area for each class."""
        areas = self.cells.polygons.areas()
        total = float(areas.sum())
        return {
            number: float(areas[self.cells.classes == number].sum()) / total
            for number in self.cells.classes.unique().tolist()
        }

    # other windows

    def zoom(self, limits: Limits, budget: int | None = None) -> "RegionMap":
        """The same plane in another window.

        Args:
            limits: First and last value of ``s`` and of ``t``.
            budget: Number of polygons after which the map stops; by default as before.
        """
        return region_map(
            self.network, self.origin, self.u, self.v, limits, budget or self.budget, self.memory
        )

    # figures

    def plot(self, axes: "Axes | None" = None, **options: Any) -> Any:
        """Draw the polygons in the colours of their classes, and the decision boundaries.

        Args:
            axes: Where to draw; by default a new figure.
            options: Size and colours of the figure, as ``analysis.map_figures.draw`` takes them.

        Returns:
            The Matplotlib figure.
        """
        from adjointbackmap.analysis.map_figures import draw

        return draw(self, axes, **options)

    def html(self, path: str | PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write an interactive page: zoom, and scores under the pointer.

        Args:
            path: File to write; it needs nothing else.
            names: Names of the classes.

        Raises:
            ImportError: If Plotly is not installed.
        """
        from adjointbackmap.analysis.map_figures import write_page

        write_page(self, path, names)


def region_map(
    network: Network,
    origin: Tensor,
    u: Tensor,
    v: Tensor,
    limits: Limits = WINDOW,
    budget: int = 10_000,
    memory: str | float | int | None = "2GiB",
) -> RegionMap:
    r"""Every linear region of a network on a part of a plane, as exact convex polygons.

    The plane is :math:`x(s, t) = origin + s\,u + t\,v`. On a polygon where all earlier operations
    are affine, every unit is :math:`c = a_0 + a_1 s + a_2 t`. A unit that meets its kink :math:`a`
    inside cuts the polygon along the line :math:`c = a`. A maximum cuts it into the parts where
    each element wins. All numbers are float64.

    Usual is the plane through an image, an adversarial image and another image:
    ``u = adversarial - image`` and ``v = other - image``.

    Each polygon lies in one linear region. A region may consist of several polygons after ``topk``,
    order statistics, running maxima, and where one comparison masks another.

    Args:
        network: Traced piecewise-affine network.
        origin: Image at the origin, ``(C, H, W)``.
        u: Direction of the first coordinate ``s``, ``(C, H, W)``.
        v: Direction of the second coordinate ``t``.
        limits: First and last value of ``s`` and of ``t``.
        budget: Number of polygons after which the map stops. What is finished is given, see
            :attr:`RegionMap.covered`; :meth:`RegionMap.zoom` goes into a smaller window.
        memory: Bytes for the values that are carried, or a size such as ``"2GiB"``.

    Raises:
        UnsupportedOperation: If the kinks of an operation are unknown.
        ValueError: If an image does not fit the network, or the window has no area.
        RuntimeError: If the model has changed since the trace.

    Example:
        >>> from torch import nn
        >>> from adjointbackmap import trace
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> _ = model[0].weight.data.copy_(torch.eye(2))
        >>> network = trace(model, torch.zeros(1, 2))
        >>> zero, right, up = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> found = region_map(network, zero, right, up, ((-1, 1), (-1, 1)))
        >>> len(found.polygons), found.areas.tolist()
        (4, [1.0, 1.0, 1.0, 1.0])
    """
    check_network(network)
    network.check_piecewise_affine("region_map")
    network.check_unchanged()
    named = (("origin", origin), ("u", u), ("v", v))
    start, first, second = (one_image(network, x, FLOAT64, name) for name, x in named)
    (a, b), (c, d) = ((float(low), float(high)) for low, high in limits)
    if not (a < b and c < d):
        msg = f"limits must be ((first, last), (first, last)), each growing. Got {tuple(limits)}."
        raise ValueError(msg)
    if budget < 1:
        msg = f"budget must be at least 1. Got {budget}: give a number of polygons."
        raise ValueError(msg)
    window = ((a, b), (c, d))
    target = network.layers[OUTPUT].value
    size = bytes_of(memory)
    walk = MapWalk(network, start, torch.cat([first, second]), window, target, size)
    parts = []
    count = 0
    for part in walk.run():
        parts.append(part)
        count += len(part.polygons)
        if count >= budget:
            break
    polygons = parts[0].polygons
    for part in parts[1:]:
        polygons = polygons.joined(part.polygons)
    return RegionMap(
        network,
        start[0],
        first[0],
        second[0],
        window,
        polygons,
        torch.cat([part.patterns for part in parts]),
        torch.cat([part.values[target.slot] for part in parts]).detach(),
        walk.rounding[target.slot],
        budget,
        size,
    )
