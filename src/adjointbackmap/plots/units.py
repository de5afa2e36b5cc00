"""Image parts of a layer's units in a grid.

The grid is ordered by position, by channel, or by in-channel and kernel.
"""

from math import prod

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.planes.single import receptive_fields
from adjointbackmap.planes.thumbnails import PERCENTILE
from adjointbackmap.plots.classes import IMAGE_UNIT
from adjointbackmap.plots.drawing import SMALL, WIDTH, Drawing, finished, new_figure, noted
from adjointbackmap.plots.scale import Scale, drawable

MOST_PANELS = 64
OUTLINE = "gold"
MOST_IN_ROW = 8  # most panels in a row or column; headings of more could not be read


def unit_hyperplanes(
    planes: Hyperplanes,
    title: str,
    normalised: bool = False,
    outline: bool = False,
    crop: bool = False,
) -> Drawing:
    """Image parts of up to 64 units of the first image, in a grid on one scale.

    The scale ends at the 99.5th percentile of all magnitudes.

    The heading of a panel is the value of its unit.

    Units of two dimensions of at most eight each fill rows and columns. Examples are the units of
    one channel at their positions. Other units follow one another, and each heading names the unit.

    Args:
        planes: Hyperplanes of any mode.
        title: Heading of the figure.
        normalised: Whether colours go from the smallest to the largest number, as in the study.
            Otherwise zero is at the centre.
        outline: Whether to draw the receptive field of each unit.
        crop: Whether to draw only the patch of each unit, if image parts are patches.
    """
    shape = planes.units.shape
    units = np.arange(prod(shape))
    has_names = set(planes.units.names) <= set(planes.units.dims)  # not those of arrays of units
    if has_names and len(shape) == 2 and max(shape) <= MOST_IN_ROW:
        chosen = units.reshape(shape)
    else:
        chosen = units[:MOST_PANELS]
    return _unit_grid(planes, chosen, title, normalised, outline, crop)


def kernel_hyperplanes(
    planes: Hyperplanes,
    title: str,
    normalised: bool = False,
    outline: bool = False,
    crop: bool = False,
) -> Drawing:
    """RM3 hyperplanes, or RM4 hyperplanes at one position, of up to 8 x 8 kernels.

    Rows are in-channels, and columns are out-channels. Kernels differ much in size: each panel has
    a scale of its own, which is printed below it.

    Args:
        planes: Hyperplanes of in-channels by out-channels.
        title: Heading of the figure.
        normalised: As for :func:`unit_hyperplanes`. All panels then share one scale.
        outline: As for :func:`unit_hyperplanes`.
        crop: As for :func:`unit_hyperplanes`.

    Raises:
        ValueError: If the units have other dimensions.
    """
    if planes.units.names != ("in_channel", "out_channel"):
        found = ", ".join(planes.units.names) or "none"
        msg = (
            "Kernels must have the dimensions in_channel and out_channel. "
            f"Got {found} in {planes.mode}: "
            "choose several of each in RM3, or in RM4 at one position."
        )
        raise ValueError(msg)
    units = np.arange(prod(planes.units.shape)).reshape(planes.units.shape)
    chosen = units[:MOST_IN_ROW, :MOST_IN_ROW]
    return _unit_grid(planes, chosen, title, normalised, outline, crop, one_scale=normalised)


def _unit_grid(
    planes: Hyperplanes,
    units: np.ndarray,
    title: str,
    normalised: bool,
    outline: bool,
    crop: bool,
    one_scale: bool = True,
) -> Drawing:
    """Panels of the units with these flat indices.

    A matrix of indices gives rows and columns; a vector gives panels one after the other.
    """
    chosen = units.flatten()
    parts, corners = _image_parts(planes, torch.from_numpy(chosen), crop)
    image = drawable(parts)
    places = {n: p[0].reshape(-1)[chosen].numpy() for n, p in planes.units.coordinates().items()}
    numbers = {"image": image, "value": planes.value[0].reshape(-1)[chosen].cpu().numpy(), **places}
    if crop:
        numbers["corners"] = corners
    if outline:
        numbers["fields"] = receptive_fields(planes, chosen)
    shared = Scale.clipped(list(image), normalised)
    scales = [shared if one_scale else Scale.clipped([part]) for part in image]
    rows, columns = _extents(units)
    # inches of a panel's height: no row is lower than 0.3 of its width
    panel = (WIDTH - 0.5) / max(columns, 4) * min(1.0, max(0.3, image.shape[-2] / image.shape[-1]))
    heading = (0.25 if units.ndim == 2 else 0.4) + (0.0 if one_scale else 0.17)
    figure = new_figure(WIDTH, 1.1 + rows * (panel + heading), _grid_title(title, planes, units))
    named, headings = _headings(planes, places, units)
    for i, value in enumerate(numbers["value"]):
        axes = figure.add_subplot(rows, columns, i + 1)
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        scales[i].show(axes, image[i], headings[i] + text, SMALL)
        if not one_scale:
            drawn = image[i].any()
            axes.set_xlabel(f"±{scales[i].high:.2g}" if drawn else "all zero", fontsize=SMALL)
        if units.ndim == 2 and i % columns == 0:
            axes.set_ylabel(_named(planes.units.names[0], places, i), fontsize=SMALL)
        if outline:
            _outline(axes, numbers["fields"][i], corners[i])
    caption = f"headings: {named}{'; outlined: receptive field' if outline else ''}"
    if one_scale:
        words = f"one scale: {shared.words(IMAGE_UNIT, image.ndim == 4)}"
    else:
        words = (
            f"below each panel: its own scale, the {PERCENTILE:g}th percentile of its magnitudes "
            f"in {IMAGE_UNIT}"
        )
    return finished(figure, numbers, f"{caption}; {words}{noted(planes.network)}")


def _extents(units: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the panels."""
    if units.ndim == 2:
        rows, columns = units.shape
        return rows, columns
    return -(-len(units) // MOST_IN_ROW), min(len(units), MOST_IN_ROW)


def _image_parts(planes: Hyperplanes, chosen: Tensor, crop: bool) -> tuple[Tensor, np.ndarray]:
    """Image parts ``(k, ...)`` of some units of the first image.

    With them come the row and column of their first pixels, ``(k, 2)``.
    """
    part = planes.image_part
    units = len(planes.units.shape)
    if not isinstance(part, Patches):
        whole = part[0].reshape(-1, *part.shape[1 + units :])[chosen]
        return whole, np.zeros((len(chosen), 2), int)
    values = part.values[0].reshape(-1, *part.values.shape[1 + units :])[chosen]
    corners = part.corners.reshape(-1, 2)[chosen]
    if crop:
        return values, corners.numpy()
    return Patches(values[None], corners, part.image).dense()[0], np.zeros_like(corners.numpy())


def _grid_title(title: str, planes: Hyperplanes, units: np.ndarray) -> str:
    """The title, and which units are drawn if not all are."""
    count = planes.value[0].numel()
    if units.size == count:
        return title
    of = f"{count:,}" if units.ndim == 1 else " x ".join(map(str, planes.units.shape))
    return f"{title} (first {' x '.join(map(str, units.shape))} of {of} units)"


def _headings(
    planes: Hyperplanes,
    places: dict[str, np.ndarray],
    units: np.ndarray,
) -> tuple[str, list[str]]:
    """What the headings show, in words, and the heading above each panel's value.

    Panels in rows and columns name their column. Others name the coordinates in which the units
    differ.
    """
    if units.ndim == 2:
        across = planes.units.names[1]
        columns = units.shape[1]
        first = [f"{_named(across, places, i)}\n" for i in range(columns)]
        return "value", first + [""] * (units.size - columns)
    differ = {name: p for name, p in places.items() if len(set(p.tolist())) > 1} or places
    names = ", ".join(map(_words, differ))
    return f"{names} and value", [
        ", ".join(str(p[i]) for p in differ.values()) + "\n" for i in range(units.size)
    ]


def _named(dimension: str, places: dict[str, np.ndarray], i: int) -> str:
    """A dimension and the index of a panel's unit along it."""
    return f"{_words(dimension)} {places[dimension][i]}"


def _words(dimension: str) -> str:
    """A dimension in words: ``out_row`` is a row, ``in_channel`` an in-channel."""
    return dimension.removeprefix("out_").replace("col", "column").replace("_", "-")


def _outline(axes: Axes, field: np.ndarray, corner: np.ndarray) -> None:
    """Draw a receptive field: first row and column, number of rows and columns."""
    (row, column) = field[:2] - corner
    (rows, columns) = field[2:]
    start = (column - 0.5, row - 0.5)  # pixels have their centres at whole numbers
    box = Rectangle(start, columns, rows, fill=False, edgecolor=OUTLINE, clip_on=False)
    axes.add_patch(box)
