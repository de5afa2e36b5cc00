"""Histograms of each layer's relative errors, as in [Wan2022, Figs. 2.4, 2.5 and 3.6 to 3.11]."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adjointbackmap.exactness.layer_check import HISTOGRAM_EDGES, SHARE_LIMIT, LayerCheck
from adjointbackmap.plots.drawing import LARGE, MEDIUM, SMALL, WIDTH

# Position of the bin that ends at 1 %.
LIMIT = HISTOGRAM_EDGES.index(SHARE_LIMIT)
COLUMNS = 2  # panels in a row: more could not be read at the width of a page
TICKS = (-2, -9)  # powers of ten with a tick label


def histograms(runs: dict[str, dict[str, Any]], title: str, signed: bool) -> Figure:
    """A panel for each layer: the share of units for each power of ten of the error.

    Float32 is filled, and float64 is a line.

    Args:
        runs: ``"float32"`` and ``"float64"`` -> name of a layer -> its tally as in the JSON file.
        title: Heading of the figure.
        signed: Whether to show signed errors, as published, or magnitudes.
    """
    layers = list(runs["float32"])
    rows = -(-len(layers) // COLUMNS)
    figure = Figure(figsize=(WIDTH, 1.6 * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=LARGE)
    for number, name in enumerate(layers, start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        for kind, found in runs.items():
            if name in found:
                _draw_panel(axes, LayerCheck.from_dict(found[name]["check"]), kind, signed)
        units = runs["float32"][name]["check"]["units"]
        axes.set_title(f"{name}: {units:,} units", fontsize=MEDIUM)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower right", fontsize=MEDIUM, ncols=3)
    error = "signed relative error" if signed else "|relative error|"
    figure.supxlabel(f"{error} (bins are powers of ten)", fontsize=MEDIUM)
    figure.supylabel("share of the units", fontsize=MEDIUM)
    return figure


def _draw_panel(axes: Axes, check: LayerCheck, kind: str, signed: bool) -> None:
    """One panel: the bins, their ticks, and dotted lines at 1 %."""
    shares, first = _bins(check.signed if signed else check.histogram, signed)
    edges = np.arange(first, first + len(shares) + 1) - 0.5
    single = kind == "float32"
    axes.stairs(shares, edges, label=kind, fill=single, color="C0" if single else "C1")
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 2)
    places, names = _ticks(signed)
    axes.set_xticks(places, names)
    axes.tick_params(labelsize=SMALL)
    for place in (LIMIT + 0.5, -LIMIT - 0.5) if signed else (LIMIT + 0.5,):
        label = "1 %" if single and place > 0 else None  # once in the legend
        axes.axvline(place, color="0.5", linewidth=0.8, linestyle=":", label=label)


def _bins(counts: Sequence[int], signed: bool) -> tuple[np.ndarray, int]:
    """The share of units in each bin, and the position of the first bin.

    The bin of the smallest errors is at position 0.
    """
    return np.array(counts) / sum(counts), -len(HISTOGRAM_EDGES) if signed else 0


def _ticks(signed: bool) -> tuple[list[float], list[str]]:
    """Positions and labels of the ticks, at the outer edges of some bins."""
    above = {len(HISTOGRAM_EDGES) - 2.5 + power: f"$10^{{{power}}}$" for power in TICKS}
    below = {-place: f"$-{name[1:]}" for place, name in above.items()}
    named = {**(below if signed else {}), 0.0: "0", **above}
    return list(named), list(named.values())
