"""Every linear region of a network on the segment between two images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.analysis.kinks import one_image, step_names
from adjointbackmap.analysis.line_walk import Found, Walk
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.operators import push
from adjointbackmap.engine.pattern import pattern_of
from adjointbackmap.engine.program import IMAGE, Program
from adjointbackmap.engine.workspace import bytes_of_vector, held
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.planes.query import bytes_of
from adjointbackmap.rules import Value

FLOAT64 = torch.float64
REGIONS_AT_ONCE = 256  # in one pass through the network
SHARE = 8  # a pass takes this part of the memory at most, for its results take the rest


@dataclass(frozen=True)
class Flip:
    """One unit whose gate changes at a breakpoint.

    Attributes:
        name: Name of the operation: that of its layer, or of the layer that it reads and its own,
            such as ``conv1.relu``.
        unit: Index of the unit in the operation's gates.
        before: The gate before the breakpoint: the number of the piece, 0 for the lowest, for a
            function of one number such as ReLU; the place of the winner for a maximum; the value
            of a mask.
        after: The gate after it.
    """

    name: str
    unit: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class RegionLine:
    r"""The linear regions of a network on the segment :math:`x(t) = start + t (end - start)`.

    The regions are the intervals between neighbouring points of :attr:`t`. Made by
    :func:`region_line`.

    Attributes:
        network: The network.
        start: First image, ``(C, H, W)``, in float64.
        end: Last image.
        t: Positions of the two ends and of all breakpoints, in order, ``(K + 1,)``.
        uncertainty: Uncertainty of each position: the rounding of the unit that crosses, divided
            by its slope along the segment. Breakpoints that are nearer to each other than their
            uncertainties are one, with all flips.
        memory: Bytes that the values along the segment may take.
    """

    network: Network
    start: Tensor
    end: Tensor
    t: Tensor
    uncertainty: Tensor
    memory: int
    found: Found
    walk: Walk

    def __repr__(self) -> str:
        done = "" if self.complete else f", up to t = {float(self.t[-1]):.3g}"
        return f"RegionLine({self.regions:,} regions{done})"

    @property
    def regions(self) -> int:
        """Number K of linear regions."""
        return len(self.t) - 1

    @property
    def complete(self) -> bool:
        """Whether the end of the segment was reached."""
        return float(self.t[-1]) == 1

    @property
    def middles(self) -> Tensor:
        """Position of the middle of each region, ``(K,)``."""
        return (self.t[:-1] + self.t[1:]) / 2

    @property
    def widths(self) -> Tensor:
        """Width of each region, ``(K,)``; they sum to 1 if the line is complete."""
        return self.t[1:] - self.t[:-1]

    def at(self, t: Tensor | float | int) -> Tensor:
        """Images at some positions, ``(*t.shape, C, H, W)``."""
        places = torch.as_tensor(t, dtype=self.t.dtype, device=self.t.device)
        # both ends are exact, so that lerp is taken from the nearer one
        return torch.lerp(
            self.start, self.end, places.view(*places.shape, *(1,) * self.start.dim())
        )

    # flips

    @cached_property
    def flips(self) -> list[list[Flip]]:
        """The gates that change at each of the K - 1 inner breakpoints, in the order of ``t``."""
        listed: list[list[Flip]] = [[] for _ in range(max(0, self.regions - 1))]
        inner = self.t[1:-1]
        for flips in self.found.flips:
            shape = self.walk.shapes[flips.step]
            places = torch.searchsorted(inner, flips.t)
            units = torch.stack(torch.unravel_index(flips.unit, shape), 1).tolist()
            name = self._names[flips.step]
            columns = (places, flips.t, flips.before, flips.after)
            rows = zip(units, *(column.tolist() for column in columns), strict=True)
            for unit, place, t, before, after in rows:
                if place < len(inner) and float(inner[place]) == t:
                    listed[place].append(Flip(name, tuple(unit), float(before), float(after)))
        return listed

    @cached_property
    def _names(self) -> list[str]:
        """Name of each step of the walk."""
        return step_names(self.network, self.walk.steps)

    def flips_by_operation(self) -> dict[str, int]:
        """Number of flips of each operation on the whole line, in the order of the network."""
        return {name: len(places) for name, places in self.flip_places().items()}

    def flip_places(self) -> dict[str, Tensor]:
        """Positions of the flips of each operation, in order, each as often as gates flip there."""
        inner = self.t[1:-1]
        found: dict[str, list[Tensor]] = {}
        for flips in sorted(self.found.flips, key=lambda flips: flips.step):
            found.setdefault(self._names[flips.step], []).append(
                flips.t[torch.isin(flips.t, inner)]
            )
        places = {name: torch.cat(parts).sort().values for name, parts in found.items()}
        return {name: those for name, those in places.items() if len(those)}

    @property
    def isolated(self) -> list[tuple[float, str]]:
        """Positions where a comparison such as ``==`` holds at one point alone, and its operation.

        They are no breakpoints: the regions on both sides are one.
        """
        found = [
            (t, self._names[isolated.step])
            for isolated in self.found.isolated
            for t in isolated.t.tolist()
        ]
        return sorted(set(found))

    # values

    def values(self, layer: str | nn.Module = OUTPUT) -> Tensor:
        """Values of a layer at both ends of each region, ``(K, 2, *units)``.

        They are the limits from inside the region. The layer is linear between them.

        Args:
            layer: Name of a layer, or a module of the model.

        Raises:
            ValueError: If there is no such layer.
        """
        chosen = self.network.layer(layer)
        self.network.check_unchanged()
        if not self.jumps_anywhere:
            values = record(self.network, self.at(self.t), [chosen]).outputs[chosen.name].detach()
            return torch.stack([values[:-1], values[1:]], 1)
        return self.limits(chosen.value)

    def limits(self, value: Value) -> Tensor:
        """Limits of a value of the program at both ends of each region, ``(K, 2, *shape)``."""
        return torch.cat([self._limits(value, part) for part in self._parts(REGIONS_AT_ONCE)])

    @property
    def jumps_anywhere(self) -> bool:
        """Whether an operation of the network jumps at its kinks, such as a comparison."""
        return has_jumps(self.walk.program)

    def _parts(self, most: int) -> list[slice]:
        """The regions in parts."""
        program = self.walk.program
        each = bytes_of_vector(held(program.steps), self.t.element_size())
        size = max(1, min(most, self.memory // SHARE // each))
        return [slice(k, k + size) for k in range(0, self.regions, size)]

    def _limits(self, value: Value, part: slice) -> Tensor:
        """Values at both ends of some regions, by the linear map of their middles."""
        with exact(self.t.device):
            pattern = pattern_of(self.network, self.at(self.middles[part]), 1.0)
            count = pattern.images
            ends = []
            for t in (self.t[:-1][part], self.t[1:][part]):
                given = {IMAGE: self.at(t)}
                for entry in pattern.program.entries:
                    given[entry.slot] = entry.value.expand(count, *entry.value.shape)
                ends.append(push(pattern, given, [value])[value.slot])
        found = [end if end is not None else self.t.new_zeros(count, *value.shape) for end in ends]
        return torch.stack(found, 1)

    def jumps(self, layer: str | nn.Module = OUTPUT) -> Tensor:
        """Jumps of a layer at every point of ``t``, ``(K + 1, *units)``.

        Inside it is the limit from the right minus the limit from the left. At the two ends it is
        the limit minus the model's own value, and the other way round. All are zero within
        rounding for a continuous network.

        Args:
            layer: Name of a layer, or a module of the model.

        Raises:
            ValueError: If there is no such layer.
        """
        chosen = self.network.layer(layer)
        limits = self.values(chosen.name)
        own = record(self.network, self.at(self.t[[0, -1]]), [chosen]).outputs[chosen.name]
        before = torch.cat([own[:1], limits[:, 1]])
        after = torch.cat([limits[:, 0], own[1:]])
        return (after - before).detach()

    # hyperplanes

    def hyperplanes(
        self,
        layer: str | nn.Module = OUTPUT,
        mode: str | None = None,
        units: Any = None,
        at: int | slice | Sequence[int] | Tensor = 0,
        **options: Any,
    ) -> Hyperplanes:
        """Hyperplanes in one or several regions, see :func:`adjointbackmap.hyperplanes`.

        Args:
            layer: Name of a layer, or a module of the model.
            mode: Reconstruction mode.
            units: Which units.
            at: Numbers of the regions. The images of the result are the middles of the regions.
            options: Further arguments of :func:`adjointbackmap.hyperplanes`.

        Raises:
            IndexError: If there is no such region.
            ValueError: If another argument does not fit.
        """
        numbers = torch.arange(self.regions, device=self.t.device)
        places = self.middles[numbers[at]].reshape(-1)
        options = {"dtype": FLOAT64, "memory": self.memory, **options}
        return hyperplanes(self.network, self.at(places), layer, mode, units, **options)

    # figure

    def plot(
        self,
        layer: str | nn.Module = OUTPUT,
        unit: tuple[int, ...] | int | None = None,
        names: Sequence[str] | None = None,
        title: str = "",
    ) -> Any:
        """Draw a unit, the class scores, the turn of the unit's hyperplane, and flips along t.

        Args:
            layer: Name of a layer, or a module of the model.
            unit: Index in the layer's output; by default the largest one at the start.
            names: Names of the classes.
            title: Heading of the figure.

        Returns:
            The Matplotlib figure.

        Raises:
            ValueError: If there is no such layer or unit.
        """
        from adjointbackmap.analysis.line_profile import line_profile

        return line_profile(self, layer, unit).draw(names, title)

    # going on

    def resume(
        self, regions: int | None = None, memory: str | float | int | None = None
    ) -> "RegionLine":
        """Go on where the line ends.

        Args:
            regions: Number of regions to stop at, with those that are finished; ``None`` for all.
            memory: Bytes, by default as before.

        Returns:
            A line that begins with the regions of this one.

        Raises:
            RuntimeError: If the model has changed since the trace.
        """
        self.network.check_unchanged()
        size = self.memory if memory is None else bytes_of(memory)
        return _walked(self.walk if memory is None else self._walk(size), self.found, regions, size)

    def _walk(self, memory: int) -> Walk:
        return Walk(self.network, self.start[None], self.end[None], memory)


def has_jumps(program: Program) -> bool:
    """Whether an operation jumps at its kinks, such as a comparison."""
    return any(kink.jumps for step in program.steps for kink in step.rule.kinks() or ())


def region_line(
    network: Network,
    start: Tensor,
    end: Tensor,
    memory: str | float | int | None = "2GiB",
    regions: int | None = None,
) -> RegionLine:
    r"""Every breakpoint of every gate and winner on the segment between two images, exactly.

    Between two neighbouring points all operations before a gate are affine. So the place where a
    unit :math:`c` meets its kink :math:`a` is
    :math:`t = t_0 + (t_1 - t_0) (a - c_0) / (c_1 - c_0)`. It becomes a new point, and the values
    of all earlier operations there are interpolated. For maxima the upper envelope of the
    candidates is taken, for sorted elements every change of order [Sotoudeh2019]. All numbers are
    float64.

    Breakpoints that are nearer to each other than their uncertainties are one breakpoint with
    several flips. Units that stay on their kink, such as those behind dead units, do not flip.

    Args:
        network: Traced piecewise-affine network.
        start: First image, ``(C, H, W)``.
        end: Last image.
        memory: Bytes for the values along the segment, or a size such as ``"2GiB"``. Longer
            segments are processed in parts.
        regions: Number of regions to stop at; ``None`` for all. See
            :meth:`adjointbackmap.RegionLine.resume`.

    Returns:
        The line. ``line.complete`` is false if it ends early.

    Raises:
        UnsupportedOperation: If the kinks of an operation are unknown.
        ValueError: If an image does not fit the network, or ``regions`` is not positive.
        RuntimeError: If the model has changed since the trace.

    Example:
        >>> from adjointbackmap import trace
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> _ = model[0].weight.data.fill_(1.0)
        >>> _ = model[0].bias.data.copy_(torch.tensor([-0.25, -0.5]))
        >>> line = region_line(trace(model, torch.zeros(1, 1)), torch.zeros(1), torch.ones(1))
        >>> line.t.tolist(), line.flips[0]
        ([0.0, 0.25, 0.5, 1.0], [Flip(name='1', unit=(0,), before=0.0, after=1.0)])
    """
    check_network(network)
    network.check_piecewise_affine("region_line")
    network.check_unchanged()
    first, last = (
        one_image(network, x, FLOAT64, name) for name, x in (("start", start), ("end", end))
    )
    if regions is not None and regions < 1:
        msg = f"regions must be at least 1. Got {regions}: give a number, or None for all regions."
        raise ValueError(msg)
    size = bytes_of(memory)
    zero = torch.zeros(1, dtype=FLOAT64, device=first.device)
    return _walked(Walk(network, first, last, size), Found(zero, zero.clone()), regions, size)


def _walked(walk: Walk, before: Found, regions: int | None, memory: int) -> RegionLine:
    """The line after a walk that goes on from what was found before."""
    found = Found(
        before.t, before.unsure, list(before.flips), list(before.isolated), dict(before.pending)
    )
    while float(found.t[-1]) < 1 and (regions is None or len(found.t) - 1 < regions):
        walk.run(found, regions)
        _drop_silent(found)
    return RegionLine(
        walk.network,
        walk.start[0],
        walk.end[0],
        found.t,
        found.unsure,
        memory,
        found,
        walk,
    )


def _drop_silent(found: Found) -> None:
    """Leave out points at which no gate changes, such as those of a comparison that is masked."""
    flipped = [flips.t for flips in found.flips]
    kept = torch.isin(found.t, torch.cat(flipped)) if flipped else torch.zeros_like(found.t) > 0
    kept[0] = kept[-1] = True
    found.t = found.t[kept]
    found.unsure = found.unsure[kept]
