"""The picture behind a map: the photo in its own pixels, or the image that the network took."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor

from adjointbackmap.images.preparing import PreparedImage
from adjointbackmap.images.preprocessing import Preparation
from adjointbackmap.planes.thumbnails import unit_interval

GOLD = "#ffd700"
MARGIN = 0.15  # of the receptive field, shown around it


@dataclass(frozen=True)
class Backdrop:
    """A picture, and where the network's pixels are in it.

    Attributes:
        pixels: ``(H, W, 3)`` in [0, 1].
        preparation: How the photo became the network's image; ``None`` if the picture is that
            image.
        words: What the picture is, for captions.
    """

    pixels: np.ndarray
    preparation: Preparation | None
    words: str

    def box(self, field: Sequence[float | int]) -> tuple[float, float, float, float]:
        """A box of the network's pixels in this picture: left, top, width and height.

        Args:
            field: First row, first column, rows and columns.
        """
        if self.preparation is not None:
            field = self.preparation.in_original(field)
        row, column, rows, columns = field
        # the centre of a picture's first pixel is at 0, its edge at -0.5
        return column - 0.5, row - 0.5, float(columns), float(rows)

    def extent(self, field: Sequence[float | int]) -> tuple[float, float, float, float]:
        """The same as matplotlib's extent: left, right, bottom, top."""
        left, top, width, height = self.box(field)
        return left, left + width, top + height, top

    def show(self, axes: Axes, grey: bool = False) -> AxesImage:
        """Draw the picture.

        Args:
            axes: Where.
            grey: Whether in pale grey, so that colours over it can be seen.
        """
        pixels = self.pixels
        if grey:
            pixels = np.repeat(0.35 + 0.65 * pixels.mean(2, keepdims=True), 3, 2)
        drawn = axes.imshow(pixels, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        return drawn

    def view(self, field: Sequence[float | int]) -> tuple[float, float, float, float]:
        """A box of the network's pixels with a margin, inside the picture, as an extent."""
        left, top, width, height = self.box(field)
        rows, columns = self.pixels.shape[:2]
        x = MARGIN * width
        y = MARGIN * height
        right = min(columns - 0.5, left + width + x)
        bottom = min(rows - 0.5, top + height + y)
        return max(-0.5, left - x), right, bottom, max(-0.5, top - y)

    def zoom(self, axes: Axes, field: Sequence[float | int]) -> None:
        """Show only a box of the network's pixels, with a margin."""
        left, right, bottom, top = self.view(field)
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)


def backdrop(over: Any, x: Tensor) -> Backdrop:
    """The picture behind the map of an image.

    Args:
        over: What :func:`adjointbackmap.image` gave; a tensor ``(C, H, W)`` or ``(1, C, H, W)`` of
            the network's rows and columns; or ``None`` for the image itself.
        x: The image ``(C, H, W)``.

    Raises:
        TypeError: If ``over`` is of another type.
        ValueError: If its shape is not that of the image.
    """
    if over is not None and not isinstance(over, Tensor):
        msg = (
            "over must be what adjointbackmap.image gave, or a tensor. "
            f"Got {type(over).__name__}: prepare it with adjointbackmap.image(over, size=...)."
        )
        raise TypeError(msg)
    picture = x if over is None else over
    shape = tuple(picture.shape[1:] if picture.dim() == 4 and len(picture) == 1 else picture.shape)
    if len(shape) != 3 or shape[1:] != tuple(x.shape[1:]):
        expected = " x ".join(map(str, x.shape[1:]))
        msg = (
            f"over must be one picture of the image's {expected} pixels. "
            f"Got {tuple(picture.shape)}: prepare it with adjointbackmap.image(over, size=...)."
        )
        raise ValueError(msg)
    if isinstance(picture, PreparedImage):
        original = picture.original
        levels = original / 255 if original.dtype == np.uint8 else original
        pixels = np.broadcast_to(levels, (*levels.shape[:2], 3))
        return Backdrop(pixels, picture.preparation, "photo")
    drawn = np.broadcast_to(unit_interval(picture.reshape(shape)), (3, *shape[1:]))
    return Backdrop(np.moveaxis(drawn, 0, -1), None, "image")


def frame(axes: Axes, box: tuple[float, float, float, float], **options: Any) -> None:
    """Draw a frame: left, top, width and height."""
    left, top, width, height = box
    style: dict[str, Any] = {"edgecolor": GOLD, "linewidth": 1.5} | options
    axes.add_patch(Rectangle((left, top), width, height, fill=False, clip_on=False, **style))
