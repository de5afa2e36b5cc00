"""Which units of a layer: the dimensions of each reconstruction mode, and selections of units as NumPy makes them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.engine.network import Layer

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
AT_ONCE = 2**16  # units whose numbers are looked at together
LONGEST_SHOWN = 80  # characters of an argument in a message
AXES = {0: (), 1: ("col",), 2: ("row", "col"), 3: ("depth", "row", "col")}


def axis_names(count: int, prefix: str = "") -> tuple[str, ...]:
    """Names of the spatial axes of an image or a map.

    Args:
        count: How many there are.
        prefix: Put before each name.

    Example:
        >>> axis_names(2, "out_"), axis_names(4)
        (('out_row', 'out_col'), ('axis_0', 'axis_1', 'axis_2', 'axis_3'))
    """
    return tuple(
        prefix + name for name in AXES.get(count, tuple(f"axis_{i}" for i in range(count)))
    )


def is_position(name: str) -> bool:
    """Whether a unit dimension is an axis of a map.

    Args:
        name: Of the dimension.
    """
    return name in axis_names(3, "out_") or name.startswith("out_axis_")


def input_names(spatial: int) -> tuple[str, ...]:
    """Names of the dimensions of one input.

    Args:
        spatial: How many of them are not the channel.
    """
    return ("channel", *axis_names(spatial)) if spatial else ("feature",)


def unit_dims(layer: Layer, mode: str, in_channels: int = 0) -> dict[str, int]:
    """Unit dimensions of a mode and their extents, in the order in which units are indexed.

    Args:
        layer: The layer.
        mode: One of its modes.
        in_channels: In-channels that one of its out-channels sees, for RM4 and RM3.

    Raises:
        ValueError: If the layer does not have the mode.
    """
    if mode not in layer.modes:
        msg = f"Layer {layer.name!r} has the modes {', '.join(layer.modes)}. Got {mode!r}: choose one of these."
        raise ValueError(msg)
    if mode == "RM0":
        return {"out_feature": layer.out_shape[0]}
    if layer.kernel is not None and layer.modes == ("RM2",):  # a linear layer with positions
        *positions, features = layer.out_shape
        return {
            **{f"out_position_{i}": n for i, n in enumerate(positions)},
            "out_feature": features,
        }
    channels, *spatial = layer.out_shape
    where = (
        dict(zip(axis_names(len(spatial), "out_"), spatial, strict=True))
        if mode in ("RM4", "RM2")
        else {}
    )
    merged = {"in_channel": in_channels} if mode in ("RM4", "RM3") else {}
    return {**where, **merged, "out_channel": channels}


@dataclass(frozen=True)
class Selection:
    """Units chosen from a mode's dimensions.

    Attributes:
        dims: Unit dimensions of the mode and their extents.
        flat: Number of each unit in the mode's dimensions, ``(1, *shape)`` or, where images differ, ``(N, *shape)``.
        names: Names of the dimensions that are left, one for each of ``shape``.
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
        """Units for each image."""
        return prod(self.shape)

    @property
    def is_shared(self) -> bool:
        """Whether all images have the same units."""
        return len(self.flat) == 1

    @cached_property
    def is_everything(self) -> bool:
        """Whether it is every unit, in order."""
        named = self.names == tuple(self.dims)
        if not named or not self.is_shared or self.count != prod(self.dims.values()):
            return False
        starts = range(0, self.count, AT_ONCE)
        expected = (torch.arange(n, min(n + AT_ONCE, self.count)) for n in starts)
        return all(torch.equal(p.cpu(), e) for p, e in zip(self.parts(), expected, strict=True))

    def parts(self) -> Iterator[Tensor]:
        """Numbers of the units in parts, as a layer in RM4 has millions of units.

        What is computed of all numbers at once would take several times the memory of a block.
        """
        return iter(self.flat.flatten().split(AT_ONCE))

    @property
    def is_box(self) -> bool:
        """Whether the units are all of those at the positions between the outermost, in order; for units on maps."""
        if not self.is_shared:
            return False
        extents = list(self.dims.values())
        ranges = [*self.box, *map(range, extents[len(self.box) :])]
        if self.shape != tuple(map(len, ranges)):
            return False
        box = torch.zeros((), dtype=torch.int64)  # number of each unit of the box, (*ranges)
        for places, extent in zip(ranges, extents, strict=True):
            box = (box * extent)[..., None] + torch.arange(places.start, places.stop)
        return torch.equal(self.flat[0].cpu(), box)

    @cached_property
    def box(self) -> tuple[range, ...]:
        """The positions along each axis of a map, from the first chosen one to the last."""
        ends = [
            [(int(p.min()), int(p.max())) for p in self.positions(part)] for part in self.parts()
        ]
        axes = (zip(*along, strict=True) for along in zip(*ends, strict=True))
        return tuple(range(min(first), max(last) + 1) for first, last in axes)

    def coordinates(self) -> dict[str, Tensor]:
        """Each unit's place along every dimension of the mode, of the shape of :attr:`flat`."""
        return self.places(self.flat)

    def places(self, flat: Tensor) -> dict[str, Tensor]:
        """Places along the mode's dimensions of units that are given by their numbers."""
        along = torch.unravel_index(flat, tuple(self.dims.values()))
        return dict(zip(self.dims, along, strict=True))

    def positions(self, flat: Tensor) -> list[Tensor]:
        """Positions on a map, along each of its axes, of units that are given by their numbers."""
        return [p for name, p in self.places(flat).items() if is_position(name)]

    def numbers(self, images: slice, count: int, device: torch.device) -> Tensor:
        """Numbers of the units of some images, ``(count, units)``."""
        flat = self.flat.reshape(len(self.flat), -1).to(device)
        return (flat if self.is_shared else flat[images]).expand(count, -1)

    def in_order(self, maps: Tensor) -> Tensor:
        """A layer's elements ``(N, C, *positions)`` in the order of the units, ``(N, *positions, C)``."""
        return maps.movedim(1, -1) if "out_channel" in self.dims else maps

    def of_images(self, images: slice, units: tuple[slice, ...] = ()) -> "Selection":
        """The units of some images, and a part of them along each dimension that is left."""
        part = self.flat[slice(None) if self.is_shared else images]
        return replace(self, flat=part[:, *units])


def select(dims: dict[str, int], units: Any, images: int) -> Selection:
    """Choose units as NumPy indexing does: ints drop their dimension, arrays combine pointwise.

    Args:
        dims: Unit dimensions and their extents.
        units: ``None`` for all; an int, slice or integer array, or a tuple of these over the dimensions; or a tensor
            ``(N, K, d)`` that gives each of N images its own K units.
        images: Number of images N.

    Raises:
        ValueError: If a unit is out of range, or the selection is none of these or empty.

    Example:
        >>> select({"out_row": 4, "out_col": 4, "out_channel": 2}, (0, slice(3, 0, -1)), 1).shape
        (3, 2)
    """
    if isinstance(units, Tensor) and units.dim() == 3:
        return _own_units(dims, units, images)
    key = () if units is None else units if isinstance(units, tuple) else (units,)
    described = _described(dims)
    if len(key) > len(dims):
        msg = f"units must be a tuple over {described}. Got {len(key)} parts: give at most {len(dims)}."
        raise ValueError(msg)
    key = tuple(_part(k, n, described) for k, n in zip(key, dims.values(), strict=False))
    try:
        flat = np.arange(prod(dims.values())).reshape(tuple(dims.values()))[key]
    except IndexError as error:
        msg = f"units must lie in {described}. Got {shown(units)}: {error}."
        raise ValueError(msg) from error
    if not np.size(flat):
        msg = (
            f"units must name at least one unit of {described}. Got {shown(units)}, which is none."
        )
        raise ValueError(msg)
    # a copy, for a slice with a negative step is a view that PyTorch cannot take
    numbers = torch.from_numpy(np.array(flat, dtype=np.int64, order="C"))
    return Selection(dims, numbers[None], _names(tuple(dims), key))


def shown(value: object) -> str:
    """A value that came, on one line of a message."""
    line = " ".join(repr(value).split())
    return line if len(line) <= LONGEST_SHOWN else f"{line[: LONGEST_SHOWN - 3]}..."


def _described(dims: dict[str, int]) -> str:
    return ", ".join(f"{name} of 0 to {n - 1}" for name, n in dims.items())


def _own_units(dims: dict[str, int], units: Tensor, images: int) -> Selection:
    extents = torch.tensor(tuple(dims.values()))
    fits = units.shape[0] == images and units.shape[2] == len(dims)
    if not fits or units.dtype not in INTEGERS:
        shape = f"({images}, K, {len(dims)})"
        msg = f"units of each image must be integers of shape {shape}. Got {tuple(units.shape)} of {units.dtype}."
        raise ValueError(msg)
    places = units.cpu().long()
    if ((places < 0) | (places >= extents)).any() or not units.numel():
        msg = f"units must lie in {_described(dims)}. Got others, or none."
        raise ValueError(msg)
    flat = torch.zeros(units.shape[:2], dtype=torch.int64)
    for place, extent in zip(places.unbind(2), extents.tolist(), strict=True):
        flat = flat * extent + place
    return Selection(dims, flat, ("unit",))


def _part(part: Any, extent: int, described: str) -> Any:
    """One part of a selection, for NumPy.

    Raises:
        ValueError: If it is no int, slice or integer array.
    """
    try:
        if isinstance(part, slice):
            part.indices(extent)  # raises on a step of 0 and on what is no integer
            return part
        array = np.asarray(part.cpu() if isinstance(part, Tensor) else part)
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)
    if array.size == 0 and array.dtype.kind == "f":  # NumPy's type of an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        advice = (
            "take nonzero() of the mask"
            if array.dtype.kind == "b" and array.ndim
            else f"choose {described}"
        )
        msg = f"units must be ints, slices or integer arrays. Got {shown(part)}: {advice}."
        raise ValueError(msg)
    if array.dtype.kind == "u":  # NumPy would take the largest of them for -1
        array = array.clip(max=extent).astype(np.int64)
    return int(array) if array.ndim == 0 else array


def _names(dims: tuple[str, ...], key: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of the dimensions that NumPy leaves: arrays become ``unit``, where NumPy puts their dimension."""
    full = (*key, *(slice(None),) * (len(dims) - len(key)))
    sliced = [isinstance(part, slice) for part in full]
    arrays = [part for part in full if isinstance(part, np.ndarray)]
    if not arrays:
        return tuple(name for name, kept in zip(dims, sliced, strict=True) if kept)
    merged = tuple("unit" if i == 0 else f"unit_{i}" for i in range(np.broadcast(*arrays).ndim))
    advanced = [i for i, kept in enumerate(sliced) if not kept]
    together = advanced[-1] - advanced[0] + 1 == len(advanced)
    before = [n for i, n in enumerate(dims) if sliced[i] and together and i < advanced[0]]
    after = [n for i, n in enumerate(dims) if sliced[i] and n not in before]
    return (*before, *merged, *after)
