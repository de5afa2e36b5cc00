"""Hyperplanes from windowed cotangents: the adjoint method on the parts of maps that units see."""

import torch
from torch import Tensor

from adjointbackmap.engine.cotangent_windows import CotangentWindows, moved_to, window_of
from adjointbackmap.engine.operators import pull
from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.windows import Span
from adjointbackmap.planes.planner import cheapest_tiling
from adjointbackmap.planes.query import Query


def of_windows(query: Query, pattern: ActivationPattern) -> tuple[Tensor, Tensor]:
    """Image parts on patches ``(N, units, C, h, w)`` and bias parts ``(N, units, m)``.

    The units at the positions of a tile share the windows of their cotangents.
    """
    tiling = cheapest_tiling(query)
    at_once = max(1, tiling.at_once // pattern.images)
    count = query.units.count
    shapes = (query.part_shape, query.readout.entries.shape)
    image, bias = (
        torch.empty(pattern.images, count, *s, dtype=pattern.dtype, device=query.network.device)
        for s in shapes
    )
    for tile in tiling.tiles(query):
        windows = CotangentWindows(pattern, query.target, window_of(tile.positions))
        for units in tile.units.split(at_once):
            rows, bias[:, units] = _pulled(query, windows, units)
            _put_patches(query, windows, units, rows, image)
    return image, bias


def _pulled(query: Query, windows: CotangentWindows, units: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of some units on the image's window ``(N, K, C, h, w)``, and of biases."""
    images = windows.pattern.images
    seeds = _seeds(query, windows, query.units.flat.flatten()[units])
    seeds = seeds.expand(images, *seeds.shape).flatten(0, 1)
    image, bias = pull(windows.pattern, {query.target.slot: seeds}, windows)
    image, bias = (t.unflatten(0, (images, -1)) for t in (image, bias))
    return image, bias[:, :, query.readout.entries]


def _seeds(query: Query, windows: CotangentWindows, flat: Tensor) -> Tensor:
    """A cotangent that is 1 at each unit, on the window of the layer: ``(K, C, h, w)``."""
    dtype = windows.pattern.dtype
    shape = (len(flat), *windows.shape(query.target))
    seeds = torch.zeros(shape, dtype=dtype, device=query.network.device)
    *positions, channel = query.units.places(flat).values()
    window = windows.window(query.target)
    inside = [place - span.first for place, span in zip(positions, window, strict=True)]
    seeds[(torch.arange(len(flat)), channel, *inside)] = 1
    return seeds


def _put_patches(
    query: Query, windows: CotangentWindows, units: Tensor, rows: Tensor, image: Tensor
) -> None:
    """Write the patch of each unit.

    Args:
        query: The query.
        windows: The windows that the units share.
        units: Indices of the units among the chosen ones, those of a position together.
        rows: Their image parts on the window of the image, ``(N, units, C, h, w)``.
        image: The patches of all chosen units, which are written into.
    """
    window = windows.window(query.program.image)
    places = torch.stack(query.units.positions(query.units.flat.flatten()[units]), 1)
    positions, counts = places.unique_consecutive(dim=0, return_counts=True)
    parts = zip(
        positions.tolist(),
        units.split(counts.tolist()),
        rows.split(counts.tolist(), 1),
        strict=True,
    )
    for position, those, part in parts:
        axes = zip(query.patches.patches, position, strict=True)
        patch = [Span(s.first + s.step * place, s.size, 0) for s, place in axes]
        found = moved_to(part.flatten(0, 1), window, patch)
        image[:, those] = found.unflatten(0, (len(rows), len(those)))
