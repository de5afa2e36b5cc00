"""Figures as tables for the terminal."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.analysis.boundaries import Analysis
    from adjointbackmap.analysis.fields import Sparsity
    from adjointbackmap.engine.network import Network
    from adjointbackmap.exactness.layer_check import LayerCheck
    from adjointbackmap.planes.hyperplane import Hyperplanes


def class_table(planes: "Hyperplanes", classes: tuple[str, ...]) -> Table:
    """Output of the network and reconstruction by the hyperplane, for every class."""
    table = Table(
        "class", "network's output", "reconstruction", "relative error", title="RM0: every class"
    )
    rows = zip(
        classes, planes.value[0], planes.reconstruct()[0], planes.relative_error()[0], strict=True
    )
    for name, value, rebuilt, error in rows:
        numbers = (f"{float(value):.6f}", f"{float(rebuilt):.6f}", f"{float(error):+.1e}")
        style = "bold" if value == planes.value[0].max() else None
        table.add_row(name, *numbers, style=style)
    return table


def unit_table(network: "Network", x: "Tensor", scale: float) -> Table:
    """Value and reconstruction of one unit per layer: the middle one of the first out-channel.

    ``scale`` is the factor k of the pattern.
    """
    from adjointbackmap.planes.hyperplane import hyperplanes

    head = ("layer", "unit", "network's value", "reconstruction", "relative error")
    table = Table(*head, title="One unit of every layer")
    for layer in network.distinct_layers():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        middle = tuple(extent // 2 for extent in layer.out_shape[1:]) if mode == "RM2" else ()
        planes = hyperplanes(network, x, layer.name, mode, (*middle, 0), scale=scale)
        value = f"{float(planes.value):.6f}"
        rebuilt = f"{float(planes.reconstruct()):.6f}"
        error = f"{float(planes.relative_error()):+.1e}"
        table.add_row(layer.name, f"{mode} {(*middle, 0)}", value, rebuilt, error)
    return table


def distance_table(found: Sequence["Analysis"]) -> Table:
    """Distances of some images to the nearest kink and class boundary, and checks of both."""
    table = Table(
        *("norm", "distance to", "median", "least", "confirmed", "in region", "class changed"),
        title=f"The linear regions of {len(found)} images",
        caption="confirmed: % of images whose pattern is the same just before the kink and another "
        "just after; in region: % with the nearest boundary in their linear region; class changed: "
        "% where the network prefers the other class after it",
    )
    for norm in ("l2", "linf"):
        kinks = [a.kinks[norm] for a in found if norm in a.kinks]
        # boundaries are sorted by distance
        nearest = [a.boundaries[norm][0] for a in found if a.boundaries[norm]]
        confirmed = _percent([kink.ends_region for kink in kinks])
        inside = _percent([boundary.in_region for boundary in nearest])
        changed = _percent([boundary.plane.margin(boundary.after) < 0 for boundary in nearest])
        to_kinks = _median_and_least([kink.distance for kink in kinks])
        to_boundaries = _median_and_least([boundary.distance for boundary in nearest])
        table.add_row(norm, "nearest kink", *to_kinks, confirmed, "", "")
        table.add_row(norm, "nearest boundary", *to_boundaries, "", inside, changed)
    return table


def _median_and_least(values: list[float]) -> tuple[str, str]:
    return (f"{median(values):.2e}", f"{min(values):.2e}") if values else ("none", "none")


def _percent(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.1f}" if hits else "none"


def field_table(found: dict[str, "Sparsity"]) -> Table:
    """Sparsity of the RM4 hyperplanes by layer."""
    table = Table(
        *("layer", "hyperplanes", "zero", "field used", "whole field"),
        title="RM4: which part of its receptive field a kernel uses",
        caption="zero: % of hyperplanes that are all zero; field used: % of the pixels of all "
        "receptive fields that are used; whole field: % of hyperplanes that use every pixel",
    )
    for layer in found.values():
        shares = (layer.zero_share, layer.used_share, layer.full_share)
        cells = (f"{100 * share:.2f}" for share in shares)
        table.add_row(layer.layer, f"{layer.hyperplanes:,}", *cells)
    return table


def check_table(checks: dict[str, "LayerCheck"]) -> Table:
    """Number of units, shares and errors of every layer."""
    total = sum(check.units for check in checks.values())
    table = Table(
        *("layer", "units", "|e| <= 1 %", "e <= 1 %", "largest |e|", "scaled", "outside", "zero"),
        title=f"Every unit of every layer: {total:,} hyperplanes",
        caption="e: relative error; shares in %; scaled: largest error over the sum of |x h| and "
        "|b h|; outside: units with |e| > 1 % (in brackets those whose scaled error is within "
        "rounding); zero: % of units that are 0",
    )
    for check in checks.values():
        table.add_row(
            check.layer,
            f"{check.units:,}",
            f"{100 * check.share:.4f}",
            f"{100 * check.within_signed / check.units:.4f}",
            f"{check.largest:.1e}",
            f"{check.scaled:.1e}",
            f"{check.units - check.within:,} ({check.rounded:,})",
            f"{100 * check.zero / check.units:.1f}",
        )
    return table
