"""Bias parts of hyperplanes as near-square images or strips, with lines between the layers."""

from collections.abc import Mapping, Sequence
from math import isqrt

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adjointbackmap.engine.biases import Biases
from adjointbackmap.plots.drawing import (
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    colour_bar,
    finished,
    new_figure,
)
from adjointbackmap.plots.scale import Scale

PARTS_IN_ROW = 5
UNIT = "activation per unit of bias"


def near_square(vector: Float[Tensor, " m"]) -> np.ndarray:
    """A bias part ``(M,)`` as an image that is as close to a square as possible.

    384 numbers become 24 x 16. A prime number of them becomes a strip.

    Example:
        >>> import torch
        >>> [near_square(torch.zeros(length)).shape for length in (384, 1184, 37)]
        [(24, 16), (37, 32), (1, 37)]
    """
    length = len(vector)
    divisors = (c for c in range(isqrt(length), 1, -1) if length % c == 0)  # the largest first
    columns = next(divisors, max(1, length))
    return vector.cpu().numpy().reshape(-1, columns)


def bias_parts(
    vectors: Mapping[str, Float[Tensor, " m"]],
    biases: Biases,
    title: str,
    shape: str = "square",
    normalised: bool = False,
) -> Drawing:
    """Bias parts on one scale, with lines between the layers [Wan2022, Figs. 4.6-4.8].

    The names of the layers are shown too.

    Args:
        vectors: Heading -> bias part ``(M,)``.
        biases: The network's biases: their names, and the place of each in the vectors.
        title: Heading of the figure.
        shape: ``"square"`` for one near-square image per bias part, read row by row; ``"strip"``
            for one image with one row per bias part.
        normalised: Whether colours go from the smallest to the largest number. Otherwise zero is at
            the centre.

    Raises:
        ValueError: If the shape is unknown, there is no vector, or a vector does not have one
            number per bias.
    """
    if shape not in ("square", "strip"):
        msg = f"shape must be square or strip. Got {shape!r}."
        raise ValueError(msg)
    found = sorted({len(v) for v in vectors.values()})
    if found != [len(biases)] or not len(biases):
        msg = (
            f"Bias parts must have one number for each of the network's {len(biases)} biases. "
            f"Got {found or 'none'}."
        )
        raise ValueError(msg)
    values = np.stack([v.cpu().numpy() for v in vectors.values()])
    scale = Scale.clipped([values], normalised)
    numbers = {
        "bias": values,
        "titles": np.array(list(vectors)),
        "layers": np.array(biases.names),
        "starts": np.array([part.slice.start for part in biases.values()]),
    }
    draw = _square_figure if shape == "square" else _strip_figure
    figure = draw(values, list(vectors), biases, scale, title)
    return finished(figure, numbers, f"{described(biases)}: {scale.words(UNIT, channels=False)}")


def described(biases: Biases) -> str:
    """Text for a caption: the number of biases, and where lines are drawn."""
    lines = f", lines between the {len(biases.names)} layers," if _are_cut(biases) else ""
    return f"{len(biases)} biases{lines} on one scale"


def cut(axes: Axes, biases: Biases, columns: int, linewidth: float = 0.7) -> None:
    """Draw lines between the layers of biases that are shown row by row.

    No line is drawn if each bias is a layer of its own.
    """
    cut_at(axes, layer_starts(biases), columns, linewidth)


def layer_starts(biases: Biases) -> list[int]:
    """Where the biases of each layer but the first begin; none if each bias is its own layer."""
    parts = list(biases.values())[1:] if _are_cut(biases) else []
    return [part.slice.start for part in parts]


def cut_at(axes: Axes, starts: Sequence[int], columns: int, linewidth: float = 0.7) -> None:
    """Draw the lines of :func:`cut` at the first bias of each layer."""
    for start in starts:
        row, column = divmod(start, columns)
        # below the row up to the first bias of the layer, up, then above the row; pixels have their
        # centres at whole numbers
        across = [-0.5, column - 0.5, column - 0.5, columns - 0.5]
        down = [row + 0.5, row + 0.5, row - 0.5, row - 0.5]
        axes.plot(across, down, color="black", linewidth=linewidth)


def _are_cut(biases: Biases) -> bool:
    """Whether there are several layers, and some has several biases."""
    return len(biases) > len(biases.names) > 1


def _square_figure(
    values: np.ndarray,
    titles: Sequence[str],
    biases: Biases,
    scale: Scale,
    title: str,
) -> Figure:
    """One image per bias part. The first image of each row has the names of the layers."""
    images = [near_square(torch.from_numpy(v)) for v in values]
    height, width = images[0].shape
    rows = -(-len(images) // PARTS_IN_ROW)
    columns = min(len(images), PARTS_IN_ROW)
    panel = WIDTH / (PARTS_IN_ROW + 1) * height / width + 0.3 if height > 1 else 1.1
    figure = new_figure(WIDTH, 1.0 + rows * panel, title)
    names, middles = _labels(biases, most=16)
    for i, (name, image) in enumerate(zip(titles, images, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        drawn = scale.show(axes, image, name)
        cut(axes, biases, width)
        if i % columns == 0 and height > 1:
            axes.set_yticks([m // width for m in middles], names, fontsize=SMALL)
        elif i % columns == 0:
            axes.set_xticks(middles, names, fontsize=SMALL, rotation=90)
    colour_bar(figure, drawn, figure.axes, UNIT)
    return figure


def _strip_figure(
    values: np.ndarray,
    titles: Sequence[str],
    biases: Biases,
    scale: Scale,
    title: str,
) -> Figure:
    """One image with one row per bias part. The names of the layers are below it."""
    figure = new_figure(WIDTH, 1.8 + 0.3 * len(values), title)
    axes = figure.add_subplot()
    drawn = scale.show(axes, values)
    axes.set_aspect("auto")
    for start in layer_starts(biases):
        axes.axvline(start - 0.5, color="black", linewidth=0.7)
    names, middles = _labels(biases, most=40)
    axes.set_xticks(middles, names, fontsize=SMALL, rotation=90)
    axes.set_yticks(range(len(titles)), titles, fontsize=MEDIUM)
    colour_bar(figure, drawn, [axes], UNIT, shrink=1.0)
    return figure


def _labels(biases: Biases, most: int) -> tuple[list[str], list[float]]:
    """Names of the layers, and the middles of their biases.

    A name that would be too close to the one before is left out.
    """
    names: list[str] = []
    middles: list[float] = []
    for name, part in biases.items():
        middle = (part.slice.start + part.slice.stop - 1) / 2
        if not middles or middle - middles[-1] >= len(biases) / most:
            names.append(name)
            middles.append(middle)
    return names, middles
