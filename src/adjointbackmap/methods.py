"""The exact ways to the same hyperplanes: cotangents, unit tangents, coloured tangents, windowed tangents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.arithmetic import exact
from adjointbackmap.jobs import IMAGES_AT_ONCE, Job
from adjointbackmap.operators import basis, pull, push, reached
from adjointbackmap.patches import Patches, Side
from adjointbackmap.pattern import ActivationPattern, record_pattern
from adjointbackmap.program import IMAGE
from adjointbackmap.windows import Group, Span, Sweep, Tangents, Windows, pixels_reaching

METHODS = ("adjoint", "basis", "coloured", "windowed")


@dataclass(frozen=True)
class Parts:
    """Image parts, and bias parts ``(N, *units, m)`` for the entries of ``b`` that the layer depends on."""

    image: Tensor | Patches
    bias: Tensor


def compute(jobs: Sequence[Job], images: Tensor, scale: float, methods: Sequence[str]) -> list[Parts]:
    """The hyperplanes of jobs at some images, each by its method; all that are windowed share one sweep."""
    step = 1 if "windowed" in methods else IMAGES_AT_ONCE
    found: list[list[Parts]] = [[] for _ in jobs]
    for start, part in enumerate(images.split(step)):
        pattern = record_pattern(jobs[0].network, part, scale, images.dtype)
        with exact(images.device):
            swept = iter(_windowed([j for j, method in zip(jobs, methods, strict=True) if method == "windowed"], pattern))
            for job, method, parts in zip(jobs, methods, found, strict=True):
                flat = job.flat_of(start * step, len(part))
                parts.append(next(swept) if method == "windowed" else _WAYS[method](job, pattern, flat))
    return [_joined(job, parts) for job, parts in zip(jobs, found, strict=True)]


def _joined(job: Job, parts: list[Parts]) -> Parts:
    """The parts of all images, in the shape of the selection."""
    shape, first = job.selection.shape, parts[0].image
    bias = _cat([p.bias for p in parts]).unflatten(1, shape or (1,))
    bias = bias if shape else bias[:, 0]
    if isinstance(first, Patches):
        return Parts(
            Patches(_cat([p.image.values for p in parts if isinstance(p.image, Patches)]), first.corners, first.image), bias
        )
    image = _cat([p.image for p in parts if isinstance(p.image, Tensor)])
    image = image.reshape(len(image), *shape, *job.part)
    rows, columns = job.network.in_shape[1:] if job.in_patches else (0, 0)
    return Parts(Patches(image, job.corners(), (rows, columns)) if job.in_patches else image, bias)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# cotangents


def _adjoint(job: Job, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """One cotangent per unit gives its hyperplane."""
    if job.rows is not None:
        return _by_rows(job, pattern, job.rows.to(flat.device))
    step = pattern.chunk
    image, bias = _empty(job, pattern, flat.shape[1])
    for k in range(0, flat.shape[1], step):
        chosen = flat[:, k : k + step]
        rows, bias[:, k : k + step] = _pulled(job, pattern, job.cotangents(chosen.flatten(), pattern.dtype))
        image[:, k : k + step] = _cut(job, rows, chosen[0])
    return Parts(image, bias)


def _by_rows(job: Job, pattern: ActivationPattern, rows: Tensor) -> Parts:
    """Cotangents for the rows of the kernel's input that units share, then each unit's weights of these."""
    image, bias = _empty(job, pattern, len(rows))
    weights = job.kernel.rule.by_tap().to(pattern.dtype)
    flat = job.selection.flat.flatten().to(rows.device)
    where = job.places(flat)
    distinct, order = rows.unique(), rows.argsort(stable=True)
    units = order.split(rows.bincount(minlength=0)[distinct].tolist())
    step = max(1, pattern.chunk // job.taps)
    for start in range(0, len(distinct), step):
        chosen = distinct[start : start + step]
        seeds = {slot: _for_each_image(t, pattern.images) for slot, t in job.row_cotangents(chosen, pattern.dtype).items()}
        rows_of_image, rows_of_bias = (t.unflatten(1, (len(chosen), job.taps)) for t in _pulled(job, pattern, seeds))
        for r in range(len(chosen)):
            those = units[start + r]
            kernels = weights[where["in_channel"][those], where["out_channel"][those]]
            seen = _cut(job, rows_of_image[:, r], flat[those[:1]].expand(job.taps))
            image[:, those], bias[:, those] = kernels @ seen, kernels @ rows_of_bias[:, r]
    return Parts(image, bias)


def _for_each_image(cotangents: Tensor, images: int) -> Tensor:
    return cotangents.expand(images, *cotangents.shape).flatten(0, 1) if images > 1 else cotangents


def _empty(job: Job, pattern: ActivationPattern, units: int) -> tuple[Tensor, Tensor]:
    sizes = (prod(job.part), job.entries.numel())
    image, bias = (torch.empty(pattern.images, units, n, dtype=pattern.dtype, device=job.network.device) for n in sizes)
    return image, bias


def _pulled(job: Job, pattern: ActivationPattern, cotangents: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of the image ``(N, K, pixels)`` and of the entries that the layer depends on ``(N, K, m)``."""
    image, bias = (t.flatten(1).unflatten(0, (pattern.images, -1)) for t in pull(pattern, cotangents))
    return image, bias[:, :, job.entries]


def _cut(job: Job, rows: Tensor, flat: Tensor) -> Tensor:
    """Image parts ``(N, K, pixels)`` of units as they are kept."""
    if not job.in_patches or job.part == job.network.in_shape:
        return rows
    maps = F.pad(rows.unflatten(2, (job.network.in_shape[0], -1)), (0, 1))
    return maps.gather(3, job.pixels_of(flat)[:, None].expand(*maps.shape[:3], -1)).flatten(2)


# tangents


def _basis(job: Job, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """One tangent per scalar of [x; b] gives a column of every unit."""
    pixels = prod(job.network.in_shape)
    image = torch.zeros(pattern.images, pixels, flat.shape[1], dtype=pattern.dtype, device=flat.device)
    for b in basis(pattern, {IMAGE} & reached(pattern.program, [job.target])):
        out = push(pattern, b.tangents, [job.source])[job.source.slot]
        if out is not None:
            image[:, b.start : b.stop] = job.columns(out, flat, pattern.images)
    return Parts(_cut(job, image.transpose(1, 2), flat[0]), _bias_columns([job], pattern)[0])


def _bias_columns(jobs: Sequence[Job], pattern: ActivationPattern) -> list[Tensor]:
    """Bias parts of all units from one tangent per entry, which starts at its own layer: ``(N, units, m)`` for each job."""
    pixels, flats = prod(jobs[0].network.in_shape), [job.flat_of(0, pattern.images) for job in jobs]
    sources, targets = [job.source for job in jobs], [job.target for job in jobs]
    found = [
        torch.zeros(pattern.images, len(job.entries), job.count, dtype=pattern.dtype, device=flat.device)
        for job, flat in zip(jobs, flats, strict=True)
    ]
    for b in basis(pattern, reached(pattern.program, targets) - {IMAGE}):
        out = push(pattern, b.tangents, sources)
        for job, flat, columns in zip(jobs, flats, found, strict=True):
            tangents = out[job.source.slot]
            if tangents is not None:
                start = int(torch.searchsorted(job.entries, b.start - pixels))
                columns[:, start : start + b.stop - b.start] = job.columns(tangents, flat, pattern.images)
    return [columns.transpose(1, 2) for columns in found]


def _coloured(job: Job, pattern: ActivationPattern, flat: Tensor) -> Parts:
    """One tangent for all pixels that are congruent modulo the patch: no unit sees two of them [Curtis, Powell and Reid 1974]."""
    sizes, channels = [side.size for side in job.sides], job.network.in_shape[0]
    shape = (pattern.images, *sizes, channels, *(side.count for side in job.sides), job.end.shape[0])
    columns = torch.zeros(shape, dtype=pattern.dtype, device=flat.device)
    box = [slice(side.first, side.first + side.count) for side in job.sides]
    by_colour = columns.view(pattern.images, -1, *shape[4:])
    for start, tangents in _colours(job, pattern):
        out = push(pattern, {IMAGE: tangents}, [job.source])[job.source.slot]
        if out is not None:
            units = job.finished(out)[:, :, box[0], box[1]].movedim(1, -1).unflatten(0, (pattern.images, -1))
            by_colour[:, start : start + units.shape[1]] = units
    (i, j), (u, v) = ([side.corners()[:, None] + torch.arange(side.size) for side in job.sides], _positions(job.sides))
    picked = columns[:, (i % sizes[0])[:, None, :, None], (j % sizes[1])[:, None], :, u[:, :, None, None], v[:, :, None, None]]
    return Parts(_patches(job, picked.movedim(4, 0)), _bias_columns([job], pattern)[0])


def _positions(sides: Sequence[Side]) -> list[Tensor]:
    """Numbers of the positions along each axis, ``(rows, columns)``."""
    return list(torch.meshgrid(*(torch.arange(side.count) for side in sides), indexing="ij"))


def _colours(job: Job, pattern: ActivationPattern) -> Iterator[tuple[int, Tensor]]:
    """Tangents ``(N * K, C, rows, columns)`` in chunks, each with the number of its first: by row, column, in-channel."""
    channels, rows, columns = job.network.in_shape
    h, w = (side.size for side in job.sides)
    step = pattern.chunk
    for start in range(0, h * w * channels, step):
        colour = torch.arange(start, min(start + step, h * w * channels))
        row, column, channel = torch.unravel_index(colour, (h, w, channels))
        tangents = torch.zeros(len(colour), channels, rows, columns, dtype=pattern.dtype, device=job.network.device)
        for k, (a, b, c) in enumerate(zip(row.tolist(), column.tolist(), channel.tolist(), strict=True)):
            tangents[k, c, a::h, b::w] = 1
        yield start, _for_each_image(tangents, pattern.images)


def _windowed(jobs: Sequence[Job], pattern: ActivationPattern) -> list[Parts]:
    """One tangent per pixel and in-channel, on the windows that it reaches, for all jobs in one sweep."""
    if not jobs:
        return []
    sweep = Sweep(pattern, [job.source for job in jobs], [job.last for job in jobs if job.last])
    wholes = [_room(job, pattern) for job in jobs]
    reaching = [pixels_reaching(job.sides, job.network.in_shape[1:]) for job in jobs]
    pixels = [range(min(r.start for r in axis), max(r.stop for r in axis)) for axis in zip(*reaching, strict=True)]
    for group in sweep.groups(pixels):
        tangents = sweep.run(group)
        for job, whole in zip(jobs, wholes, strict=True):
            found = tangents[job.source.slot]
            _put(whole, group, sweep.step(group, job.last, [found]) if job.last else found, job.sides)
    biases = _bias_columns(jobs, pattern)
    return [Parts(_patches(job, whole[None]), bias) for job, whole, bias in zip(jobs, wholes, biases, strict=True)]


def _room(job: Job, pattern: ActivationPattern) -> Tensor:
    """Zeros ``(rows, columns, patch rows, patch columns, in-channels, out-channels)``."""
    counts, sizes = [side.count for side in job.sides], [side.size for side in job.sides]
    shape = (*counts, *sizes, job.network.in_shape[0], job.end.shape[0])
    return torch.zeros(shape, dtype=pattern.dtype, device=job.network.device)


def _patches(job: Job, whole: Tensor) -> Patches:
    """Patches of the chosen units from all, ``(N, rows, columns, patch rows, patch columns, in-channels, out-channels)``."""
    rows, columns = (job.network.in_shape[1], job.network.in_shape[2])
    by_unit = whole.movedim((5, 6), (4, 3)).unflatten(3, tuple(job.selection.dims.values())[2:])
    if not job.is_box:
        u, v, *rest = job.places(job.selection.flat[0]).values()
        by_unit = by_unit[(slice(None), u - job.sides[0].first, v - job.sides[1].first, *rest)]
    return Patches(by_unit, job.corners(), (rows, columns))


@dataclass(frozen=True)
class _Piece:
    """Pixels ``n`` of a group along one axis whose windows reach the same positions ``low`` to ``high`` of the window."""

    n: range
    low: int
    high: int


def _pieces(group: Group, axis: int, span: Span, side: Side) -> list[_Piece]:
    """The part of each window that lies at the wanted positions and inside their patches."""
    pieces: list[_Piece] = []
    for n in range(group.count[axis]):
        position = span.first + n * span.shift - side.first
        within = _within(group, axis, n, span, side)
        low, high = max(0, -position), min(span.size, side.count - position)
        if side.step:
            low, high = max(low, (within - side.size) // side.step + 1), min(high, within // side.step + 1)
        elif not 0 <= within < side.size:
            continue
        if low >= high:
            continue
        if pieces and (pieces[-1].low, pieces[-1].high, pieces[-1].n.stop) == (low, high, n):
            pieces[-1] = _Piece(range(pieces[-1].n.start, n + 1), low, high)
        else:
            pieces.append(_Piece(range(n, n + 1), low, high))
    return pieces


def _within(group: Group, axis: int, n: int, span: Span, side: Side) -> int:
    """Where in the patch of its window's first position a pixel is."""
    pixel = group.first[axis] + n * group.stride[axis]
    return pixel - side.start - side.step * (span.first + n * span.shift)


def _put(whole: Tensor, group: Group, tangents: Tangents, sides: Sequence[Side]) -> None:
    """Put a group's tangents to the patches that hold its pixels: a place is linear in the pixel and the window's position."""
    if tangents is None:
        return
    on_maps = [Span(0, n, 0) for n in tangents.shape[2:]] if isinstance(tangents, Tensor) else []
    spans = tangents.spans if isinstance(tangents, Windows) else on_maps
    tensor = tangents.tensor if isinstance(tangents, Windows) else tangents
    rows = tensor.movedim(1, -1).unflatten(0, (*group.count, -1)).movedim(2, 4)  # (n, m, row, column, channel, unit)
    across, down = (_pieces(group, a, spans[a], sides[a]) for a in (1, 0))
    for r in down:
        for c in across:
            views = [_view(whole, group, a, piece, spans[a], sides[a]) for a, piece in ((0, r), (1, c))]
            (first, n, u, sn, su), (second, m, v, sm, sv) = views
            into = whole.as_strided((n, m, u, v, *whole.shape[4:]), (sn, sm, su, sv, *whole.stride()[4:]), first + second)
            into.copy_(rows[r.n.start : r.n.stop, c.n.start : c.n.stop, r.low : r.high, c.low : c.high])


def _view(whole: Tensor, group: Group, axis: int, piece: _Piece, span: Span, side: Side) -> tuple[int, int, int, int, int]:
    """Where a piece lies along an axis of the patches: offset, pixels, positions, and how far apart these are."""
    by_position, by_pixel = whole.stride(axis), whole.stride(2 + axis)
    n, count = piece.n.start, piece.high - piece.low
    position = span.first + n * span.shift + piece.low - side.first
    within = _within(group, axis, n, span, side) - side.step * piece.low
    next_pixel = span.shift * by_position + (group.stride[axis] - side.step * span.shift) * by_pixel
    next_position = by_position - side.step * by_pixel if count > 1 else 0
    return position * by_position + within * by_pixel, len(piece.n), count, next_pixel, next_position


Way = Callable[[Job, ActivationPattern, Tensor], Parts]
_WAYS: dict[str, Way] = {"adjoint": _adjoint, "basis": _basis, "coloured": _coloured}
