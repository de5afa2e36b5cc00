"""Small pictures of hyperplanes for notebooks.

Pillow alone makes them, in a few milliseconds each.
"""

import numpy as np
from torch import Tensor

from adjointbackmap.display import png_of

# The ends of matplotlib's colour map RdBu: red raises a value, blue lowers it.
RAISES = (0.70, 0.09, 0.17)
LOWERS = (0.13, 0.40, 0.67)
FRAME = (1.0, 0.84, 0.0)  # gold
# Colours end here, so that a few large numbers do not hide all others.
PERCENTILE = 99.5


def limit_of(parts: np.ndarray | Tensor) -> float:
    """Magnitude at the ends of the colours: the 99.5th percentile of the numbers that are not zero.

    Example:
        >>> limit_of(np.array([0.0, 0.0, -2.0])), limit_of(np.zeros(3))
        (2.0, 1.0)
    """
    magnitudes = np.abs(np.asarray(parts, dtype=float))
    nonzero = magnitudes[magnitudes > 0]
    return float(np.percentile(nonzero, PERCENTILE)) if nonzero.size else 1.0


def unit_interval(x: Tensor) -> np.ndarray:
    """An input as a picture ``(C, H, W)`` in [0, 1] with 1 or 3 channels.

    Inputs in [0, 1] stay. Others are drawn from their smallest to their largest number. Channels of
    another number are averaged.
    """
    picture = x.detach().cpu().double().numpy()
    if len(picture) not in (1, 3):
        picture = picture.mean(0, keepdims=True)
    low, high = picture.min(), picture.max()
    if low < 0 or high > 1:
        picture = (picture - low) / ((high - low) or 1.0)
    return picture


def overlay(signed: np.ndarray, limit: float) -> np.ndarray:
    """A signed map as colours to lay over a picture, ``(H, W, 4)``: opaque where it is large."""
    colours = np.empty((*signed.shape, 4))
    colours[..., :3] = np.where(signed[..., None] > 0, RAISES, LOWERS)
    colours[..., 3] = (np.abs(signed) / limit).clip(0, 1)
    return colours


def over_png(picture: np.ndarray, signed: Tensor, field: tuple[int, int, int, int]) -> bytes:
    """A signed map over a grey picture as a PNG file, with a frame around the receptive field."""
    numbers = signed.detach().cpu().double().numpy()
    colours = overlay(numbers, limit_of(numbers))
    colour = np.moveaxis(colours[..., :3], -1, 0)
    opacity = colours[..., 3]
    grey = picture.mean(0)
    mixed = colour * opacity + (0.3 + 0.7 * grey) * (1 - opacity)
    row, column, rows, columns = field
    if (rows, columns) != numbers.shape:
        last = (row + rows - 1, column + columns - 1)
        for r, c in (
            (slice(row, row + rows), [column, last[1]]),
            ([row, last[0]], slice(column, column + columns)),
        ):
            mixed[:, r, c] = np.reshape(FRAME, (3, 1, 1))
    return png_of(mixed)


def map_png(signed: Tensor) -> bytes:
    """A signed map ``(C, H, W)`` as a PNG file: three channels in their colours, others summed."""
    numbers = signed.detach().cpu().double().numpy()
    if len(numbers) != 3:
        numbers = numbers.sum(0, keepdims=True)
    return png_of(0.5 + numbers / (2 * limit_of(numbers)))
