"""Where the image parts of hyperplanes lie: the patches of units on the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from adjointbackmap.engine.windows import Span
from adjointbackmap.rules import Field, field_size
from adjointbackmap.rules.field import Axis


@dataclass(frozen=True)
class PatchGeometry:
    """The patches that the units at some positions of a map can depend on.

    Attributes:
        patches: Along each axis, interval ``p`` is the patch of position ``p``: its pixels, some of which may lie outside.
        positions: Along each axis, the positions from the first that is wanted to the last.
        image: Rows and columns of the image.
    """

    patches: tuple[Span, ...]
    positions: tuple[range, ...]
    image: tuple[int, ...]

    @classmethod
    def of(cls, field: Field, positions: Sequence[range], image: Sequence[int]) -> "PatchGeometry":
        """The receptive fields of positions; whole images where fields do not move in whole pixels."""
        sizes = field_size(field, image)
        axes = field or (None,) * len(image)
        found = [
            _patch(axis, size, n, field) for axis, size, n in zip(axes, sizes, image, strict=True)
        ]
        return cls(tuple(found), tuple(positions), tuple(image))

    @property
    def size(self) -> tuple[int, ...]:
        """Rows and columns of a patch."""
        return tuple(patch.size for patch in self.patches)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many positions there are along each axis."""
        return tuple(map(len, self.positions))

    def corners(self, positions: Sequence[Tensor]) -> Tensor:
        """First pixel of the patches at some positions ``(*units)`` along each axis: ``(*units, axes)``."""
        return torch.stack(
            [s.first + s.step * p for s, p in zip(self.patches, positions, strict=True)], -1
        )

    def pixels(self, positions: Sequence[Tensor]) -> Tensor:
        """Numbers of the pixels of patches at positions ``(K,)``: ``(K, pixels)``; rows * columns for those outside."""
        axes = []
        for first, size, extent in zip(
            self.corners(positions).unbind(-1), self.size, self.image, strict=True
        ):
            pixel = first[:, None] + torch.arange(size, device=first.device)
            axes.append(torch.where((pixel >= 0) & (pixel < extent), pixel, extent))
        (rows, columns) = axes
        (height, width) = self.image
        # (K, patch rows, patch columns)
        outside = (rows[:, :, None] >= height) | (columns[:, None] >= width)
        numbers = rows[:, :, None] * width + columns[:, None]
        return torch.where(outside, height * width, numbers).flatten(1)

    def reached(self) -> list[range]:
        """Rows and columns of the image that the patches lie on."""
        found = []
        for patch, positions, extent in zip(self.patches, self.positions, self.image, strict=True):
            first = patch.first + patch.step * positions.start
            stop = first + patch.step * (len(positions) - 1) + patch.size
            found.append(range(max(0, first), min(extent, stop)))
        return found


def _patch(axis: Axis | None, size: int, extent: int, field: Field) -> Span:
    """The patches along one axis."""
    if axis is not None and size < extent and int(axis.step) == axis.step:
        return Span(ceil(axis.low), size, int(axis.step))
    if (
        field == ()
    ):  # it depends on no pixel: a patch of one, which is zero, takes every method as it is
        return Span(0, 1, 0)
    return Span(0, extent, 0)
