"""A picture with the numbers that it shows, and how both are written."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adjointbackmap.files import disk

WIDTH = 9.0  # inches of a full figure: fonts of 8 points are 8 pixels high where the figure is shown 700 pixels wide
SMALL, MEDIUM, LARGE = 8.0, 9.0, 11.0  # sizes of fonts in points
COLOURS = ("#d7191c", "black", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind
MARKERS = "o^sDvPX"
FORMATS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}}  # with what makes a file the same every time


@dataclass(frozen=True)
class Drawing:
    """A figure and what it shows.

    Attributes:
        figure: The figure.
        numbers: What is drawn, before it became colours: name -> array.
        caption: What the colours mean: the scale, its units, where zero is. It stands below the figure too.
    """

    figure: Figure
    numbers: dict[str, np.ndarray]
    caption: str


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a heading that fits its width."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(wrapped(title, width, LARGE), fontsize=LARGE)
    return figure


def finished(figure: Figure, numbers: dict[str, np.ndarray], caption: str) -> Drawing:
    """The drawing, with its caption below the figure."""
    figure.supxlabel(wrapped(caption, figure.get_figwidth(), SMALL), fontsize=SMALL)
    return Drawing(figure, numbers, caption)


def colour_bar(figure: Figure, drawn: Any, axes: Sequence[Axes], label: str, shrink: float = 0.6) -> None:
    """A bar that tells what the colours mean."""
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, aspect=25)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


def save(
    drawing: Drawing | Figure, path: Path, numbers: Mapping[str, np.ndarray] | None = None, formats: Sequence[str] = ("png",)
) -> Path:
    """Write a picture, and the numbers that it shows as ``.npz`` beside it; the same picture gives the same files.

    Args:
        drawing: The picture.
        path: Where the first format is written; files of the others differ in their suffix.
        numbers: Arrays by name, by default those of the drawing; a figure alone has none.
        formats: ``"png"``, ``"svg"`` or both.

    Returns:
        Where the first format is.

    Raises:
        ValueError: If a format is none of these, or there is none.
    """
    if not formats or not set(formats) <= set(FORMATS):
        msg = f"formats must be some of {', '.join(FORMATS)}. Got {', '.join(formats) or 'none'}."
        raise ValueError(msg)
    figure = drawing.figure if isinstance(drawing, Drawing) else drawing
    if numbers is None and isinstance(drawing, Drawing):
        numbers = drawing.numbers
    with rc_context({"svg.hashsalt": path.stem}):
        for kind in formats:
            drawn = BytesIO()
            figure.savefig(drawn, format=kind, dpi=110, metadata=FORMATS[kind])
            disk.write(path.with_suffix(f".{kind}"), drawn.getvalue())
    if numbers:
        disk.write(path.with_suffix(".npz"), disk.npz(numbers))
    return path.with_suffix(f".{formats[0]}")


def wrapped(text: str, width: float, size: float) -> str:
    """Text in lines that fit a width in inches: a letter of the default font is about 0.55 of its size wide."""
    return "\n".join(textwrap.wrap(text, int(width * 72 / (0.55 * size))))
