"""Hyperplanes of all classes, and differences between two sets of hyperplanes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch import Tensor

from adjointbackmap.engine.biases import Biases
from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.plots.biases import (
    UNIT,
    cut,
    cut_at,
    described,
    layer_starts,
    near_square,
)
from adjointbackmap.plots.drawing import (
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    colour_bar,
    finished,
    new_figure,
    noted,
)
from adjointbackmap.plots.scale import PIXEL_SCALE, Scale, drawable

CLASSES_IN_ROW = 5
MOST_DIFFERENCES = 10  # units in two rows; headings of more could not be read
IMAGE_UNIT = "activation per unit of input"


def class_hyperplanes(
    planes: Hyperplanes,
    classes: Sequence[str],
    pixels: Float[Tensor, "c h w"],
    title: str,
    normalised: bool = False,
) -> Drawing:
    """The image, the RM0 hyperplane of every class, and their bias parts.

    All image parts share one scale, and so do all bias parts.

    The heading of a class is its value. The largest value is bold [Wan2022, Figs. 2.6, 2.7].

    Args:
        planes: All RM0 hyperplanes of one image.
        classes: Names of the classes.
        pixels: The image ``(3, H, W)`` in [0, 1].
        title: Heading of the figure.
        normalised: Whether colours go from the smallest to the largest number, as in the study.
            Otherwise zero is at the centre.

    Raises:
        TypeError: If the classes are not a list of names.
        ValueError: If there is not one name per hyperplane.
    """
    _check_classes(planes, classes)
    image = drawable(planes.image[0])
    bias = planes.bias[0]
    value = planes.value[0].cpu().numpy()
    squares = [near_square(b) for b in bias] if bias.shape[-1] else []
    scale = Scale.clipped(list(image), normalised)
    figure, grid = _class_grid(len(classes), squares, title)
    PIXEL_SCALE.show(figure.add_subplot(grid[:, :2]), drawable(pixels, 0), "input")
    rows = 2 if squares else 1  # of the grid, for a row of classes
    bias_scale = Scale.clipped(squares, normalised)
    biases = planes.network.biases
    shown = []
    for i, name in enumerate(classes):
        row = i // CLASSES_IN_ROW * rows
        column = i % CLASSES_IN_ROW + 2
        heading = f"{name}\n{value[i]:.2f}"
        axes = figure.add_subplot(grid[row, column])
        scale.show(axes, image[i], heading, bold=i == int(value.argmax()))
        if squares:
            shown.append(figure.add_subplot(grid[row + 1, column]))
            drawn = bias_scale.show(shown[-1], squares[i])
            cut(shown[-1], biases, squares[i].shape[1], linewidth=0.3)
    caption = f"image parts on one scale: {scale.words(IMAGE_UNIT, image.ndim == 4)}"
    if squares:
        colour_bar(figure, drawn, shown, f"bias part, {UNIT}")
        caption += f"; {described(biases)}: {bias_scale.words(UNIT, channels=False)}"
    numbers = {
        "pixels": pixels.cpu().numpy(),
        "image": image,
        "bias": bias.cpu().numpy(),
        "value": value,
        "classes": np.array(classes),
    }
    return finished(figure, numbers, caption + noted(planes.network))


def _check_classes(planes: Hyperplanes, classes: object) -> None:
    """Raise if hyperplanes are not those of these classes.

    Raises:
        TypeError: If the classes are not a list of names.
        ValueError: If there is not one name per RM0 hyperplane.
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        msg = (
            "classes must be a list with a name for each class. "
            f"Got {type(classes).__name__}: give names, such as those of abm.data.sample().classes."
        )
        raise TypeError(msg)
    count = planes.value[0].numel()
    if count != len(classes) or planes.mode != "RM0":
        msg = (
            "Classes must be those of the RM0 hyperplanes. "
            f"Got {len(classes)} for {count} of {planes.mode}."
        )
        raise ValueError(msg)


def _class_grid(count: int, squares: list[np.ndarray], title: str) -> tuple[Figure, GridSpec]:
    """A figure, and its grid: two columns for the image, then one for each class of a row.

    A row of classes is one row of the grid, or two if there are bias parts.
    """
    blocks = -(-count // CLASSES_IN_ROW)
    # a bias part of at least 8 rows is as high as an image part
    heights = [1.0, min(1.0, squares[0].shape[0] / 8)] if squares else [1.0]
    figure = new_figure(WIDTH, 1.1 + blocks * (1.1 * sum(heights) + 0.5), title)
    rows = blocks * len(heights)
    grid = figure.add_gridspec(rows, CLASSES_IN_ROW + 2, height_ratios=heights * blocks)
    return figure, grid


def differences(
    first: Float[Tensor, "k ..."],
    second: Float[Tensor, "k ..."],
    names: Sequence[str],
    title: str,
    rows: tuple[str, str] = ("original", "adversarial"),
    biases: Biases | Sequence[int] | None = None,
) -> Drawing:
    """Two sets of parts on one scale, one below the other, and second - first below them.

    More than five units take two rows in each set.

    The differences have a scale of their own [Wan2022, Figs. 4.2, 4.6].

    Args:
        first: Image parts ``(K, C, H, W)`` or bias parts ``(K, M)`` of at most ten units.
        second: The parts of the same units for another input.
        names: Names of the units.
        title: Heading of the figure.
        rows: Headings of the two sets.
        biases: The network's biases, for the lines between layers in bias parts; or the place
            in the vector where each layer but the first begins.

    Raises:
        ValueError: If shapes or names do not fit together, or there are too many units.
    """
    if first.shape != second.shape or not 0 < len(names) == len(first) <= MOST_DIFFERENCES:
        msg = (
            "Parts to compare must have one shape and a name each, "
            f"for 1 to {MOST_DIFFERENCES} units. "
            f"Got {tuple(first.shape)}, {tuple(second.shape)} and {len(names)} names."
        )
        raise ValueError(msg)
    panels = [_drawable_parts(parts) for parts in (first, second, second - first)]
    starts = layer_starts(biases) if isinstance(biases, Biases) else biases or []
    scales = [Scale.clipped(panels[0] + panels[1])] * 2 + [Scale.clipped(panels[2])]
    across = min(len(names), CLASSES_IN_ROW)
    down = -(-len(names) // across)  # rows of panels for each of the three sets
    shape = panels[0][0].shape
    height = WIDTH / max(4, across) * min(1.0, max(0.3, shape[-2] / shape[-1]))
    figure = new_figure(WIDTH, 1.0 + 3 * down * (height + 0.2), title)
    drawn_rows = zip((*rows, "difference"), panels, scales, strict=True)
    for r, (heading, row, scale) in enumerate(drawn_rows):
        for c, (name, panel) in enumerate(zip(names, row, strict=True)):
            axes = figure.add_subplot(3 * down, across, r * down * across + c + 1)
            scale.show(axes, panel, name, SMALL)
            if first.dim() == 2:
                cut_at(axes, starts, panel.shape[1], linewidth=0.3)
            if c % across == 0:
                axes.set_ylabel(heading, fontsize=MEDIUM)
    # bias parts (K, M), or image parts with or without channels
    unit, channels = (UNIT, False) if first.dim() == 2 else (IMAGE_UNIT, panels[0][0].ndim == 3)
    both, own = (scale.words(unit, channels) for scale in scales[1:])
    caption = (
        f"{rows[0]} and {rows[1]} on one scale: {both}; {rows[1]} - {rows[0]} on its own: {own}"
    )
    parts = {"first": first, "second": second, "difference": second - first}
    numbers = {name: part.cpu().numpy() for name, part in parts.items()}
    return finished(figure, numbers | {"names": np.array(names)}, caption)


def _drawable_parts(parts: Tensor) -> list[np.ndarray]:
    """Bias parts as near-square images, or image parts as maps."""
    return [near_square(p) for p in parts] if parts.dim() == 2 else list(drawable(parts))
