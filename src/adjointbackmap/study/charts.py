"""Charts of the study: a number with its interval for each network."""

from collections.abc import Mapping

import numpy as np

from adjointbackmap.plots.drawing import (
    COLOURS,
    MARKERS,
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    finished,
    new_figure,
)
from adjointbackmap.plots.groups import Interval


def interval_rows(
    values: Mapping[str, Mapping[str, Interval]],
    title: str,
    quantity: str,
    interval: str,
    mark: float | None = None,
    log: bool = False,
) -> Drawing:
    """A row for each network: a point and its interval for each series.

    Args:
        values: Series -> network -> a number with the low and the high end of its interval. Empty
            series are left out.
        title: Heading of the figure.
        quantity: What the numbers are, with their unit.
        interval: What the intervals are.
        mark: Where a dotted line is drawn.
        log: Whether the numbers' axis is logarithmic.
    """
    values = {series: found for series, found in values.items() if found}
    rows = list(dict.fromkeys(name for series in values.values() for name in series))
    figure = new_figure(WIDTH, 1.5 + (0.16 + 0.16 * len(values)) * len(rows), title)
    axes = figure.add_subplot()
    for i, (series, found) in enumerate(values.items()):
        # series lie one below the other, with the row's whole number in their middle
        shift = (i - (len(values) - 1) / 2) * 0.8 / len(values)
        middle, low, high = np.array(list(found.values())).T
        axes.errorbar(
            middle,
            [rows.index(name) + shift for name in found],
            # the number itself may be outside of its bootstrap interval
            xerr=np.maximum([middle - low, high - middle], 0),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linestyle="none",
            capsize=2,
            label=series,
        )
    if mark is not None:
        axes.axvline(mark, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), rows, fontsize=MEDIUM)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log" if log else "linear")
    if log and axes.get_xlim()[1] < 100 * axes.get_xlim()[0]:  # few powers of ten: plain numbers
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(quantity, fontsize=MEDIUM)
    axes.tick_params(axis="x", which="both", labelsize=SMALL)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    if len(values) > 1:
        figure.legend(loc="outside lower right", ncols=len(values), fontsize=SMALL)
    caption = f"bars: {interval}"
    if mark is not None:
        caption += f"; dotted: {mark:g}"
    numbers = {
        f"series_{i}": np.array(list(found.values())) for i, found in enumerate(values.values())
    }
    names = {f"rows_{i}": np.array(list(found)) for i, found in enumerate(values.values())}
    return finished(figure, numbers | names | {"series": np.array(list(values))}, caption)
