"""Groups of points, such as those of tSNE and factor analysis, and numbers per layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adjointbackmap.plots.drawing import (
    COLOURS,
    MARKERS,
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    finished,
    new_figure,
    wrapped,
)

HEIGHT = 4.4  # inches of a figure of numbers per layer
PANELS_IN_ROW = 2
Interval = tuple[float, float, float]
"""A number, and the two ends of its interval."""


def points(groups: Mapping[str, np.ndarray], title: str, axes: Sequence[str]) -> Drawing:
    """Groups of points in two or three dimensions of the same unit [Wan2022, Figs. 4.4, 4.5].

    The colours of the groups are red, black, blue and so on.

    Args:
        groups: Name -> points ``(n, 2)`` or ``(n, 3)``. The first group, the adversarial one, is
            red and is drawn on top.
        title: Heading of the figure.
        axes: Names of the dimensions, two or three.

    Raises:
        ValueError: If there is no group, or the points of a group have another number of dimensions
            than ``axes``.
    """
    wrong = [
        f"{name} {found.shape}"
        for name, found in groups.items()
        if found.ndim != 2 or found.shape[1] != len(axes)
    ]
    if wrong or not groups or len(axes) not in (2, 3):
        shapes = ", ".join(wrong) or f"{len(groups)} groups"
        msg = (
            "Groups must be points (n, 2) or (n, 3) with a name for each axis. "
            f"Got {shapes} and axes {list(axes)}."
        )
        raise ValueError(msg)
    figure = new_figure(WIDTH * 0.75, 5.6, title)
    drawn = figure.add_subplot(projection="3d" if len(axes) == 3 else None)
    for i, (name, found) in enumerate(groups.items()):
        look: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "s": 36,
            "edgecolors": "white",
            "linewidths": 0.4,
            "zorder": len(groups) - i + 2,  # the first group on top, all above the axes
            "label": f"{name} ({len(found)})",
        }
        drawn.scatter(*found.T, **look)
    for dimension, name in zip("xyz", axes, strict=False):
        getattr(drawn, f"set_{dimension}label")(name, fontsize=MEDIUM)
    drawn.set_aspect("equal", adjustable="datalim")
    drawn.tick_params(labelsize=SMALL)
    drawn.legend(loc="upper left", fontsize=MEDIUM)
    caption = "all axes have one scale; numbers in brackets: how many points"
    numbers = {f"points_{i}": found for i, found in enumerate(groups.values())}
    names = {"groups": np.array(list(groups)), "axes": np.array(axes)}
    return finished(figure, numbers | names, caption)


def by_layer(
    values: Mapping[str, Mapping[str, float | Interval]],
    title: str,
    quantity: str,
    kind: str = "line",
    log: bool = False,
) -> Drawing:
    """Numbers per layer, such as the number of gates that flip.

    Each series is one line or one set of bars, with intervals if it has any. Several lines with
    intervals have a panel each.

    Args:
        values: Series -> layer -> a number, or a median with the low and the high end of its
            interval.
        title: Heading of the figure.
        quantity: What the numbers are, with their unit.
        kind: ``"line"`` or ``"bar"``.
        log: Whether the numbers' axis is logarithmic.

    Raises:
        ValueError: If the kind is unknown, or there is no number.
    """
    layers = list(dict.fromkeys(layer for series in values.values() for layer in series))
    if kind not in ("line", "bar") or not layers:
        msg = (
            "by_layer must draw line or bar, of at least one number. "
            f"Got {kind!r} of {len(layers)} layers."
        )
        raise ValueError(msg)
    table = {
        name: np.array([_with_ends(series.get(layer)) for layer in layers])
        for name, series in values.items()
    }
    has_ends = any(np.isfinite(found[:, 1]).any() for found in table.values())
    if kind == "line" and has_ends and len(table) > 1:
        figure = _draw_panels(table, layers, title, quantity, log)
    else:
        figure = new_figure(WIDTH, HEIGHT, title)
        axes = figure.add_subplot()
        _draw_series(axes, table, kind)
        _finish_axes(axes, layers, log)
        # The names of the layers, below the axes, need the rest of the height.
        axes.set_ylabel(wrapped(quantity, 0.6 * HEIGHT, MEDIUM), fontsize=MEDIUM)
        axes.legend(fontsize=MEDIUM)
    caption = "layers in the order of execution"
    if has_ends:
        caption += "; whiskers: the interval of each number"
    numbers = {f"series_{i}": found for i, found in enumerate(table.values())}
    names = {"series": np.array(list(table)), "layers": np.array(layers)}
    return finished(figure, numbers | names, caption)


def _draw_panels(
    table: Mapping[str, np.ndarray],
    layers: Sequence[str],
    title: str,
    quantity: str,
    log: bool,
) -> Figure:
    """A panel for each series, two in a row on one scale: whiskers in one panel would overlap.

    A panel has the layers that its series has.
    """
    rows = -(-len(table) // PANELS_IN_ROW)
    figure = new_figure(WIDTH, 0.9 + 2.3 * rows, title)
    grid = figure.subplots(rows, PANELS_IN_ROW, squeeze=False, sharey=True).flatten()
    for axes, (name, found) in zip(grid, table.items(), strict=False):
        known = np.isfinite(found[:, 0])
        _draw_series(axes, {name: found[known]}, "line")
        _finish_axes(axes, [layers[i] for i in known.nonzero()[0]], log)
        axes.set_title(name, fontsize=MEDIUM)
    for axes in grid[len(table) :]:
        axes.set_axis_off()
    figure.supylabel(wrapped(quantity, 0.8 * figure.get_figheight(), MEDIUM), fontsize=MEDIUM)
    return figure


def _finish_axes(axes: Axes, layers: Sequence[str], log: bool) -> None:
    """Names of the layers, and the scale of the numbers."""
    rotation = 90 if len(layers) > 10 else 0  # more names do not fit side by side
    axes.set_xticks(range(len(layers)), layers, fontsize=SMALL, rotation=rotation)
    axes.tick_params(axis="y", labelsize=SMALL)
    axes.set_yscale("log" if log else "linear")


def _draw_series(axes: Axes, table: Mapping[str, np.ndarray], kind: str) -> None:
    """Draw each series, with whiskers for its intervals.

    Args:
        axes: The axes, with a layer at each whole number.
        table: Series -> number and ends of its interval for each layer, ``(layers, 3)``.
        kind: ``"line"`` or ``"bar"``.
    """
    width = 0.8 / len(table)  # of a bar; 0.2 are left between two layers
    for i, (name, found) in enumerate(table.items()):
        middle, low, high = found.T
        # series stand side by side, with the layer's whole number in their middle
        shift = (i - (len(table) - 1) / 2) * (width if kind == "bar" else 0.12)
        place = np.arange(len(found)) + shift
        look: dict[str, Any] = {
            "yerr": np.array([middle - low, high - middle]),
            "capsize": 2,
            "color": COLOURS[i % len(COLOURS)],
            "label": name,
        }
        if kind == "bar":
            axes.bar(place, middle, width, ecolor="0.4", **look)
        else:
            marker = MARKERS[i % len(MARKERS)]
            axes.errorbar(place, middle, marker=marker, markersize=5, **look)


def _with_ends(value: float | Interval | None) -> Sequence[float]:
    """A number and the two ends of its interval; NaN for a missing number or end."""
    missing = float("nan")
    if value is None:
        return (missing, missing, missing)
    return value if isinstance(value, tuple) else (value, missing, missing)
