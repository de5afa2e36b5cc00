"""The exact ways to the same hyperplanes: cotangents, unit tangents, coloured tangents, windowed tangents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.operators import basis, pull, push, reached
from adjointbackmap.engine.patches import Patches
from adjointbackmap.engine.pattern import ActivationPattern, pattern_of
from adjointbackmap.engine.program import IMAGE, KernelCall
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.engine.windows import put
from adjointbackmap.planes.planner import images_at_once, vectors_at_once
from adjointbackmap.planes.query import Query


@dataclass(frozen=True)
class Parts:
    """Image parts, and bias parts ``(N, *units, m)`` for the entries of ``b`` that the layer depends on."""

    image: Tensor | Patches
    bias: Tensor


def compute(queries: Sequence[Query], methods: Sequence[str]) -> list[Parts]:
    """The hyperplanes of queries at the same images, each by its method; all that are windowed share one sweep."""
    first = queries[0]
    most = min(vectors_at_once(q, method) for q, method in zip(queries, methods, strict=True))
    step = 1 if "windowed" in methods else images_at_once(queries, methods)
    found: list[list[Parts]] = [[] for _ in queries]
    windowed = [
        query for query, method in zip(queries, methods, strict=True) if method == "windowed"
    ]
    for start, images in enumerate(first.images.split(step)):
        pattern = pattern_of(first.network, images, first.scale, most)
        part = slice(start * step, start * step + len(images))
        with exact(images.device):
            swept = iter(_windowed(windowed, pattern))
            for query, method, parts in zip(queries, methods, found, strict=True):
                flat = query.units.numbers(part, len(images), images.device)
                parts.append(
                    next(swept) if method == "windowed" else _WAYS[method](query, pattern, flat)
                )
    return [_joined(query, parts) for query, parts in zip(queries, found, strict=True)]


def _joined(query: Query, parts: list[Parts]) -> Parts:
    """The parts of all images, in the shape of the selection."""
    shape = query.units.shape
    first = parts[0].image
    bias = _cat([p.bias for p in parts]).unflatten(1, shape or (1,))
    bias = bias if shape else bias[:, 0]
    if isinstance(first, Patches):
        values = _cat([p.image.values for p in parts if isinstance(p.image, Patches)])
        return Parts(Patches(values, first.corners, first.image), bias)
    image = _cat([p.image for p in parts if isinstance(p.image, Tensor)])
    image = image.reshape(len(image), *shape, *query.part_shape)
    return Parts(_as_patches(query, image) if query.in_patches else image, bias)


def _as_patches(query: Query, values: Tensor) -> Patches:
    """Image parts ``(N, *units, C, h, w)`` with the places where they lie."""
    _, rows, columns = query.network.in_shape
    return Patches(values, query.corners(), (rows, columns))


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# cotangents


def _adjoint(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """One cotangent per unit gives its hyperplane."""
    readout = query.readout
    rows_of_units = readout.rows
    if rows_of_units is not None:
        return _by_rows(query, pattern, rows_of_units.to(flat.device))
    step = pattern.chunk
    image, bias = _empty(query, pattern, flat.shape[1])
    for k in range(0, flat.shape[1], step):
        chosen = flat[:, k : k + step]
        cotangents = readout.cotangents(chosen.flatten(), pattern.dtype)
        rows, bias[:, k : k + step] = _pulled(query, pattern, cotangents)
        image[:, k : k + step] = _cut(query, rows, chosen[0])
    return Parts(image, bias)


def _by_rows(query: Query, pattern: ActivationPattern, rows: Tensor) -> Parts:
    """Cotangents for the rows of the kernel's input that units share, then each unit's weights of these."""
    readout = query.readout
    taps = query.readout.taps
    image, bias = _empty(query, pattern, len(rows))
    weights = cast("KernelCall", readout.kernel).rule.by_tap().to(pattern.dtype)
    flat = query.units.flat.flatten().to(rows.device)
    where = query.units.places(flat)
    distinct = rows.unique()
    order = rows.argsort(stable=True)
    units = order.split(rows.bincount(minlength=0)[distinct].tolist())  # those of each distinct row
    step = max(1, pattern.chunk // taps)
    for start in range(0, len(distinct), step):
        chosen = distinct[start : start + step]
        cotangents = readout.row_cotangents(chosen, pattern.dtype)
        seeds = {slot: _for_each_image(t, pattern.images) for slot, t in cotangents.items()}
        of_image, of_bias = (
            t.unflatten(1, (len(chosen), taps)) for t in _pulled(query, pattern, seeds)
        )
        for r in range(len(chosen)):
            those = units[start + r]
            kernels = weights[where["in_channel"][those], where["out_channel"][those]]
            seen = _cut(query, of_image[:, r], flat[those[:1]].expand(taps))
            image[:, those] = kernels @ seen
            bias[:, those] = kernels @ of_bias[:, r]
    return Parts(image, bias)


def _for_each_image(cotangents: Tensor, images: int) -> Tensor:
    return cotangents.expand(images, *cotangents.shape).flatten(0, 1) if images > 1 else cotangents


def _empty(query: Query, pattern: ActivationPattern, units: int) -> tuple[Tensor, Tensor]:
    """Room for the image parts and the bias parts of some units."""
    device = query.network.device
    image, bias = (
        torch.empty(pattern.images, units, n, dtype=pattern.dtype, device=device)
        for n in (prod(query.part_shape), query.readout.entries.numel())
    )
    return image, bias


def _pulled(
    query: Query, pattern: ActivationPattern, cotangents: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rows of the image ``(N, K, pixels)`` and of the entries that the layer depends on ``(N, K, m)``."""
    image, bias = (
        t.flatten(1).unflatten(0, (pattern.images, -1)) for t in pull(pattern, cotangents)
    )
    return image, bias[:, :, query.readout.entries]


def _cut(query: Query, rows: Tensor, flat: Tensor) -> Tensor:
    """Image parts ``(N, K, pixels)`` of units as they are kept."""
    channels, *image = query.network.in_shape
    if not query.in_patches or query.patches.size == tuple(image):
        return rows
    maps = F.pad(
        rows.unflatten(2, (channels, -1)), (0, 1)
    )  # one more number, the zero outside the image
    pixels = query.patches.pixels(query.units.positions(flat))
    return maps.gather(3, pixels[:, None].expand(*maps.shape[:3], -1)).flatten(2)


# tangents


def _basis(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """One tangent per scalar of [x; b] gives a column of every unit."""
    readout = query.readout
    pixels = prod(query.network.in_shape)
    image = torch.zeros(
        pattern.images, pixels, flat.shape[1], dtype=pattern.dtype, device=flat.device
    )
    for b in basis(pattern, {IMAGE} & reached(pattern.program, [readout.target])):
        out = push(pattern, b.tangents, [readout.source])[readout.source.slot]
        if out is not None:
            image[:, b.start : b.stop] = readout.columns(out, flat, pattern.images)
    return Parts(_cut(query, image.transpose(1, 2), flat[0]), _bias_columns([query], pattern)[0])


def _bias_columns(queries: Sequence[Query], pattern: ActivationPattern) -> list[Tensor]:
    """Bias parts of all units from one tangent per entry, which starts at its own layer: ``(N, units, m)`` for each query."""
    pixels = prod(queries[0].network.in_shape)
    device = queries[0].network.device
    readouts = [query.readout for query in queries]
    flats = [
        query.units.numbers(slice(0, pattern.images), pattern.images, device) for query in queries
    ]
    sources = [r.source for r in readouts]
    targets = [r.target for r in readouts]
    found = [
        torch.zeros(
            pattern.images, len(r.entries), r.units.count, dtype=pattern.dtype, device=device
        )
        for r in readouts
    ]
    for b in basis(pattern, reached(pattern.program, targets) - {IMAGE}):
        out = push(pattern, b.tangents, sources)
        for readout, flat, columns in zip(readouts, flats, found, strict=True):
            tangents = out[readout.source.slot]
            if tangents is not None:
                start = int(
                    torch.searchsorted(readout.entries, b.start - pixels)
                )  # [x; b] has the pixels first
                columns[:, start : start + b.stop - b.start] = readout.columns(
                    tangents, flat, pattern.images
                )
    return [columns.transpose(1, 2) for columns in found]


def _coloured(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """One tangent for all pixels that are congruent modulo the patch: no unit sees two of them [Curtis, Powell and Reid 1974]."""
    readout = query.readout
    geometry = query.patches
    (h, w) = geometry.size
    counts = geometry.counts
    channels = query.network.in_shape[0]
    # (images, rows and columns of the colour, in-channels, rows and columns of the position, out-channels)
    shape = (pattern.images, h, w, channels, *counts, readout.elements.shape[0])
    columns = torch.zeros(shape, dtype=pattern.dtype, device=flat.device)
    rows_of_box, columns_of_box = (slice(p.start, p.stop) for p in geometry.positions)
    by_colour = columns.view(pattern.images, -1, *shape[4:])
    for start, tangents in _colours(query, pattern):
        out = push(pattern, {IMAGE: tangents}, [readout.source])[readout.source.slot]
        if out is not None:
            units = readout.of_source(out)[:, :, rows_of_box, columns_of_box].movedim(1, -1)
            units = units.unflatten(0, (pattern.images, -1))
            by_colour[:, start : start + units.shape[1]] = units
    # pixel i of the patch of position u has the colour (corner of u + i) modulo the patch
    i, j = (
        patch.firsts(positions)[:, None] + torch.arange(patch.size)
        for patch, positions in zip(geometry.patches, geometry.positions, strict=True)
    )
    u, v = torch.meshgrid(*map(torch.arange, counts), indexing="ij")
    picked = columns[
        :, (i % h)[:, None, :, None], (j % w)[:, None], :, u[:, :, None, None], v[:, :, None, None]
    ]
    return Parts(_chosen(query, picked.movedim(4, 0)), _bias_columns([query], pattern)[0])


def _colours(query: Query, pattern: ActivationPattern) -> Iterator[tuple[int, Tensor]]:
    """Tangents ``(N * K, C, rows, columns)`` in chunks, each with the number of its first: by row, column, in-channel."""
    channels, rows, columns = query.network.in_shape
    h, w = query.patches.size
    step = pattern.chunk
    for start in range(0, h * w * channels, step):
        colour = torch.arange(start, min(start + step, h * w * channels))
        row, column, channel = torch.unravel_index(colour, (h, w, channels))
        shape = (len(colour), channels, rows, columns)
        tangents = torch.zeros(shape, dtype=pattern.dtype, device=query.network.device)
        for k, (a, b, c) in enumerate(
            zip(row.tolist(), column.tolist(), channel.tolist(), strict=True)
        ):
            tangents[k, c, a::h, b::w] = 1
        yield start, _for_each_image(tangents, pattern.images)


def _windowed(queries: Sequence[Query], pattern: ActivationPattern) -> list[Parts]:
    """One tangent per pixel and in-channel, on the windows that it reaches, for all queries in one sweep."""
    if not queries:
        return []
    readouts = [query.readout for query in queries]
    geometries = [query.patches for query in queries]
    after = [r.apart for r in readouts if r.apart]
    room = min((query.room for query in queries if query.room is not None), default=None)
    sweep = Sweep(pattern, [r.source for r in readouts], after, room)
    wholes = [_room(query, pattern) for query in queries]
    reaching = [geometry.reached() for geometry in geometries]
    pixels = [
        range(min(r.start for r in axis), max(r.stop for r in axis))
        for axis in zip(*reaching, strict=True)
    ]
    for group in sweep.groups(pixels):
        tangents = sweep.run(group)
        for readout, geometry, whole in zip(readouts, geometries, wholes, strict=True):
            found = tangents[readout.source.slot]
            units = sweep.step(group, readout.apart, [found]) if readout.apart else found
            put(whole, group, units, geometry.patches, geometry.positions)
    biases = _bias_columns(queries, pattern)
    return [
        Parts(_chosen(query, whole[None]), bias)
        for query, whole, bias in zip(queries, wholes, biases, strict=True)
    ]


def _room(query: Query, pattern: ActivationPattern) -> Tensor:
    """Zeros ``(rows, columns, patch rows, patch columns, in-channels, out-channels)``."""
    geometry = query.patches
    channels = query.network.in_shape[0]
    shape = (*geometry.counts, *geometry.size, channels, query.readout.elements.shape[0])
    return torch.zeros(shape, dtype=pattern.dtype, device=query.network.device)


def _chosen(query: Query, whole: Tensor) -> Patches:
    """Patches of the chosen units from all, ``(N, rows, columns, patch rows, patch columns, in-channels, out-channels)``."""
    by_unit = whole.movedim((5, 6), (4, 3)).unflatten(3, tuple(query.units.dims.values())[2:])
    if not query.units.is_box:
        rows, columns = query.patches.positions
        u, v, *rest = query.units.places(query.units.flat[0]).values()
        by_unit = by_unit[(slice(None), u - rows.start, v - columns.start, *rest)]
    return _as_patches(query, by_unit)


Way = Callable[[Query, ActivationPattern, Tensor], Parts]
_WAYS: dict[str, Way] = {"adjoint": _adjoint, "basis": _basis, "coloured": _coloured}
