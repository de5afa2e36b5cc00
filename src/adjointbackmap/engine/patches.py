"""Image parts of hyperplanes in compact form: only on the pixels that a unit can depend on."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from adjointbackmap.display import ShownFields

BLOCK = 2**22  # numbers in a block of an inner product, which bounds its memory


@dataclass(frozen=True, repr=False)
class Patches(ShownFields):
    """Image parts on their receptive fields.

    Attributes:
        values: ``(N, *units, C, h, w)``; zero outside the image.
        corners: Row and column of each patch's first pixel, which may be negative: ``(*units, 2)``.
        image: Rows and columns of the image.
    """

    values: Tensor
    corners: Tensor
    image: tuple[int, int]

    def dense(self) -> Tensor:
        """The image parts on the whole image, ``(N, *units, C, rows, columns)``."""
        if tuple(self.values.shape[-2:]) == self.image and not self.corners.any():
            return self.values
        n = len(self.values)
        units = self.corners.shape[:-1]
        channels = self.values.shape[-3]
        flat = self.values.reshape(n, prod(units), channels, -1)
        places = self._places().to(flat.device)[None, :, None].expand_as(flat)
        whole = flat.new_zeros(*flat.shape[:3], prod(self.image)).scatter_add_(3, places, flat)
        return whole.view(n, *units, channels, *self.image)

    def inner(self, x: Tensor, of: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
        """Sum of ``of(x * value)`` over each patch.

        Args:
            x: Images ``(N, C, rows, columns)``.
            of: What is summed: the products, or for example their absolute values.

        Returns:
            ``(N, *units)``.
        """
        units = self.corners.shape[:-1]
        flat = self.values.flatten(1, len(units)) if units else self.values[:, None]
        places = self._places().to(x.device)
        step = max(1, BLOCK // prod(flat.shape[2:]))
        sums = []
        for start in range(0, flat.shape[1], step):
            block = flat[:, start : start + step]
            # (N, C, units, h * w) -> (N, units, C, h, w)
            seen = x.flatten(2)[:, :, places[start : start + step]]
            pixels = seen.movedim(1, 2).reshape(block.shape)
            sums.append(of(block * pixels).sum((2, 3, 4)))
        return torch.cat(sums, 1).view(len(x), *units)

    def _places(self) -> Tensor:
        """Number of each patch pixel in the image, ``(units, h * w)``.

        Outside pixels are clamped to the border; their values are zero.
        """
        axes = []
        for axis, extent in enumerate(self.image):
            steps = torch.arange(self.values.shape[-2 + axis])
            axes.append((self.corners[..., axis].reshape(-1, 1) + steps).clamp(0, extent - 1))
        # row * columns + column
        return (axes[0][:, :, None] * self.image[1] + axes[1][:, None, :]).flatten(1)
