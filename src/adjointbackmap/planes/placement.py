"""The patches of units: the pixels on which the image part of a hyperplane is stored."""

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
    """The patches of the units at some positions of a map.

    A patch has all pixels on which a unit can depend. Some of its pixels may be outside the image.

    Attributes:
        patches: For each axis, the progression of patches: its interval number ``p`` is the patch
            of position ``p``.
        positions: For each axis, the positions from the first wanted one to the last.
        image: Rows and columns of the image.
    """

    patches: tuple[Span, ...]
    positions: tuple[range, ...]
    image: tuple[int, ...]

    @classmethod
    def of(cls, field: Field, positions: Sequence[range], image: Sequence[int]) -> "PatchGeometry":
        """The patches for receptive fields of one kind.

        Along an axis where fields do not move in whole pixels, a patch is the whole image.
        """
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
        """Number of positions along each axis."""
        return tuple(map(len, self.positions))

    def corners(self, positions: Sequence[Tensor]) -> Tensor:
        """First row and column of the patch of each unit, ``(*units, axes)``.

        Args:
            positions: For each axis, the positions of the units, ``(*units)``.
        """
        firsts = [s.first + s.step * p for s, p in zip(self.patches, positions, strict=True)]
        return torch.stack(firsts, -1)

    def pixels(self, positions: Sequence[Tensor]) -> Tensor:
        """Numbers of the pixels of each unit's patch, ``(K, pixels)``.

        A pixel outside the image has the number height * width.

        Args:
            positions: For each axis, the positions of the units, ``(K,)``.
        """
        axes = []
        firsts = self.corners(positions).unbind(-1)
        for first, size, extent in zip(firsts, self.size, self.image, strict=True):
            pixel = first[:, None] + torch.arange(size, device=first.device)  # (K, size)
            axes.append(torch.where((pixel >= 0) & (pixel < extent), pixel, extent))
        (rows, columns) = axes
        (height, width) = self.image
        # (K, patch rows, patch columns)
        outside = (rows[:, :, None] >= height) | (columns[:, None] >= width)
        numbers = rows[:, :, None] * width + columns[:, None]
        return torch.where(outside, height * width, numbers).flatten(1)

    def reached(self) -> list[range]:
        """Rows and columns of the image that belong to at least one patch."""
        found = []
        for patch, positions, extent in zip(self.patches, self.positions, self.image, strict=True):
            first = patch.first + patch.step * positions.start
            stop = first + patch.step * (len(positions) - 1) + patch.size
            found.append(range(max(0, first), min(extent, stop)))
        return found


def _patch(axis: Axis | None, size: int, extent: int, field: Field) -> Span:
    """The patches along one axis; with a step of 0 all positions have the same patch."""
    if axis is not None and size < extent and int(axis.step) == axis.step:
        return Span(ceil(axis.low), size, int(axis.step))
    if field == ():
        # The layer depends on no pixel. Methods need a patch that is not empty: one pixel, a zero.
        return Span(0, 1, 0)
    return Span(0, extent, 0)
