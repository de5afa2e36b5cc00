"""Units of a layer: the dimensions of each reconstruction mode, and the selection of units.

Units are selected in the way in which NumPy indexes arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.display import ShownFields
from adjointbackmap.engine.layers import Layer

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Units in one step of a computation over unit numbers; a step then needs about a megabyte.
UNITS_AT_ONCE = 2**16
# Most characters of an argument in a message, so that the message stays one sentence.
LONGEST_SHOWN = 80
# Number of spatial axes -> their names.
AXIS_NAMES = {0: (), 1: ("col",), 2: ("row", "col"), 3: ("depth", "row", "col")}


def axis_names(count: int, prefix: str = "") -> tuple[str, ...]:
    """Names of the spatial axes of an image or a map.

    Args:
        count: Number of axes.
        prefix: Text before each name.

    Example:
        >>> axis_names(2, "out_"), axis_names(4)
        (('out_row', 'out_col'), ('axis_0', 'axis_1', 'axis_2', 'axis_3'))
    """
    numbered = tuple(f"axis_{i}" for i in range(count))
    return tuple(prefix + name for name in AXIS_NAMES.get(count, numbered))


def is_position(name: str) -> bool:
    """Whether a unit dimension is an axis of a map.

    Args:
        name: Name of the dimension.
    """
    return name in axis_names(3, "out_") or name.startswith("out_axis_")


def input_names(spatial: int) -> tuple[str, ...]:
    """Names of the dimensions of one input.

    Args:
        spatial: Number of dimensions besides the channel.
    """
    return ("channel", *axis_names(spatial)) if spatial else ("feature",)


def unit_dims(layer: Layer, mode: str, in_channels: int = 0) -> dict[str, int]:
    """Unit dimensions of a mode and their extents, in the order of an index of units.

    Args:
        layer: The layer.
        mode: One of its modes.
        in_channels: Number of in-channels that one out-channel reads, for RM4 and RM3.

    Raises:
        ValueError: If the layer does not have the mode.
    """
    if mode not in layer.modes:
        msg = (
            f"Layer {layer.name!r} has the modes {', '.join(layer.modes)}. "
            f"Got {mode!r}: choose one of these."
        )
        raise ValueError(msg)
    if mode == "RM0":
        return {"out_feature": layer.out_shape[0]}
    if layer.kernel is not None and layer.modes == ("RM2",):  # a linear layer with positions
        *positions, features = layer.out_shape
        dims = {f"out_position_{i}": n for i, n in enumerate(positions)}
        return {**dims, "out_feature": features}
    channels, *spatial = layer.out_shape
    dims = {}
    if mode in ("RM4", "RM2"):
        dims = dict(zip(axis_names(len(spatial), "out_"), spatial, strict=True))
    if mode in ("RM4", "RM3"):
        dims["in_channel"] = in_channels
    return {**dims, "out_channel": channels}


@dataclass(frozen=True, repr=False)
class Selection(ShownFields):
    """Units chosen from a mode's dimensions.

    Attributes:
        dims: Unit dimensions of the mode and their extents.
        flat: Number of each unit, in the row-major order of ``dims``: ``(1, *shape)``, or
            ``(N, *shape)`` if each image has its own units.
        names: Names of the dimensions of ``shape``. A dimension indexed with an int is not there.
    """

    dims: dict[str, int]
    flat: Tensor
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the selection for one image."""
        return tuple(self.flat.shape[1:])

    @property
    def count(self) -> int:
        """Number of units of each image."""
        return prod(self.shape)

    @property
    def is_shared(self) -> bool:
        """Whether all images have the same units."""
        return len(self.flat) == 1

    @cached_property
    def is_everything(self) -> bool:
        """Whether the selection is every unit, in order."""
        named = self.names == tuple(self.dims)
        if not named or not self.is_shared or self.count != prod(self.dims.values()):
            return False
        starts = range(0, self.count, UNITS_AT_ONCE)
        expected = (torch.arange(n, min(n + UNITS_AT_ONCE, self.count)) for n in starts)
        return all(torch.equal(p.cpu(), e) for p, e in zip(self.parts(), expected, strict=True))

    def parts(self) -> Iterator[Tensor]:
        """Numbers of the units, in parts.

        A layer in RM4 has millions of units. A computation over all numbers at once would take
        several times the memory of a block.
        """
        return iter(self.flat.flatten().split(UNITS_AT_ONCE))

    @property
    def is_box(self) -> bool:
        """Whether the units are all units at the positions of :attr:`box`, in order.

        For units on maps.
        """
        if not self.is_shared:
            return False
        extents = list(self.dims.values())
        # the positions of the box, then all channels
        ranges = [*self.box, *map(range, extents[len(self.box) :])]
        if self.shape != tuple(map(len, ranges)):
            return False
        # number of each unit of the box: a dimension longer with each step, (*ranges) at the end
        box = torch.zeros((), dtype=torch.int64)
        for places, extent in zip(ranges, extents, strict=True):
            box = (box * extent)[..., None] + torch.arange(places.start, places.stop)
        return torch.equal(self.flat[0].cpu(), box)

    @cached_property
    def box(self) -> tuple[range, ...]:
        """The smallest box of positions that has all chosen units: a range for each axis."""
        return self.box_of(*self.parts())

    def box_of(self, *parts: Tensor) -> tuple[range, ...]:
        """The smallest box of positions of the units with some numbers, see :attr:`box`.

        Args:
            *parts: Numbers of units, in parts.
        """
        ends = [_first_and_last(self.positions(part)) for part in parts]
        # from a list of parts, each with all axes, to a list of axes, each with all parts
        by_axis = [zip(*of_parts, strict=True) for of_parts in zip(*ends, strict=True)]
        return tuple(range(min(first), max(last) + 1) for first, last in by_axis)

    def coordinates(self) -> dict[str, Tensor]:
        """Index of each unit along every dimension of the mode, in the shape of :attr:`flat`."""
        return self.places(self.flat)

    def labelled(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Coordinates for xarray: name of a mode's dimension -> its dimensions and its values.

        A dimension of :attr:`shape` has its own indices along it. Another dimension of the mode has
        a value for each unit.
        """
        labels: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name, places in self.coordinates().items():
            if name in self.names:
                # (extent of this dimension, all others); the index is the same along all others
                along = places[0].movedim(self.names.index(name), 0)
                labels[name] = ((name,), along.reshape(len(along), -1)[:, 0].numpy())
            elif self.is_shared:
                labels[name] = (self.names, places[0].numpy())
            else:
                labels[name] = (("n", *self.names), places.numpy())
        return labels

    def places(self, flat: Tensor) -> dict[str, Tensor]:
        """Indices along the mode's dimensions of the units with these numbers."""
        # the last dimension is the fastest; torch.unravel_index takes three times as long
        along = []
        for extent in reversed(self.dims.values()):
            along.append(flat % extent)
            flat = flat // extent
        return dict(zip(self.dims, reversed(along), strict=True))

    def positions(self, flat: Tensor) -> list[Tensor]:
        """Positions along each axis of the map of the units with these numbers."""
        return [p for name, p in self.places(flat).items() if is_position(name)]

    def numbers(self, images: slice, count: int, device: torch.device) -> Tensor:
        """Numbers of the units of some images, ``(count, units)``."""
        flat = self.flat.reshape(len(self.flat), -1).to(device)
        return (flat if self.is_shared else flat[images]).expand(count, -1)

    def in_order(self, maps: Tensor) -> Tensor:
        """A layer's elements in the order of its units: channels last if the layer has any.

        From ``(N, C, *positions)`` to ``(N, *positions, C)``.
        """
        return maps.movedim(1, -1) if "out_channel" in self.dims else maps

    def of_images(self, images: slice, units: tuple[slice, ...] = ()) -> "Selection":
        """The units of some images, cut to a slice along each dimension of :attr:`shape`."""
        part = self.flat[slice(None) if self.is_shared else images]
        return replace(self, flat=part[:, *units])


def select(dims: dict[str, int], units: Any, images: int) -> Selection:
    """Choose units as NumPy indexing does: ints drop their dimension, arrays combine pointwise.

    Args:
        dims: Unit dimensions and their extents.
        units: ``None`` for all; an int, slice or integer array, or a tuple of these over the
            dimensions; or a tensor ``(N, K, d)`` with K units for each of N images.
        images: Number of images N.

    Raises:
        ValueError: If a unit is out of range, or the selection is empty or of another kind.

    Example:
        >>> select({"out_row": 4, "out_col": 4, "out_channel": 2}, (0, slice(3, 0, -1)), 1).shape
        (3, 2)
    """
    if isinstance(units, Tensor) and units.dim() == 3:
        return _own_units(dims, units, images)
    key = () if units is None else units if isinstance(units, tuple) else (units,)
    described = _ranges(dims)
    if len(key) > len(dims):
        msg = (
            f"units must be a tuple over {described}. "
            f"Got {len(key)} parts: give at most {len(dims)}."
        )
        raise ValueError(msg)
    extents = tuple(dims.values())
    key = tuple(_index_part(k, n, described) for k, n in zip(key, extents, strict=False))
    try:
        flat = np.arange(prod(extents)).reshape(extents)[key]
    except IndexError as error:
        msg = f"units must lie in {described}. Got {shown(units)}: {error}."
        raise ValueError(msg) from error
    if not np.size(flat):
        msg = (
            f"units must name at least one unit of {described}. Got {shown(units)}, which is none."
        )
        raise ValueError(msg)
    # PyTorch takes no view with a negative stride, which a slice with a negative step makes: copy
    numbers = torch.from_numpy(np.array(flat, dtype=np.int64, order="C"))
    return Selection(dims, numbers[None], _names_left(tuple(dims), key))


def shown(value: object) -> str:
    """A given value on one line of a message, without the rest of a long one."""
    line = " ".join(repr(value).split())
    return line if len(line) <= LONGEST_SHOWN else f"{line[: LONGEST_SHOWN - 3]}..."


def _first_and_last(positions: list[Tensor]) -> list[tuple[int, int]]:
    """First and last position along each axis."""
    return [(int(p.min()), int(p.max())) for p in positions]


def _ranges(dims: dict[str, int]) -> str:
    """The valid indices along each dimension, for a message."""
    return ", ".join(f"{name} of 0 to {n - 1}" for name, n in dims.items())


def _own_units(dims: dict[str, int], units: Tensor, images: int) -> Selection:
    """The selection of a tensor ``(N, K, d)`` with K units for each image.

    Raises:
        ValueError: If its shape or dtype is another, or a unit is out of range.
    """
    extents = torch.tensor(tuple(dims.values()))
    fits = units.shape[0] == images and units.shape[2] == len(dims)
    if not fits or units.dtype not in INTEGERS:
        msg = (
            f"units of each image must be integers of shape ({images}, K, {len(dims)}). "
            f"Got {tuple(units.shape)} of {units.dtype}."
        )
        raise ValueError(msg)
    places = units.cpu().long()
    if ((places < 0) | (places >= extents)).any() or not units.numel():
        msg = f"units must lie in {_ranges(dims)}. Got others, or none."
        raise ValueError(msg)
    # number of a unit: row-major over the dimensions, (N, K)
    flat = torch.zeros(units.shape[:2], dtype=torch.int64)
    for place, extent in zip(places.unbind(2), extents.tolist(), strict=True):
        flat = flat * extent + place
    return Selection(dims, flat, ("unit",))


def _index_part(part: Any, extent: int, described: str) -> Any:
    """The selection along one dimension, as NumPy takes it.

    Raises:
        ValueError: If it is no int, slice or integer array.
    """
    try:
        if isinstance(part, slice):
            part.indices(extent)  # raises for a step of 0 and for ends that are no integers
            return part
        array = np.asarray(part.cpu() if isinstance(part, Tensor) else part)
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)  # of no allowed type: refused below
    if array.size == 0 and array.dtype.kind == "f":  # NumPy's type of an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        is_mask = array.dtype.kind == "b" and array.ndim
        advice = "take nonzero() of the mask" if is_mask else f"choose {described}"
        msg = f"units must be ints, slices or integer arrays. Got {shown(part)}: {advice}."
        raise ValueError(msg)
    if array.dtype.kind == "u":  # as int64 the largest unsigned number would be -1, a valid index
        array = array.clip(max=extent).astype(np.int64)
    return int(array) if array.ndim == 0 else array


def _names_left(dims: tuple[str, ...], key: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of the dimensions of a selection, in NumPy's order.

    A slice keeps the name of its dimension, and an int drops it. Arrays together give one
    dimension, called ``unit``, or several. These stand in the place of the first array or int if
    all arrays and ints are next to each other, otherwise they come first.
    """
    full = (*key, *(slice(None),) * (len(dims) - len(key)))
    sliced = [isinstance(part, slice) for part in full]
    arrays = [part for part in full if isinstance(part, np.ndarray)]
    if not arrays:
        return tuple(name for name, kept in zip(dims, sliced, strict=True) if kept)
    merged = tuple("unit" if i == 0 else f"unit_{i}" for i in range(np.broadcast(*arrays).ndim))
    advanced = [i for i, kept in enumerate(sliced) if not kept]  # dimensions of ints and arrays
    together = advanced[-1] - advanced[0] + 1 == len(advanced)
    before = [n for i, n in enumerate(dims) if sliced[i] and together and i < advanced[0]]
    after = [n for i, n in enumerate(dims) if sliced[i] and n not in before]
    return (*before, *merged, *after)
