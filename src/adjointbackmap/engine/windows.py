"""The geometry of windows: which pixels go together, where their windows lie on a map, and in which patches they end.

Pixels that are congruent modulo the network's total stride have windows of one geometry on every map. Such a group is one
ordinary batch: along each axis the window of its n-th pixel is interval n of one :class:`Span`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules import Field, Rule
from adjointbackmap.rules.base import channels_last


@dataclass(frozen=True)
class Span:
    """Intervals along one axis, one for each number: interval ``n`` has ``size`` elements from ``first + n * step`` on.

    The patches of a layer's positions on the image, and the windows of positions that pixels reach, are such intervals.

    Example:
        >>> Span(-1, 3, 2).last, Span(-1, 3, 2).firsts(range(1, 3)).tolist()
        (1, [1, 3])
    """

    first: int
    size: int
    step: int

    @property
    def last(self) -> int:
        """The last element of interval 0."""
        return self.first + self.size - 1

    def firsts(self, numbers: range) -> Tensor:
        """First element of each of some intervals."""
        return self.first + self.step * torch.arange(numbers.start, numbers.stop)


@dataclass(frozen=True)
class Group:
    """Pixels whose windows have one geometry: all combinations of a range of rows and a range of columns.

    Attributes:
        pixels: The range along each axis of the image; its step is the stride.
    """

    pixels: tuple[range, ...]

    @classmethod
    def of_one(cls, strides: Sequence[int]) -> "Group":
        """The first pixel alone, with the strides of a larger group."""
        return cls(tuple(range(0, stride, stride) for stride in strides))

    @property
    def count(self) -> tuple[int, ...]:
        """Pixels along each axis."""
        return tuple(map(len, self.pixels))

    def spans(self, field: Field) -> list[Span] | None:
        """Where the group's pixels reach a value with a field; ``None`` for whole maps."""
        if not field:
            return None
        spans = []
        for axis, pixels in zip(field, self.pixels, strict=True):
            # Position o reads pixels from o * step + low to o * step + high: solved for the o that read the first pixel.
            first = -int((axis.high - pixels.start) // axis.step)
            last = int((pixels.start - axis.low) // axis.step)
            spans.append(Span(first, last - first + 1, int(pixels.step // axis.step)))
        return spans

    def places(self) -> Tensor:
        """The pixels, ``(count, axes)``."""
        return _grid([torch.arange(p.start, p.stop, p.step) for p in self.pixels])

    def numbers(self) -> Tensor:
        """Number of each pixel along each axis of the group, ``(count, axes)``."""
        return _grid([torch.arange(n) for n in self.count])


def _grid(axes: list[Tensor]) -> Tensor:
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


@dataclass(frozen=True)
class Windows:
    """A group's tangents on the windows of its pixels.

    Attributes:
        tensor: ``(images * pixels * in-channels, channels, *sizes)``.
        spans: Where the windows lie along each axis of the map.
        clean: Whether the tangents are zero outside the map.
    """

    tensor: Tensor
    spans: list[Span]
    clean: bool


Tangents = Windows | Tensor | None
"""On windows, on whole maps, or zero."""


def strides_of(fields: Iterable[Field], axes: int) -> tuple[int, ...]:
    """The least strides of pixels whose windows have one geometry in every map."""
    known = [field for field in fields if field]
    return tuple(lcm(*(Fraction(field[a].step).numerator for field in known)) for a in range(axes))


# windows on maps


def covers(spans: list[Span], shape: tuple[int, ...]) -> bool:
    """Whether windows are as large as the map."""
    return prod(s.size for s in spans) >= prod(shape[1:])


def needed(rule: Rule, spans: list[Span]) -> list[Span]:
    """The positions of its input that a rule reads for windows of its output."""
    read = []
    for span, stride, low, high in zip(spans, *(rule.reach() or ()), strict=True):
        first = ceil(span.first * stride + low)
        last = floor(span.last * stride + high)
        read.append(Span(first, last - first + 1, int(span.step * stride)))
    return read


def padding(have: list[Span], want: list[Span]) -> list[int]:
    """What to add around windows, from the last axis on, as ``F.pad`` takes it; negative to cut."""
    pad: list[int] = []
    for h, w in reversed(list(zip(have, want, strict=True))):
        pad += [h.first - w.first, w.last - h.last]
    return pad


def fitted(value: Windows, spans: list[Span]) -> Tensor:
    """Windows at other positions of the same map, zeros where there was nothing."""
    pad = padding(value.spans, spans)
    return F.pad(value.tensor, pad) if any(pad) else value.tensor


def seen_by(group: Group, maps: Tensor, spans: list[Span]) -> Tensor:
    """Parts ``(images * pixels, channels, *sizes)`` of maps ``(images, channels, *shape)``, one for each pixel's window."""
    pad = []
    for span, count, extent in reversed(list(zip(spans, group.count, maps.shape[2:], strict=True))):
        pad += [-span.first, span.last + (count - 1) * span.step + 1 - extent]
    parts = F.pad(maps, pad)
    for a, span in enumerate(spans):
        parts = parts.unfold(2 + a, span.size, span.step)
    # now (images, channels, *pixels, *sizes)
    axes = len(spans)
    if axes == 2 and channels_last(maps):  # in one copy
        return parts.movedim(1, -1).flatten(0, 2).movedim(-1, 1)
    return parts.movedim(1, 1 + axes).flatten(0, axes)


# windows to patches


def put(
    whole: Tensor,
    group: Group,
    tangents: Tangents,
    patches: Sequence[Span],
    positions: Sequence[range],
) -> None:
    """Put a group's tangents into the patches that hold its pixels.

    Args:
        whole: The patches ``(rows, columns, patch rows, patch columns, in-channels, out-channels)``, written into.
        group: The pixels, of one image.
        tangents: What they leave at every position that they reach.
        patches: Along each axis, interval ``u`` is the patch of position ``u``.
        positions: The positions along each axis that ``whole`` has.
    """
    if tangents is None:
        return
    if isinstance(tangents, Windows):
        tensor = tangents.tensor
        spans = tangents.spans
    else:
        tensor = tangents
        spans = [Span(0, n, 0) for n in tangents.shape[2:]]
    # (pixel rows, pixel columns, window rows, window columns, in-channels, out-channels)
    rows = tensor.movedim(1, -1).unflatten(0, (*group.count, -1)).movedim(2, 4)
    lines = [_Line(*along) for along in zip(group.pixels, spans, patches, positions, strict=True)]
    down, across = (
        [(p, line.view(p, whole, a)) for p in line.pieces()] for a, line in enumerate(lines)
    )
    for r, by_row in down:
        for c, by_column in across:
            part = rows[r.pixels, c.pixels, r.window, c.window]
            _strided(whole, by_row, by_column).copy_(part)


@dataclass(frozen=True)
class _Piece:
    """Pixels of a group whose windows reach the wanted positions with the same part of the window."""

    pixels: slice
    window: slice


@dataclass(frozen=True)
class _View:
    """Where a piece lies along one axis of the patches, in elements of their memory.

    Attributes:
        offset: Of its first pixel at its first position.
        sizes: Pixels and positions.
        strides: From one pixel to the next, and from one position to the next.
    """

    offset: int
    sizes: tuple[int, int]
    strides: tuple[int, int]


@dataclass(frozen=True)
class _Line:
    """One axis: the pixels of a group, the windows of positions that they reach, and the patches that are wanted.

    Where a tangent belongs is linear in the number of its pixel and in its position in the window, so pieces are strided views.
    """

    pixels: range
    windows: Span
    patches: Span
    positions: range

    def pieces(self) -> list[_Piece]:
        """The part of each window that lies at the wanted positions and inside their patches."""
        pieces: list[_Piece] = []
        for n in range(len(self.pixels)):
            window = self._part(n)
            if window is None:
                continue
            if pieces and pieces[-1].window == window and pieces[-1].pixels.stop == n:
                pieces[-1] = _Piece(slice(pieces[-1].pixels.start, n + 1), window)
            else:
                pieces.append(_Piece(slice(n, n + 1), window))
        return pieces

    def _part(self, n: int) -> slice | None:
        """Which part of pixel ``n``'s window that is."""
        position = self._position(n)
        within = self._within(n)
        low = max(0, -position)
        high = min(self.windows.size, len(self.positions) - position)
        size = self.patches.size
        step = self.patches.step
        if step:  # the patch of the window's next position starts `step` pixels later: 0 <= within - step * i < size
            low = max(low, (within - size) // step + 1)
            high = min(high, within // step + 1)
        elif not 0 <= within < size:
            return None
        return slice(low, high) if low < high else None

    def _position(self, n: int) -> int:
        """First position of a pixel's window, counted from the first that is wanted."""
        return self.windows.first + n * self.windows.step - self.positions.start

    def _within(self, n: int) -> int:
        """Where a pixel is in the patch of the first position of its window."""
        return (
            self.pixels[n]
            - self.patches.first
            - self.patches.step * (self.windows.first + n * self.windows.step)
        )

    def view(self, piece: _Piece, whole: Tensor, axis: int) -> _View:
        """Where a piece lies in patches whose positions are dimension ``axis`` and whose pixels are two further."""
        by_position = whole.stride(axis)
        by_pixel = whole.stride(2 + axis)
        first = piece.pixels.start
        low = piece.window.start
        count = piece.window.stop - low
        position = self._position(first) + low
        within = self._within(first) - self.patches.step * low
        moved = self.pixels.step - self.patches.step * self.windows.step
        next_pixel = self.windows.step * by_position + moved * by_pixel
        next_position = by_position - self.patches.step * by_pixel if count > 1 else 0
        sizes = (piece.pixels.stop - first, count)
        return _View(position * by_position + within * by_pixel, sizes, (next_pixel, next_position))


def _strided(whole: Tensor, rows: _View, columns: _View) -> Tensor:
    """Pieces along both axes: ``(pixel rows, pixel columns, window rows, window columns, in-channels, out-channels)``."""
    (n, u) = rows.sizes
    (m, v) = columns.sizes
    (by_n, by_u) = rows.strides
    (by_m, by_v) = columns.strides
    sizes = (n, m, u, v, *whole.shape[4:])
    strides = (by_n, by_m, by_u, by_v, *whole.stride()[4:])
    return whole.as_strided(sizes, strides, rows.offset + columns.offset)
