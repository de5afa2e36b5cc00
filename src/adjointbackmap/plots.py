"""Pictures of images, hyperplanes and bias parts: data in, Figure out."""

from collections.abc import Sequence
from math import isqrt, sqrt
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adjointbackmap.hyperplane import Hyperplanes

SIGNED = "RdBu_r"  # red is positive, blue negative, white zero
MOST_PANELS = 64


def centred(part: Float[Tensor, "c h w"], scale: float) -> np.ndarray:
    """A signed image part ``(C, H, W)`` as colours ``(H, W, C)`` with zero at mid-grey and ``scale`` at white.

    Example:
        >>> import torch
        >>> centred(torch.zeros(3, 1, 1), 1.0).tolist()
        [[[0.5, 0.5, 0.5]]]
    """
    return (0.5 + part.movedim(0, -1).cpu().double().numpy() / (2 * (scale or 1.0))).clip(0, 1)


def near_square(vector: Float[Tensor, " m"]) -> np.ndarray:
    """A bias part ``(M,)`` as the image nearest to a square: 384 become 16 x 24, a prime number becomes a strip.

    Example:
        >>> import torch
        >>> near_square(torch.zeros(384)).shape
        (16, 24)
    """
    rows = next(r for r in range(isqrt(len(vector)), 0, -1) if len(vector) % r == 0)
    return vector.cpu().double().numpy().reshape(rows, -1)


def class_hyperplanes(planes: Hyperplanes, classes: Sequence[str], pixels: Tensor, title: str) -> Figure:
    """The image, the RM0 hyperplane of every class, and their bias parts, each on one scale.

    Args:
        planes: All RM0 hyperplanes of one image.
        classes: Names of the classes.
        pixels: The image ``(3, H, W)`` in [0, 1].
        title: Heading of the figure.
    """
    image, bias, value = planes.image[0], planes.bias[0], planes.value[0]
    columns, blocks = 5, -(-len(image) // 5)
    with_bias = bias.shape[-1] > 0
    figure = Figure(figsize=(12.5, 0.8 + blocks * (3.0 if with_bias else 1.9)), layout="constrained")
    figure.suptitle(title)
    rows = blocks * (2 if with_bias else 1)
    grid = figure.add_gridspec(rows, columns + 2, height_ratios=([1.5, 1] if with_bias else [1]) * blocks)
    _show(figure.add_subplot(grid[:, :2]), pixels.movedim(0, -1).cpu().numpy(), "input")
    limit, bias_limit = float(image.abs().max()), float(bias.abs().max()) if with_bias else 0.0
    for i, name in enumerate(classes):
        block, column = divmod(i, columns)
        row = block * (2 if with_bias else 1)
        heading = f"{name} {float(value[i]):.2f}"
        axes = figure.add_subplot(grid[row, column + 2])
        _show(axes, centred(image[i], limit), heading, bold=i == int(value.argmax()))
        if with_bias:
            shown = figure.add_subplot(grid[row + 1, column + 2])
            drawn = shown.imshow(near_square(bias[i]), cmap=SIGNED, vmin=-bias_limit, vmax=bias_limit)
            shown.set_axis_off()
    if with_bias:
        figure.colorbar(drawn, ax=figure.axes, shrink=0.4, label=f"bias part, {bias.shape[-1]} biases")
    figure.supxlabel(f"image parts: grey is zero, black and white are -{limit:.3g} and {limit:.3g}", fontsize=9)
    return figure


def unit_hyperplanes(planes: Hyperplanes, title: str) -> Figure:
    """Image parts of up to 64 units of the first image, in a grid on one scale.

    Args:
        planes: Hyperplanes of any mode.
        title: Heading of the figure.
    """
    units = len(planes.units.shape) + 1
    image = planes.image[0].reshape(-1, *planes.image.shape[units:])
    value = planes.value[0].reshape(-1)
    places = {name: p[0].reshape(-1) for name, p in planes.units.coordinates().items()}
    count = min(len(image), MOST_PANELS)
    columns = min(count, max(1, round(sqrt(count) * 1.3)))
    rows = -(-count // columns)
    figure = Figure(figsize=(1.6 * columns + 0.5, 1.9 * rows + 0.8), layout="constrained")
    figure.suptitle(title if count == len(image) else f"{title} (first {count} of {len(image):,} units)", fontsize=10)
    limit = float(image[:count].abs().max())
    for i in range(count):
        place = ", ".join(str(int(p[i])) for p in places.values())
        axes = figure.add_subplot(rows, columns, i + 1)
        _show_part(axes, image[i], limit, f"({place}): {float(value[i]):.3g}")
    figure.supxlabel(f"({', '.join(places)}): value; zero is at the centre of the scale, its ends are ±{limit:.3g}", fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure and return where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _show_part(axes: Axes, part: Tensor, limit: float, title: str) -> None:
    if part.dim() == 3 and len(part) == 3:
        _show(axes, centred(part, limit), title, size=7)
        return
    flat = part.sum(0) if part.dim() == 3 else part.reshape(part.shape[0], -1) if part.dim() > 1 else part[None]
    axes.imshow(flat.cpu().double().numpy(), cmap=SIGNED, vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


def _show(axes: Axes, pixels: np.ndarray, title: str, bold: bool = False, size: int = 9) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, fontsize=size, fontweight="bold" if bold else "normal")
    axes.set_axis_off()
