"""The receipt of a unit as a waterfall."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from adjointbackmap.planes.receipts import BIASES, Receipt
from adjointbackmap.plots.backdrop import Backdrop, backdrop, frame
from adjointbackmap.plots.drawing import MEDIUM, SMALL, WIDTH, Drawing, finished, new_figure, noted

RAISES = "#b2182b"
LOWERS = "#2166ac"
SUM = "#4d4d4d"
VALUE = "black"


def receipt(found: Receipt, over: Any = None, title: str | None = None) -> Drawing:
    """A receipt as a waterfall: each bar begins where the one above it ends.

    The last two bars are the sum of all and the value of the model. They have the same length, but
    for rounding, which is written beside them.

    Args:
        found: The receipt.
        over: What :func:`adjointbackmap.image` gave, to draw the photo itself; by default the image
            that the network took.
        title: Heading of the figure.
    """
    lines = found.lines
    names = [line.name for line in lines]
    if found.by == "region" and found.plane.field is not None:
        regions = sum(line.box is not None for line in lines)
        names[:regions] = [f"{i + 1}   {name}" for i, name in enumerate(names[:regions])]
    amounts = np.array([line.amount for line in lines])
    height = 1.6 + 0.235 * (len(lines) + 2)
    figure = new_figure(WIDTH, max(3.6, height), title or f"Receipt of {found.plane.name}")
    has_image = found.plane.field is not None
    if has_image:
        left, axes = figure.subplots(1, 2, width_ratios=[1, 2.1])
        _draw_image(left, found, backdrop(over, found.plane.x))
    else:
        axes = figure.subplots()
    _draw_bars(axes, found, names, amounts)
    caption = (
        f"red bars raise the value, blue bars lower it; {_ends(found)}; difference "
        f"{found.error:.1e}, which is rounding"
    ) + noted(found.plane.network)
    numbers = {
        "amounts": amounts,
        "names": np.array([line.name for line in lines]),
        "kinds": np.array([line.kind for line in lines]),
        "total": np.array(found.total),
        "value": np.array(found.value),
    }
    return finished(figure, numbers, caption)


def _ends(found: Receipt) -> str:
    pixels, biases = found.of("pixels"), found.of(BIASES)
    return f"pixels {pixels:+.5g}, biases {biases:+.5g}, sum {found.total:.5g}"


def _draw_bars(axes: Axes, found: Receipt, names: list[str], amounts: np.ndarray) -> None:
    starts = np.concatenate([[0.0], amounts.cumsum()])[:-1]
    colours = [RAISES if amount > 0 else LOWERS for amount in amounts]
    rows = np.arange(len(amounts))
    axes.barh(rows, amounts, left=starts, color=colours, height=0.75)
    ends = [len(amounts), len(amounts) + 1]
    axes.barh(ends, [found.total, found.value], color=[SUM, VALUE], height=0.75)
    for row, end in enumerate(starts[1:]):  # where a bar ends, the next one begins
        axes.plot([end, end], [row - 0.375, row + 1.375], color="grey", linewidth=0.6)
    pixels = sum(line.kind != BIASES for line in found.lines)
    if 0 < pixels < len(amounts):
        axes.axhline(pixels - 0.5, color="grey", linewidth=0.6, linestyle=":")
    axes.axhline(len(amounts) - 0.5, color="grey", linewidth=0.6, linestyle=":")
    labels = [f"{amount:+.3g}" for amount in amounts]
    labels += [f"{found.total:.6g}", f"{found.value:.6g}"]
    right = np.maximum(starts, starts + amounts).tolist()
    right += [max(found.total, 0), max(found.value, 0)]
    for row, (place, label) in enumerate(zip(right, labels, strict=True)):
        axes.annotate(
            label, (place, row), (3, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    axes.axvline(0, color="black", linewidth=0.6)
    reached = np.concatenate([starts, starts + amounts, [0.0, found.value]])
    spare = 0.14 * (np.ptp(reached) or 1.0)  # for the numbers beside the bars
    axes.set_xlim(reached.min() - spare / 3, reached.max() + spare)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_yticks([*rows, *ends], [*names, "sum", "model's value"], fontsize=SMALL)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_xlabel("activation", fontsize=MEDIUM)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_image(axes: Axes, found: Receipt, behind: Backdrop) -> None:
    """The image with its regions numbered."""
    behind.show(axes)
    field = found.plane.field
    assert field is not None
    axes.set_title("regions" if found.by == "region" else "image", fontsize=MEDIUM)
    for i, line in enumerate(found.lines if found.by == "region" else ()):
        if line.box is None:
            continue
        (row, column), (rows, columns) = line.box
        left, top, width, height = behind.box((row, column, rows, columns))
        frame(
            axes,
            (left, top, width, height),
            edgecolor="white",
            linewidth=0.7,
            path_effects=[withStroke(linewidth=1.6, foreground="black")],  # on white photos too
        )
        axes.text(
            left + width / 2,
            top + height / 2,
            str(i + 1),
            ha="center",
            va="center",
            fontsize=SMALL,
            color="white",
            bbox={"facecolor": "black", "alpha": 0.5, "pad": 1.0, "linewidth": 0},
        )
    frame(axes, behind.box(field))
