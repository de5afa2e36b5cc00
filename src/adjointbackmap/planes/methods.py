"""Five methods that give the same hyperplanes exactly.

They use cotangents, unit tangents, coloured tangents, windowed tangents or windowed cotangents.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.operators import (
    Basis,
    basis,
    pull,
    push,
    reached,
    threads_of_tangents,
)
from adjointbackmap.engine.patches import Patches
from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import IMAGE, KernelCall
from adjointbackmap.engine.result_memory import lazy_zeros
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.engine.threads import in_threads, one_thread
from adjointbackmap.engine.windows import Group, put
from adjointbackmap.planes.planner import images_per_batch, vectors_at_once
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.windowed_adjoint import of_windows


@dataclass(frozen=True)
class Parts:
    """The two parts of hyperplanes.

    Attributes:
        image: Image parts, as patches or on whole images.
        bias: Bias parts ``(N, *units, m)`` for the entries of ``b`` on which the layer depends.
    """

    image: Tensor | Patches
    bias: Tensor


def compute_parts(queries: Sequence[Query], methods: Sequence[str]) -> list[Parts]:
    """The hyperplanes of queries at the same images.

    All queries with the windowed method share one sweep.

    Args:
        queries: The queries.
        methods: The method of each query.
    """
    first = queries[0]
    pairs = list(zip(queries, methods, strict=True))
    most = min(vectors_at_once(query, method) for query, method in pairs)
    # a windowed sweep takes one image at a time
    step = 1 if "windowed" in methods else images_per_batch(queries, methods)
    windowed = [query for query, method in pairs if method == "windowed"]
    found: list[list[Parts]] = [[] for _ in queries]
    for start in range(0, len(first.images), step):
        part = slice(start, start + step)
        with one_thread(first.images.device) if windowed else nullcontext():
            pattern = first.pattern_at(part, most)
        with exact(first.images.device):
            swept = iter(_windowed(windowed, pattern))
            for (query, method), parts in zip(pairs, found, strict=True):
                if method == "windowed":
                    parts.append(next(swept))
                else:
                    flat = query.units.numbers(part, pattern.images, first.images.device)
                    parts.append(_WAYS[method](query, pattern, flat))
    return [_parts_of_all_images(query, parts) for query, parts in zip(queries, found, strict=True)]


def _parts_of_all_images(query: Query, parts: list[Parts]) -> Parts:
    """The parts of all images, in the shape of the selection."""
    shape = query.units.shape
    first = parts[0].image
    # unflatten takes no empty shape, that of one unit chosen by ints
    bias = _cat([p.bias for p in parts]).unflatten(1, shape or (1,))
    bias = bias if shape else bias[:, 0]
    if isinstance(first, Patches):
        values = _cat([p.image.values for p in parts if isinstance(p.image, Patches)])
        return Parts(Patches(values, first.corners, first.image), bias)
    image = _cat([p.image for p in parts if isinstance(p.image, Tensor)])
    image = image.reshape(len(image), *shape, *query.part_shape)
    return Parts(_as_patches(query, image) if query.in_patches else image, bias)


def _as_patches(query: Query, values: Tensor) -> Patches:
    """Image parts ``(N, *units, C, h, w)`` as patches with their corners on the image."""
    _, rows, columns = query.network.in_shape
    return Patches(values, query.corners(), (rows, columns))


def _cat(parts: list[Tensor]) -> Tensor:
    """Tensors joined along their first axis; a single one is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# cotangents


def _adjoint(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """The hyperplanes of units, each from one cotangent."""
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
        image[:, k : k + step] = _on_patches(query, rows, chosen[0])
    return Parts(image, bias)


def _by_rows(query: Query, pattern: ActivationPattern, rows: Tensor) -> Parts:
    """The hyperplanes of units that share rows of the kernel's input.

    Each row and tap has a cotangent. The hyperplane of a unit is a sum over the taps of its row,
    weighted by its kernel.
    """
    readout = query.readout
    taps = query.readout.taps
    image, bias = _empty(query, pattern, len(rows))
    # (in-channels, out-channels, taps)
    weights = cast("KernelCall", readout.kernel).rule.by_tap().to(pattern.dtype)
    flat = query.units.flat.flatten().to(rows.device)
    where = query.units.places(flat)
    distinct = rows.unique()
    # units sorted by row, then split into those of each distinct row
    order = rows.argsort(stable=True)
    units = order.split(rows.bincount(minlength=0)[distinct].tolist())
    step = max(1, pattern.chunk // taps)
    for start in range(0, len(distinct), step):
        chosen = distinct[start : start + step]
        cotangents = readout.row_cotangents(chosen, pattern.dtype)
        seeds = {slot: _for_each_image(t, pattern.images) for slot, t in cotangents.items()}
        # (N, rows, taps, pixels) and (N, rows, taps, m)
        of_image, of_bias = (
            t.unflatten(1, (len(chosen), taps)) for t in _pulled(query, pattern, seeds)
        )
        for r in range(len(chosen)):
            those = units[start + r]
            kernels = weights[where["in_channel"][those], where["out_channel"][those]]
            # the units of a row have one patch: that of the first, for each tap
            seen = _on_patches(query, of_image[:, r], flat[those[:1]].expand(taps))
            image[:, those] = kernels @ seen
            bias[:, those] = kernels @ of_bias[:, r]
    return Parts(image, bias)


def _for_each_image(vectors: Tensor, images: int) -> Tensor:
    """The same vectors ``(K, ...)`` for each image, ``(images * K, ...)``."""
    return vectors.expand(images, *vectors.shape).flatten(0, 1) if images > 1 else vectors


def _empty(query: Query, pattern: ActivationPattern, units: int) -> tuple[Tensor, Tensor]:
    """Tensors without values for the image parts and the bias parts of some units."""
    device = query.network.device
    image, bias = (
        torch.empty(pattern.images, units, length, dtype=pattern.dtype, device=device)
        for length in (prod(query.part_shape), query.readout.entries.numel())
    )
    return image, bias


def _pulled(
    query: Query, pattern: ActivationPattern, cotangents: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Cotangents ``(N * K, ...)`` pulled back to the image and to the biases.

    Returns:
        ``(N, K, pixels)`` for the whole image, and ``(N, K, m)`` for the entries of ``b`` on which
        the layer depends.
    """
    pulled = pull(pattern, cotangents)
    image, bias = (t.flatten(1).unflatten(0, (pattern.images, -1)) for t in pulled)
    return image, bias[:, :, query.readout.entries]


def _on_patches(query: Query, rows: Tensor, flat: Tensor) -> Tensor:
    """Image parts of units as they are stored: cut to patches, or whole.

    Args:
        query: The query.
        rows: Image parts on the whole image, ``(N, K, channels * pixels)``.
        flat: Numbers of the units, ``(K,)``.
    """
    channels, *image = query.network.in_shape
    if not query.in_patches or query.patches.size == tuple(image):
        return rows
    # pixels outside the image have the number after the last pixel: a zero is put there
    maps = F.pad(rows.unflatten(2, (channels, -1)), (0, 1))  # (N, K, channels, pixels + 1)
    pixels = query.patches.pixels(query.units.positions(flat))
    return maps.gather(3, pixels[:, None].expand(*maps.shape[:3], -1)).flatten(2)


def _windowed_adjoint(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """The hyperplanes of units, each from one cotangent on the windows that the unit sees."""
    return Parts(*of_windows(query, pattern))


# tangents


def _basis(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """The hyperplanes of units from one tangent per scalar of [x; b].

    Each tangent gives one number of every unit's hyperplane.
    """
    readout = query.readout
    shape = (pattern.images, prod(query.network.in_shape), flat.shape[1])  # (N, pixels, units)
    image = torch.zeros(shape, dtype=pattern.dtype, device=flat.device)
    for b in basis(pattern, {IMAGE} & reached(pattern.program, [readout.target])):
        out = push(pattern, b.tangents, [readout.source])[readout.source.slot]
        if out is not None:
            image[:, b.start : b.stop] = readout.columns(out, flat, pattern.images)
    parts = _on_patches(query, image.transpose(1, 2), flat[0])
    return Parts(parts, _bias_columns([query], pattern)[0])


def _bias_columns(queries: Sequence[Query], pattern: ActivationPattern) -> list[Tensor]:
    """Bias parts of all units, ``(N, units, m)`` for each query, from one tangent per bias entry.

    A tangent starts at the layer of its bias.
    """
    images = pattern.images
    pixels = prod(queries[0].network.in_shape)
    device = queries[0].network.device
    readouts = [query.readout for query in queries]
    flats = [query.units.numbers(slice(0, images), images, device) for query in queries]
    sources = [r.source for r in readouts]
    targets = [r.target for r in readouts]
    found = []
    for r in readouts:
        shape = (images, len(r.entries), r.units.count)
        found.append(lazy_zeros(shape, pattern.dtype, device))
    parts = basis(pattern, reached(pattern.program, targets) - {IMAGE})

    def compute(b: Basis) -> None:
        out = push(pattern, b.tangents, sources)
        for readout, flat, columns in zip(readouts, flats, found, strict=True):
            tangents = out[readout.source.slot]
            if tangents is not None:
                # [x; b] has the pixels first; then the index among the entries of this layer
                start = int(torch.searchsorted(readout.entries, b.start - pixels))
                stop = start + b.stop - b.start
                columns[:, start:stop] = readout.columns(tangents, flat, images)

    room = min((query.room for query in queries if query.room is not None), default=None)
    for _ in in_threads(compute, parts, threads_of_tangents(pattern, sources, room)):
        pass
    return [columns.transpose(1, 2) for columns in found]


def _coloured(query: Query, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """The hyperplanes of units from one tangent for all pixels that are congruent modulo the patch.

    No unit sees two of these pixels [Curtis, Powell and Reid 1974].
    """
    readout = query.readout
    geometry = query.patches
    (h, w) = geometry.size
    counts = geometry.counts
    channels = query.network.in_shape[0]
    # images; row, column and in-channel of the colour; row and column of the position; out-channels
    shape = (pattern.images, h, w, channels, *counts, readout.elements.shape[0])
    columns = torch.zeros(shape, dtype=pattern.dtype, device=flat.device)
    rows_of_box, columns_of_box = (slice(p.start, p.stop) for p in geometry.positions)
    by_colour = columns.view(pattern.images, -1, *shape[4:])  # one axis for all colours
    for start, tangents in _colours(query, pattern):
        out = push(pattern, {IMAGE: tangents}, [readout.source])[readout.source.slot]
        if out is not None:
            # channels last, as the units have them
            units = readout.of_source(out)[:, :, rows_of_box, columns_of_box].movedim(1, -1)
            units = units.unflatten(0, (pattern.images, -1))
            by_colour[:, start : start + units.shape[1]] = units
    # Pixel i of the patch of position u has the colour (corner of u + i) modulo the patch:
    # i is (rows of positions, patch rows), j is (columns of positions, patch columns).
    i, j = (
        patch.firsts(positions)[:, None] + torch.arange(patch.size)
        for patch, positions in zip(geometry.patches, geometry.positions, strict=True)
    )
    u, v = torch.meshgrid(*map(torch.arange, counts), indexing="ij")
    row_colours = (i % h)[:, None, :, None]  # (rows, columns, patch rows, patch columns)
    column_colours = (j % w)[:, None]  # the same axes, without the first
    rows = u[:, :, None, None]
    cols = v[:, :, None, None]
    # Index arrays on both sides of a slice: NumPy's rule puts their four axes first, then images,
    # in-channels and out-channels. The images go to the front.
    picked = columns[:, row_colours, column_colours, :, rows, cols]
    return Parts(_patches_of_units(query, picked.movedim(4, 0)), _bias_columns([query], pattern)[0])


def _colours(query: Query, pattern: ActivationPattern) -> Iterator[tuple[int, Tensor]]:
    """Coloured tangents in chunks, each with the number of its first colour.

    A chunk is ``(N * K, C, rows, columns)``. Colours are ordered by row, column and in-channel.
    """
    channels, rows, columns = query.network.in_shape
    h, w = query.patches.size
    count = h * w * channels
    for start in range(0, count, pattern.chunk):
        colour = torch.arange(start, min(start + pattern.chunk, count))
        shape = (len(colour), channels, rows, columns)
        tangents = torch.zeros(shape, dtype=pattern.dtype, device=query.network.device)
        places = torch.stack(torch.unravel_index(colour, (h, w, channels)), 1).tolist()
        for k, (row, column, channel) in enumerate(places):
            tangents[k, channel, row::h, column::w] = 1
        yield start, _for_each_image(tangents, pattern.images)


def _windowed(queries: Sequence[Query], pattern: ActivationPattern) -> list[Parts]:
    """The hyperplanes of several queries at one image, in one sweep.

    There is one tangent per pixel and in-channel, only on the windows that it reaches.
    """
    if not queries:
        return []
    readouts = [query.readout for query in queries]
    geometries = [query.patches for query in queries]
    after = [r.apart for r in readouts if r.apart]
    room = min((query.room for query in queries if query.room is not None), default=None)
    sweep = Sweep(pattern, [r.source for r in readouts], after, room)
    wholes = [_blank_patches(query, pattern) for query in queries]
    # rows and columns of the image that belong to a patch of any query
    by_axis = zip(*(geometry.reached() for geometry in geometries), strict=True)
    pixels = [_hull(ranges) for ranges in by_axis]

    def compute(group: Group) -> None:
        tangents = sweep.run(group)
        for readout, geometry, whole in zip(readouts, geometries, wholes, strict=True):
            found = tangents[readout.source.slot]
            units = sweep.step(group, readout.apart, [found]) if readout.apart else found
            put(whole, group, units, geometry.patches, geometry.positions)

    # the groups write to different pixels of the patches
    for _ in in_threads(compute, sweep.groups(pixels), sweep.threads):
        pass
    biases = _bias_columns(queries, pattern)
    return [
        Parts(_patches_of_units(query, whole[None]), bias)
        for query, whole, bias in zip(queries, wholes, biases, strict=True)
    ]


def _hull(ranges: Sequence[range]) -> range:
    """The smallest range that has all of some ranges."""
    return range(min(r.start for r in ranges), max(r.stop for r in ranges))


def _blank_patches(query: Query, pattern: ActivationPattern) -> Tensor:
    """Zeros ``(rows, columns, patch rows, patch columns, in-channels, out-channels)``."""
    geometry = query.patches
    channels = query.network.in_shape[0]
    shape = (*geometry.counts, *geometry.size, channels, query.readout.elements.shape[0])
    return lazy_zeros(shape, pattern.dtype, query.network.device)


def _patches_of_units(query: Query, whole: Tensor) -> Patches:
    """Patches of the chosen units.

    Args:
        query: The query.
        whole: Patches of all units in the box, ``(N, rows, columns, patch rows, patch columns,
            in-channels, out-channels)``.
    """
    # (N, rows, columns, unit dimensions after the position, in-channels, patch rows, patch columns)
    by_unit = whole.movedim((5, 6), (4, 3)).unflatten(3, tuple(query.units.dims.values())[2:])
    if not query.units.is_box:
        rows, columns = query.patches.positions
        u, v, *rest = query.units.places(query.units.flat[0]).values()
        by_unit = by_unit[(slice(None), u - rows.start, v - columns.start, *rest)]
    return _as_patches(query, by_unit)


Way = Callable[[Query, ActivationPattern, Tensor], Parts]
# The methods that take one query at a time; a windowed sweep takes several.
_WAYS: dict[str, Way] = {
    "adjoint": _adjoint,
    "basis": _basis,
    "coloured": _coloured,
    "windowed-adjoint": _windowed_adjoint,
}
