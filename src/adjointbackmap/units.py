"""Which units of a layer: the dimensions of each reconstruction mode, and selections of units as NumPy makes them."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.network import Layer

SPATIAL_NAMES = {0: (), 1: ("out_col",), 2: ("out_row", "out_col"), 3: ("out_depth", "out_row", "out_col")}


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
        return {**{f"out_position_{i}": n for i, n in enumerate(positions)}, "out_feature": features}
    channels, *spatial = layer.out_shape
    where = dict(zip(SPATIAL_NAMES[len(spatial)], spatial, strict=True)) if mode in ("RM4", "RM2") else {}
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
    def is_everything(self) -> bool:
        """Whether it is every unit, in order."""
        return self.shape == tuple(self.dims.values()) and len(self.flat) == 1 and self.names == tuple(self.dims)

    def coordinates(self) -> dict[str, Tensor]:
        """Each unit's place along every dimension of the mode, of the shape of :attr:`flat`."""
        places = torch.unravel_index(self.flat, tuple(self.dims.values()))
        return dict(zip(self.dims, places, strict=True))


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
        >>> select({"out_row": 4, "out_col": 4, "out_channel": 2}, (0, slice(1, 3)), 1).shape
        (2, 2)
    """
    if isinstance(units, Tensor) and units.dim() == 3:
        return _own_units(dims, units, images)
    key = () if units is None else units if isinstance(units, tuple) else (units,)
    key = tuple(_part(k) for k in key)
    described = ", ".join(f"{name} of 0 to {n - 1}" for name, n in dims.items())
    if len(key) > len(dims):
        msg = f"units must be a tuple over {described}. Got {len(key)} parts."
        raise ValueError(msg)
    try:
        flat = np.arange(prod(dims.values())).reshape(tuple(dims.values()))[key]
    except IndexError as error:
        msg = f"units must lie in {described}. Got {units}: {error}."
        raise ValueError(msg) from error
    if not np.size(flat):
        msg = f"units must name at least one unit of {described}. Got {units}, which is none."
        raise ValueError(msg)
    return Selection(dims, torch.as_tensor(np.asarray(flat, np.int64))[None], _names(tuple(dims), key))


def _own_units(dims: dict[str, int], units: Tensor, images: int) -> Selection:
    extents = torch.tensor(tuple(dims.values()))
    if units.shape[0] != images or units.shape[2] != len(dims) or units.is_floating_point():
        shape = f"({images}, K, {len(dims)})"
        msg = f"units of each image must be integers of shape {shape}. Got {tuple(units.shape)} of {units.dtype}."
        raise ValueError(msg)
    if ((units.cpu() < 0) | (units.cpu() >= extents)).any() or not units.numel():
        msg = f"units must lie in {', '.join(f'{n} of 0 to {e - 1}' for n, e in dims.items())}. Got others, or none."
        raise ValueError(msg)
    flat = torch.zeros(units.shape[:2], dtype=torch.int64)
    for place, extent in zip(units.cpu().unbind(2), extents.tolist(), strict=True):
        flat = flat * extent + place
    return Selection(dims, flat, ("unit",))


def _part(part: Any) -> Any:
    if isinstance(part, slice):
        return part
    array = np.asarray(part.cpu() if isinstance(part, Tensor) else part)
    if array.dtype.kind not in "iu":
        msg = f"units must be ints, slices or integer arrays. Got {part!r}."
        raise ValueError(msg)
    return int(array) if array.ndim == 0 else array


def _names(dims: tuple[str, ...], key: tuple) -> tuple[str, ...]:
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
