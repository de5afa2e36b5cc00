"""A network at one image: what is kept, so that the hyperplane of a unit takes milliseconds."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.engine.layers import OUTPUT, Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import Recorded
from adjointbackmap.engine.pattern import ActivationPattern, record_pattern
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.planes.single import Box, SingleHyperplane
from adjointbackmap.rules import Field
from adjointbackmap.rules.field import Axis, Number

DRAWN_AXES = 3  # dimensions of a layer that is drawn as tiles: channels, rows, columns


@dataclass(frozen=True, eq=False)
class Held:
    """A network at one image.

    Attributes:
        pattern: The activation pattern at the image, and what the model computes in each layer.
    """

    pattern: ActivationPattern

    @classmethod
    def of(cls, network: Network, x: Tensor, dtype: torch.dtype | None = None) -> "Held":
        """Run the model once, and record the activation pattern once.

        Args:
            network: Traced network.
            x: One image, ``(1, C, H, W)``.
            dtype: Precision; by default the model's.
        """
        pattern = record_pattern(network, x, dtype=dtype)
        pattern.recorded(network.distinct_layers())
        return cls(pattern)

    @property
    def network(self) -> Network:
        """The network."""
        return self.pattern.network

    @property
    def x(self) -> Tensor:
        """The image, ``(C, H, W)``."""
        return self.pattern.x[0]

    @property
    def recorded(self) -> Recorded:
        """What the untouched model computes in each layer."""
        return self.pattern.recorded(())

    @cached_property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        gates = [gate for found in self.pattern.gates.values() for gate in found]
        maps = [*self.recorded.inputs.values(), *self.recorded.outputs.values()]
        return sum(t.numel() * t.element_size() for t in (*gates, *maps, self.pattern.x))

    def maps(self, layer: Layer) -> Tensor:
        """What a layer computes, as tiles ``(tiles, rows, columns)``."""
        found = self.recorded.outputs[layer.name][0]
        return found.reshape(tiles_of(layer))

    def planes(self, layer: str, mode: str | None, units: Any) -> Hyperplanes:
        """Hyperplanes of units of a layer, see :func:`adjointbackmap.hyperplanes`."""
        pattern = self.pattern
        return hyperplanes(
            self.network, pattern.x, layer, mode, units, dtype=pattern.dtype, pattern=pattern
        )

    def single(self, layer: str, mode: str | None, unit: tuple[int, ...]) -> SingleHyperplane:
        """The hyperplane of one unit.

        Raises:
            ValueError: If there is no such unit.
        """
        planes = self.planes(layer, mode, unit)
        if planes.units.count != 1:
            names = ", ".join(planes.units.dims)
            msg = f"A unit must be one number for each of {names}. Got {unit}: give all of them."
            raise ValueError(msg)
        return planes.single()

    def scores(self) -> Tensor | None:
        """The outputs of the model; ``None`` if they are not flat."""
        found = self.recorded.outputs[self.output.name][0]
        return found if found.dim() == 1 else None

    @cached_property
    def output(self) -> Layer:
        """The layer that is the output, under the name of its kernel if it has one."""
        slot = self.network.layers[OUTPUT].value.slot
        return next(a for a in self.network.distinct_layers() if a.value.slot == slot)


def tiles_of(layer: Layer) -> tuple[int, int, int]:
    """How a layer is drawn: number of tiles, and their rows and columns.

    A map has a tile for each channel. Numbers without a position have a tile each.
    """
    if layer.kernel is not None and layer.modes == ("RM2",):  # a linear layer with positions
        return (1, layer.out_shape[0], layer.out_shape[-1])
    channels, *spatial = layer.out_shape
    rows, columns = (1, 1, *spatial)[-2:]
    return (channels, rows, columns)


def is_drawn(layer: Layer) -> bool:
    """Whether a layer can be drawn as tiles: volumes cannot."""
    return len(layer.out_shape) <= DRAWN_AXES and (
        layer.modes != ("RM2",) or len(layer.out_shape) == 2
    )


def cone_of(plane: SingleHyperplane) -> dict[int, tuple[slice, ...] | None]:
    """Which part of each earlier value can reach a unit.

    A position of a map can reach the unit if its receptive field lies in that of the unit.

    Returns:
        Slot -> a slice along each axis of its map; ``None`` for all of it.
    """
    network = plane.network
    program = network.program(plane.x.dtype)
    value = network.layer(plane.layer).value
    ends = _whole_field(program.fields[value.slot], plane)
    found: dict[int, tuple[slice, ...] | None] = {}
    for step in program.upstream([value]):
        field = program.fields[step.output.slot]
        extents = step.output.shape[1:]
        if ends is None or not field or len(extents) != len(field):
            found[step.output.slot] = None
            continue
        # the field of position p reaches from p * step + low to p * step + high
        found[step.output.slot] = tuple(
            _inside(axis, first, last, n)
            for axis, (first, last), n in zip(field, ends, extents, strict=True)
        )
    return found


def _whole_field(field: Field, plane: SingleHyperplane) -> list[tuple[Number, Number]] | None:
    """First and last pixel of a unit's field along each axis, not cut to the image."""
    places = [n for name, n in plane.place.items() if name in ("out_row", "out_col")]
    if not field or len(places) != len(field):
        return None
    pairs = zip(field, places, strict=True)
    return [(p * axis.step + axis.low, p * axis.step + axis.high) for axis, p in pairs]


def _inside(axis: Axis, first: Number, last: Number, extent: int) -> slice:
    """The positions along an axis whose fields lie between two pixels."""
    if axis.step == 0:
        return slice(0, extent)
    start = max(0, ceil((first - axis.low) / axis.step))
    stop = min(extent, floor((last - axis.high) / axis.step) + 1)
    return slice(start, max(start, stop))


def box_of(plane: SingleHyperplane) -> Box:
    """The receptive field: first row, first column, rows and columns."""
    return plane.field or (0, 0, *plane.x.shape[1:])
