"""The geometry of windows: groups of pixels, their windows on maps, and the patches they belong to.

Pixels that are congruent modulo the network's total stride have windows of one geometry on every
map. Such a group is one ordinary batch. Along each axis, the window of its n-th pixel is interval n
of one :class:`Span`.
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
    """Equally spaced intervals along one axis.

    Interval ``n`` has ``size`` elements from ``first + n * step`` on. The patches of a layer's
    positions are such intervals on the image. The windows of pixels are such intervals on a map.

    Example:
        >>> Span(-1, 3, 2).last, Span(-1, 3, 2).firsts(range(1, 3)).tolist()
        (1, [1, 3])
    """

    first: int
    size: int
    step: int

    @property
    def last(self) -> int:
        """Last element of interval 0."""
        return self.first + self.size - 1

    def firsts(self, numbers: range) -> Tensor:
        """First elements of a range of intervals."""
        return self.first + self.step * torch.arange(numbers.start, numbers.stop)


@dataclass(frozen=True)
class Group:
    """Pixels whose windows have one geometry: all combinations of some rows and some columns.

    Attributes:
        pixels: The pixels along each axis of the image; the step of a range is the stride.
    """

    pixels: tuple[range, ...]

    @classmethod
    def of_one(cls, strides: Sequence[int]) -> "Group":
        """A group of the first pixel only, with the strides of a larger group."""
        return cls(tuple(range(0, stride, stride) for stride in strides))

    @property
    def count(self) -> tuple[int, ...]:
        """Number of pixels along each axis."""
        return tuple(map(len, self.pixels))

    def spans(self, field: Field) -> list[Span] | None:
        """The group's windows on a map with the given receptive field; ``None`` for whole maps."""
        if not field:
            return None
        spans = []
        for axis, pixels in zip(field, self.pixels, strict=True):
            # Position o reads pixels o * step + low to o * step + high. Solved for o, the positions
            # that read pixel p are ceil((p - high) / step) to floor((p - low) / step).
            first = -int((axis.high - pixels.start) // axis.step)
            last = int((pixels.start - axis.low) // axis.step)
            spans.append(Span(first, last - first + 1, int(pixels.step // axis.step)))
        return spans

    def places(self) -> Tensor:
        """Coordinates of the pixels on the image, ``(count, axes)``."""
        return _combinations([torch.arange(p.start, p.stop, p.step) for p in self.pixels])

    def numbers(self) -> Tensor:
        """Coordinates of the pixels inside of the group, ``(count, axes)``."""
        return _combinations([torch.arange(n) for n in self.count])


def _combinations(axes: list[Tensor]) -> Tensor:
    """All combinations of one element per axis, the last axis fastest: ``(count, axes)``."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


@dataclass(frozen=True)
class Windows:
    """A group's tangents on the windows of its pixels.

    Attributes:
        tensor: ``(images * pixels * in-channels, channels, *sizes)``.
        spans: The windows along each axis of the map; interval n belongs to the n-th pixel.
        clean: Whether the tangents are zero outside the map.
    """

    tensor: Tensor
    spans: list[Span]
    clean: bool


Tangents = Windows | Tensor | None
"""Tangents on windows, on whole maps (a tensor), or zero (``None``)."""


def strides_of(fields: Iterable[Field], axes: int) -> tuple[int, ...]:
    """The smallest strides of pixels whose windows have one geometry on every map.

    A field with step ``n / d`` needs a stride that is a multiple of ``n``.
    """
    known = [field for field in fields if field]
    return tuple(lcm(*(Fraction(field[a].step).numerator for field in known)) for a in range(axes))


# windows on maps


def covers(spans: list[Span], shape: tuple[int, ...]) -> bool:
    """Whether windows have at least as many elements as the map."""
    return prod(s.size for s in spans) >= prod(shape[1:])


def needed(rule: Rule, spans: list[Span]) -> list[Span]:
    """The windows of its input that a rule reads for windows of its output."""
    read = []
    for span, stride, low, high in zip(spans, *(rule.reach() or ()), strict=True):
        first = ceil(span.first * stride + low)
        last = floor(span.last * stride + high)
        read.append(Span(first, last - first + 1, int(span.step * stride)))
    return read


def padding(have: list[Span], want: list[Span]) -> list[int]:
    """Padding that turns the windows ``have`` into ``want``, for ``F.pad``; negative to cut."""
    pad: list[int] = []
    for h, w in reversed(list(zip(have, want, strict=True))):  # F.pad begins with the last axis
        pad += [h.first - w.first, w.last - h.last]
    return pad


def fitted(value: Windows, spans: list[Span]) -> Tensor:
    """Windows cut or padded with zeros to other windows of the same map."""
    pad = padding(value.spans, spans)
    return F.pad(value.tensor, pad) if any(pad) else value.tensor


def seen_by(group: Group, maps: Tensor, spans: list[Span]) -> Tensor:
    """The parts of maps that the windows of a group cover.

    Args:
        group: The pixels.
        maps: ``(images, channels, *shape)``.
        spans: The group's windows.

    Returns:
        ``(images * pixels, channels, *sizes)``, with zeros outside of the maps.
    """
    pad = []
    for span, count, extent in reversed(list(zip(spans, group.count, maps.shape[2:], strict=True))):
        after_last = span.last + (count - 1) * span.step + 1
        pad += [-span.first, after_last - extent]
    parts = F.pad(maps, pad)
    for axis, span in enumerate(spans):
        parts = parts.unfold(2 + axis, span.size, span.step)
    # now (images, channels, *pixels, *sizes)
    axes = len(spans)
    if axes == 2 and channels_last(maps):  # one copy gives the channels-last layout
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
    """Write a group's tangents into the patches that contain its pixels.

    Args:
        whole: The patches, which are written into: ``(rows, columns, patch rows, patch columns,
            in-channels, out-channels)``.
        group: The pixels, of one image.
        tangents: Their tangents at a layer.
        patches: The patches along each axis; interval n is the patch of the layer's position n.
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
    down = [(piece, lines[0].view(piece, whole, 0)) for piece in lines[0].pieces()]
    across = [(piece, lines[1].view(piece, whole, 1)) for piece in lines[1].pieces()]
    for r, by_row in down:
        for c, by_column in across:
            part = rows[r.pixels, c.pixels, r.window, c.window]
            _strided(whole, by_row, by_column).copy_(part)


@dataclass(frozen=True)
class _Piece:
    """Pixels of a group along one axis, and the part of their windows that is needed.

    Attributes:
        pixels: Consecutive pixels of the group for which this part is the same.
        window: The part of their windows.
    """

    pixels: slice
    window: slice


@dataclass(frozen=True)
class _View:
    """The place of a piece along one axis of the patches, in elements of their memory.

    Attributes:
        offset: Offset of its first pixel at its first position.
        sizes: Number of pixels and of positions.
        strides: Distance from one pixel to the next, and from one position to the next.
    """

    offset: int
    sizes: tuple[int, int]
    strides: tuple[int, int]


@dataclass(frozen=True)
class _Line:
    """One axis of the geometry of :func:`put`.

    The place of a tangent is linear in the number of its pixel and in its position in the window.
    So a piece is a strided view of the patches.

    Attributes:
        pixels: The pixels of the group.
        windows: Their windows on the layer.
        patches: The patches of the layer's positions.
        positions: The wanted positions of the layer.
    """

    pixels: range
    windows: Span
    patches: Span
    positions: range

    def pieces(self) -> list[_Piece]:
        """The parts of the windows to be written, with neighbouring pixels joined."""
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
        """The part of pixel ``n``'s window at wanted positions whose patches contain the pixel.

        It is ``None`` if there is none.
        """
        position = self._position(n)
        within = self._within(n)
        low = max(0, -position)
        high = min(self.windows.size, len(self.positions) - position)
        size = self.patches.size
        step = self.patches.step
        if step:
            # The patch of position i of the window begins i * step pixels later. The pixel is
            # inside of it if 0 <= within - i * step < size.
            low = max(low, (within - size) // step + 1)
            high = min(high, within // step + 1)
        elif not 0 <= within < size:
            return None
        return slice(low, high) if low < high else None

    def _position(self, n: int) -> int:
        """First position of a pixel's window, counted from the first wanted position."""
        return self.windows.first + n * self.windows.step - self.positions.start

    def _within(self, n: int) -> int:
        """Place of a pixel in the patch of the first position of its window."""
        position = self.windows.first + n * self.windows.step
        return self.pixels[n] - (self.patches.first + self.patches.step * position)

    def view(self, piece: _Piece, whole: Tensor, axis: int) -> _View:
        """The place of a piece in the patches along one axis.

        The positions are dimension ``axis`` of ``whole``, the patches' pixels dimension
        ``2 + axis``.
        """
        by_position = whole.stride(axis)
        by_pixel = whole.stride(2 + axis)
        first = piece.pixels.start
        low = piece.window.start
        count = piece.window.stop - low
        position = self._position(first) + low
        within = self._within(first) - self.patches.step * low
        # The next pixel's window begins `windows.step` positions later. The place in the patch
        # moves by the distance of the pixels, less the distance of the patches.
        moved = self.pixels.step - self.patches.step * self.windows.step
        next_pixel = self.windows.step * by_position + moved * by_pixel
        next_position = by_position - self.patches.step * by_pixel if count > 1 else 0
        sizes = (piece.pixels.stop - first, count)
        return _View(position * by_position + within * by_pixel, sizes, (next_pixel, next_position))


def _strided(whole: Tensor, rows: _View, columns: _View) -> Tensor:
    """A view of the patches at a piece of rows and a piece of columns.

    Its shape is ``(pixel rows, pixel columns, window rows, window columns, in-channels,
    out-channels)``.
    """
    (n, u) = rows.sizes
    (m, v) = columns.sizes
    (by_n, by_u) = rows.strides
    (by_m, by_v) = columns.strides
    sizes = (n, m, u, v, *whole.shape[4:])
    strides = (by_n, by_m, by_u, by_v, *whole.stride()[4:])
    return whole.as_strided(sizes, strides, rows.offset + columns.offset)
