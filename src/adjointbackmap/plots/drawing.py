"""A picture together with its numbers, and how both are written to files."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adjointbackmap.files import disk

if TYPE_CHECKING:
    from adjointbackmap.engine.network import Network

# Inches of a full figure. Shown 700 pixels wide, a font of 8 points is then about 8 pixels high.
WIDTH = 9.0
# sizes of fonts in points
SMALL = 8.0
MEDIUM = 9.0
LARGE = 11.0
# Colour-blind readers can distinguish these.
COLOURS = (
    "#d7191c",
    "black",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a8a8a",
)  # one for each network of the study
MARKERS = "o^sDvPX*"
# Formats, with the metadata that make the same picture give the same file.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
DOTS = 110  # per inch


@dataclass(frozen=True, repr=False)
class Drawing:
    """A figure and its numbers.

    Attributes:
        figure: The figure.
        numbers: The drawn numbers, before they became colours: name -> array.
        caption: Meaning of the colours: the scale, its units, and the colour of zero. It is also
            written below the figure.
    """

    figure: Figure
    numbers: dict[str, np.ndarray]
    caption: str

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        arrays = ", ".join(self.numbers)
        return f"Drawing {width:.3g} x {height:.3g} in: {self.caption}\n  numbers: {arrays}"

    def _repr_png_(self) -> bytes:
        """The picture, for notebooks."""
        file = BytesIO()
        self.figure.savefig(file, format="png", dpi=DOTS)
        return file.getvalue()


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a heading that fits its width."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(wrapped(title, width, LARGE), fontsize=LARGE)
    return figure


def finished(figure: Figure, numbers: dict[str, np.ndarray], caption: str) -> Drawing:
    """The drawing of a figure, with its caption written below the figure."""
    figure.supxlabel(wrapped(caption, figure.get_figwidth(), SMALL), fontsize=SMALL)
    return Drawing(figure, numbers, caption)


def noted(network: "Network") -> str:
    """What a caption must say of a network's hyperplanes; empty if they are derivatives."""
    return f". {network.note.capitalize()}" if network.note else ""


def colour_bar(
    figure: Figure,
    drawn: Any,
    axes: Sequence[Axes],
    label: str,
    shrink: float = 0.6,
) -> None:
    """A bar that shows the meaning of the colours."""
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, aspect=25)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


def save(
    drawing: Drawing | Figure,
    path: str | os.PathLike[str],
    numbers: Mapping[str, np.ndarray] | None = None,
    formats: Sequence[str] | None = None,
) -> Path:
    """Write a picture, and its numbers to an ``.npz`` file of the same name.

    The same picture always gives the same files.

    Args:
        drawing: The picture.
        path: Path of the first format. The files of other formats differ only in their suffix.
            Its suffix chooses the format if none is given: ``"photo.svg"``. Without one of the
            three suffixes it is PNG.
        numbers: Arrays keyed by name. The default is the numbers of the drawing; a figure has none.
        formats: Some of ``"png"``, ``"svg"`` and ``"pdf"``.

    Returns:
        Path of the first format.

    Raises:
        ValueError: If a format is unknown, or there is no format.
    """
    path = Path(path)
    formats = _formats_of(path, drawing) if formats is None else formats
    if not formats or not set(formats) <= set(FORMATS):
        msg = (
            f"formats must be some of {', '.join(FORMATS)}. "
            f"Got {', '.join(formats) or 'none'}: choose of these."
        )
        raise ValueError(msg)
    figure = drawing.figure if isinstance(drawing, Drawing) else drawing
    if numbers is None and isinstance(drawing, Drawing):
        numbers = drawing.numbers
    with rc_context({"svg.hashsalt": path.stem}):
        for kind in formats:
            drawn = BytesIO()
            figure.savefig(drawn, format=kind, dpi=DOTS, metadata=FORMATS[kind])
            disk.write(path.with_suffix(f".{kind}"), drawn.getvalue())
    if numbers:
        disk.write(path.with_suffix(".npz"), disk.npz(numbers))
    return path.with_suffix(f".{formats[0]}")


def _formats_of(path: Path, drawing: Drawing | Figure) -> tuple[str, ...]:
    """The format of a path: its suffix, if it names any format of pictures, otherwise PNG."""
    figure = drawing.figure if isinstance(drawing, Drawing) else drawing
    suffix = path.suffix.lower().removeprefix(".")
    return (suffix if suffix in figure.canvas.get_supported_filetypes() else "png",)


def wrapped(text: str, width: float, size: float) -> str:
    """Text in lines that fit a width in inches.

    A letter of the default font is about 0.55 of the font size wide.
    """
    return "\n".join(textwrap.wrap(text, int(width * 72 / (0.55 * size))))
