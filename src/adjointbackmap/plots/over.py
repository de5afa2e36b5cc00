"""Hyperplanes over a photo: where a unit looks, and what each pixel means to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.planes.single import SingleHyperplane, single
from adjointbackmap.planes.thumbnails import PERCENTILE, limit_of, overlay
from adjointbackmap.plots.backdrop import Backdrop, backdrop, frame
from adjointbackmap.plots.classes import IMAGE_UNIT
from adjointbackmap.plots.drawing import (
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    colour_bar,
    finished,
    new_figure,
    noted,
    wrapped,
)
from adjointbackmap.plots.frequencies import ABOVE, AMPLITUDES
from adjointbackmap.plots.scale import Scale
from adjointbackmap.spectra import high_share, log_amplitude

WHATS = ("hyperplane", "contributions", "channels", "spectrum")
MOST_UNITS = 4
MOST_CHANNELS = 4
CHANNEL_NAMES = ("red", "green", "blue")


@dataclass(frozen=True)
class Signed:
    """A signed map on the receptive field, with the scale of its colours.

    Attributes:
        part: ``(C, h, w)`` on the field.
        limit: Magnitude at the ends of the colours.
        unit: Unit of the numbers.
    """

    part: np.ndarray
    limit: float
    unit: str

    @property
    def total(self) -> np.ndarray:
        """Sum over the channels, ``(h, w)``."""
        return self.part.sum(0)

    @property
    def scale(self) -> Scale:
        """Its colours, with zero at the centre."""
        return Scale(-self.limit, self.limit)

    def words(self) -> str:
        """The ends of the colours, and what is beyond them."""
        magnitudes = np.abs(self.part)
        beyond = (magnitudes > self.limit).sum() / max(1, (magnitudes > 0).sum())
        text = f"±{self.limit:.3g}"
        if beyond:
            text += f"; {100 * beyond:.2g} % clipped,\nlargest {magnitudes.max():.3g}"
        return text


def over_image(
    planes: Hyperplanes,
    over: Any = None,
    what: str = "hyperplane",
    unit: Any = None,
    image: int = 0,
    title: str | None = None,
) -> Drawing:
    """Hyperplanes of one image over the photo, a row for each of up to four units.

    The first panel is the photo with the unit's receptive field. The others are zoomed to the
    field. Colours end at the 99.5th percentile of the magnitudes; how many numbers are beyond is
    written below the panel.

    Args:
        planes: Hyperplanes on images with rows and columns.
        over: What :func:`adjointbackmap.image` gave, to draw over the photo in its own pixels; a
            tensor of the image's rows and columns; by default the image that the network took.
        what: ``"hyperplane"`` for H, ``"contributions"`` for x * H, ``"channels"`` for H with a
            panel for each channel, ``"spectrum"`` for the amplitudes of H at each frequency.
        unit: Index of one unit among those of the hyperplanes; by default the first four.
        image: Index of the image.
        title: Heading of the figure.

    Raises:
        TypeError: If ``over`` is not a tensor.
        ValueError: If ``what`` is unknown, the images have no rows and columns, the index does not
            choose one unit, or ``over`` has another size.
    """
    if what not in WHATS:
        msg = f"what must be one of {', '.join(WHATS)}. Got {what!r}: choose one of these."
        raise ValueError(msg)
    if len(planes.network.in_shape) != 3:
        msg = (
            "Hyperplanes are drawn over images with rows and columns. Got images of shape "
            f"{planes.network.in_shape}: take planes.receipt() or planes.to_xarray()."
        )
        raise ValueError(msg)
    chosen = _chosen(planes, unit, image)
    behind = backdrop(over, planes.x[image])
    drawn = [_signed(plane, what) for plane in chosen]
    heading = title or _title(planes, chosen, what)
    row = {"channels": _channels, "spectrum": _spectrum}.get(what, _over)
    columns = {"channels": 1 + _channel_count(chosen), "spectrum": 2 + _channel_count(chosen)}
    across = columns.get(what, 3)
    rows = len(chosen)
    width = WIDTH / max(3, across)
    tallest = sum(_aspect(plane, behind) for plane in chosen)
    figure = new_figure(WIDTH, 1.1 + width * tallest + 0.55 * rows, heading)
    grid = figure.subplots(rows, across, squeeze=False)
    shown: list[AxesImage] = []
    for axes, plane, signed in zip(grid.tolist(), chosen, drawn, strict=True):
        _draw_photo(axes[0], plane, behind, width)
        shown += row(axes[1:], plane, signed, behind)
    if what == "spectrum":
        label = "log10(amplitude / largest of the channel)"
        colour_bar(figure, shown[-1], grid[:, 2:].flatten().tolist(), label)
    caption = _caption(what, drawn[0].unit, behind) + noted(planes.network)
    return finished(figure, _numbers(chosen, drawn, what), caption)


def _chosen(planes: Hyperplanes, unit: Any, image: int) -> list[SingleHyperplane]:
    if unit is not None or not planes.units.shape:
        return [single(planes, unit, image)]
    first = list(np.ndindex(planes.units.shape))[:MOST_UNITS]
    return [single(planes, index, image) for index in first]


def _aspect(plane: SingleHyperplane, behind: Backdrop) -> float:
    """Height of a row of panels over the width of one: of the photo or of the receptive field."""
    assert plane.field is not None
    left, right, bottom, top = behind.view(plane.field)
    rows, columns = behind.pixels.shape[:2]
    return min(2.0, max((bottom - top) / (right - left), rows / columns))


def _signed(plane: SingleHyperplane, what: str) -> Signed:
    """The map of a unit on its receptive field."""
    assert plane.field is not None
    row, column, rows, columns = plane.field
    whole = plane.contributions() if what == "contributions" else plane.image
    part = whole[:, row : row + rows, column : column + columns].double().cpu().numpy()
    if what == "contributions":
        part = part.sum(0, keepdims=True)  # a pixel's contributions of all channels together
        return Signed(part, limit_of(part), "activation")
    return Signed(part, limit_of(part), IMAGE_UNIT)


def _title(planes: Hyperplanes, chosen: Sequence[SingleHyperplane], what: str) -> str:
    named = {"hyperplane": "Hyperplane", "contributions": "Contributions x * H"}
    subject = named.get(what, f"{what.capitalize()} of the hyperplane")
    if len(chosen) == 1:
        return f"{subject} of {chosen[0].name} ({planes.mode})"
    count = planes.value[0].numel()
    some = f", first {len(chosen)} of {count:,} units" if count > len(chosen) else ""
    return f"{subject} of {planes.layer} ({planes.mode}){some}"


def _draw_photo(axes: Axes, plane: SingleHyperplane, behind: Backdrop, width: float) -> None:
    """The whole picture, with what the network saw of it and the unit's receptive field."""
    assert plane.field is not None
    behind.show(axes)
    if behind.preparation is not None:
        crop = behind.preparation.crop
        if crop[2:] != behind.preparation.resized:
            seen = behind.box((0, 0, *crop[2:]))
            frame(axes, seen, edgecolor="white", linewidth=1.0, linestyle="--")
    frame(axes, behind.box(plane.field))
    places = ", ".join(plane.name.split(", ")[1:])
    axes.set_title(wrapped(f"{places}: {plane.value:.4g}", width * 0.95, MEDIUM), fontsize=MEDIUM)
    field = f"{plane.field[2]} x {plane.field[3]}"
    axes.set_xlabel(f"receptive field {field}", fontsize=SMALL)


def _over(
    axes: Sequence[Axes], plane: SingleHyperplane, signed: Signed, behind: Backdrop
) -> list[AxesImage]:
    """The map over the grey picture, and alone."""
    assert plane.field is not None
    behind.show(axes[0], grey=True)
    extent = behind.extent(plane.field)
    total = Signed(signed.total[None], limit_of(signed.total), signed.unit)
    axes[0].imshow(overlay(signed.total, total.limit), extent=extent, interpolation="nearest")
    behind.zoom(axes[0], plane.field)
    frame(axes[0], behind.box(plane.field))
    axes[0].set_title("sum of the channels, over the picture", fontsize=MEDIUM)
    axes[0].set_xlabel(total.words(), fontsize=SMALL)
    part = signed.part if len(signed.part) == 3 else signed.total
    scale = signed.scale if len(signed.part) == 3 else total.scale
    words = signed.words() if len(signed.part) == 3 else total.words()
    drawn = _show(axes[1], scale, part, plane, behind)
    axes[1].set_title("the map alone", fontsize=MEDIUM)
    axes[1].set_xlabel(words, fontsize=SMALL)
    return [drawn]


def _show(
    axes: Axes, scale: Scale, part: np.ndarray, plane: SingleHyperplane, behind: Backdrop
) -> AxesImage:
    """A map on the receptive field, in the same view as the picture."""
    assert plane.field is not None
    drawn = scale.show(axes, part)
    drawn.set_extent(behind.extent(plane.field))
    behind.zoom(axes, plane.field)
    axes.set_facecolor("0.5" if part.ndim == 3 else "white")  # the colour of zero
    frame(axes, behind.box(plane.field))
    return drawn


def _channels(
    axes: Sequence[Axes], plane: SingleHyperplane, signed: Signed, behind: Backdrop
) -> list[AxesImage]:
    """A panel for each channel on one scale."""
    names = _channel_names(len(signed.part))
    drawn = []
    for i, (panel, name, part) in enumerate(zip(axes, names, signed.part, strict=False)):
        drawn.append(_show(panel, signed.scale, part, plane, behind))
        panel.set_title(name, fontsize=MEDIUM)
        if i == 0:
            panel.set_xlabel(signed.words(), fontsize=SMALL)
    return drawn


def _spectrum(
    axes: Sequence[Axes], plane: SingleHyperplane, signed: Signed, behind: Backdrop
) -> list[AxesImage]:
    """The map, and the amplitudes of each channel."""
    part = signed.part if len(signed.part) == 3 else signed.total
    _show(axes[0], signed.scale, part, plane, behind)
    axes[0].set_title("hyperplane", fontsize=MEDIUM)
    axes[0].set_xlabel(signed.words(), fontsize=SMALL)
    whole = plane.image.double().cpu()
    amplitudes = log_amplitude(whole).numpy()
    shares = high_share(whole, ABOVE).numpy()
    drawn = []
    names = _channel_names(len(whole))
    for panel, name, amplitude, share in zip(axes[1:], names, amplitudes, shares, strict=False):
        drawn.append(AMPLITUDES.show(panel, amplitude, name))
        panel.set_xlabel(f"above {ABOVE:g}: {100 * share:.1f} %", fontsize=SMALL)
    return drawn


def _channel_count(chosen: Sequence[SingleHyperplane]) -> int:
    return min(MOST_CHANNELS, len(chosen[0].image))


def _channel_names(count: int) -> Sequence[str]:
    return CHANNEL_NAMES if count == 3 else [f"channel {i}" for i in range(count)]


def _caption(what: str, unit: str, behind: Backdrop) -> str:
    seen = "white, dashed: what the network saw; " if behind.preparation is not None else ""
    frames = f"{seen}gold: the receptive field"
    clipped = f"colours end at the {PERCENTILE:g}th percentile of the magnitudes that are not zero"
    if what == "spectrum":
        return (
            f"{frames}. Spectra without DC on one scale, frequency zero in the middle, half a "
            "cycle per pixel at the edges; below each, the share of its energy above "
            f"{ABOVE:g} cycles per pixel. Hyperplane: {clipped}"
        )
    signs = "red raises the value, blue lowers it"
    alone = "the colours of its channels, grey is zero"
    if what == "contributions":
        alone = "white is zero"
    if what == "channels":
        return f"{frames}. {signs}, white is zero, in {unit}; {clipped}"
    return f"{frames}. Over the picture: {signs}. Alone: {alone}. In {unit}; {clipped}"


def _numbers(
    chosen: Sequence[SingleHyperplane], drawn: Sequence[Signed], what: str
) -> dict[str, np.ndarray]:
    numbers = {
        "value": np.array([plane.value for plane in chosen]),
        "fields": np.array([plane.field for plane in chosen]),
        "limits": np.array([signed.limit for signed in drawn]),
    }
    for i, signed in enumerate(drawn):  # fields cut by the border differ in size
        numbers[f"map_{i}"] = signed.part
    if what == "spectrum":
        wholes = torch.stack([plane.image for plane in chosen]).double().cpu()
        numbers["log_amplitude"] = log_amplitude(wholes).numpy()
    return numbers
