"""Receptive fields: which input pixels a position of a map can depend on, along each spatial axis."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Position ``o`` reads the input pixels ``o * step + low`` to ``o * step + high``."""

    step: int = 1
    low: int = 0
    high: int = 0

    def window(self, stride: int, offset: int, extent: int) -> "Axis":
        """The axis after an operation whose position ``o`` reads ``o * stride + offset`` and the next ``extent - 1``."""
        return Axis(self.step * stride, self.low + self.step * offset, self.high + self.step * (offset + extent - 1))


Field = tuple[Axis, ...] | None
"""One axis per spatial dimension; ``None`` is the whole image, ``()`` no pixel at all (a bias)."""


def union(fields: Sequence[Field]) -> Field:
    """The smallest common field of values that meet position by position."""
    seen = [f for f in fields if f != ()]
    if not seen:
        return ()
    if any(f is None or len(f) != len(seen[0] or ()) for f in seen):
        return None
    axes = []
    for axis in zip(*seen, strict=True):
        if len({a.step for a in axis}) > 1:
            return None
        axes.append(Axis(axis[0].step, min(a.low for a in axis), max(a.high for a in axis)))
    return tuple(axes)


def windowed(field: Field, strides: Sequence[int], offsets: Sequence[int], extents: Sequence[int]) -> Field:
    """The field after a convolution or a pooling."""
    if not field:
        return field
    return tuple(a.window(*w) for a, w in zip(field, zip(strides, offsets, extents, strict=True), strict=True))


def field_size(field: Field, image: Sequence[int]) -> tuple[int, ...]:
    """Extent of a field in pixels, at most the image's.

    Args:
        field: Receptive field.
        image: Spatial extent of the image, such as ``(32, 32)``.

    Example:
        >>> field_size((Axis(1, -2, 2), Axis(1, -2, 2)), (32, 32))
        (5, 5)
    """
    if field is None:
        return tuple(image)
    return tuple(min(a.high - a.low + 1, n) for a, n in zip(field, image, strict=True)) if field else (0,) * len(image)
