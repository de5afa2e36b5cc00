"""Receptive fields: the input pixels that a position of a map can depend on, axis by axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from torch import Tensor

Number = int | Fraction


@dataclass(frozen=True)
class Axis:
    """A receptive field along one axis.

    Position ``o`` reads input pixels between ``o * step + low`` and ``o * step + high``. The step
    is a fraction below 1 where the map is finer than the image.
    """

    step: Number = 1
    low: Number = 0
    high: Number = 0

    def window(self, stride: Number, low: Number, high: Number) -> "Axis":
        """The field after one more operation.

        Its position ``o`` reads positions ``o * stride + low`` to ``o * stride + high`` of the map
        that has this field.
        """
        return Axis(self.step * stride, self.low + self.step * low, self.high + self.step * high)


Field = tuple[Axis, ...] | None
"""One :class:`Axis` per spatial dimension; ``None`` is the whole image, ``()`` no pixel at all."""

Reach = tuple[Sequence[Number], Sequence[Number], Sequence[Number]]
"""Strides, lows and highs of an operation, one per spatial axis, see :meth:`Axis.window`."""


def union(fields: Sequence[Field]) -> Field:
    """The smallest field that contains all fields, of values that meet position by position.

    It is the whole image if the fields have different steps.
    """
    seen = [f for f in fields if f != ()]  # a bias adds no pixel
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


def windowed(
    field: Field, strides: Sequence[Number], lows: Sequence[Number], highs: Sequence[Number]
) -> Field:
    """The field after an operation with a window along each axis, see :meth:`Axis.window`."""
    if not field:
        return field
    return tuple(a.window(*w) for a, *w in zip(field, strides, lows, highs, strict=True))


def measured_reach(reads: Tensor) -> tuple[Number, Number, Number] | None:
    """The reach of an operation along one axis, measured from what it reads.

    Only the stride comes from the sizes. The bounds are measured, so no position reads outside
    them. See :meth:`Axis.window` for the three numbers.

    Args:
        reads: Whether each output position reads each input position, ``(out, in)``.

    Returns:
        Stride, low and high; ``None`` if neither size is a multiple of the other.

    Example:
        >>> import torch
        >>> measured_reach(torch.eye(4, dtype=torch.bool).repeat_interleave(2, 0))
        (Fraction(1, 2), Fraction(-1, 2), Fraction(0, 1))
    """
    stride = Fraction(reads.shape[1], reads.shape[0])
    if 1 not in (stride.numerator, stride.denominator):
        return None
    # distance of each input position j that is read from o * stride, where the stride alone puts it
    gaps = [j - o * stride for o, j in reads.nonzero().tolist()]
    return stride, min(gaps), max(gaps)


def field_size(field: Field, image: Sequence[int]) -> tuple[int, ...]:
    """Extent of a field in pixels, at most that of the image.

    Args:
        field: Receptive field.
        image: Spatial extent of the image, such as ``(32, 32)``.

    Example:
        >>> field_size((Axis(1, -2, 2), Axis(1, -2, 2)), (32, 32))
        (5, 5)
    """
    if field is None:
        return tuple(image)
    if not field:
        return (0,) * len(image)
    return tuple(min(floor(a.high - a.low) + 1, n) for a, n in zip(field, image, strict=True))
