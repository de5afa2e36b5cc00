"""Figures as tables for the terminal."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.hyperplane import Hyperplanes
    from adjointbackmap.network import Network
    from adjointbackmap.verification import LayerCheck


def class_table(planes: "Hyperplanes", classes: tuple[str, ...]) -> Table:
    """Every class: what the network says and what the hyperplane rebuilds."""
    table = Table("class", "network's output", "reconstruction", "relative error", title="RM0: every class")
    rows = zip(classes, planes.value[0], planes.reconstruct()[0], planes.relative_error()[0], strict=True)
    for name, value, rebuilt, error in rows:
        style = "bold" if value == planes.value[0].max() else None
        table.add_row(name, f"{float(value):.6f}", f"{float(rebuilt):.6f}", f"{float(error):+.1e}", style=style)
    return table


def unit_table(network: "Network", x: "Tensor", scale: float) -> Table:
    """One unit of every layer, at a pattern taken at k: the middle of the first out-channel's map."""
    from adjointbackmap.hyperplane import hyperplanes

    table = Table("layer", "unit", "network's value", "reconstruction", "relative error", title="One unit of every layer")
    for layer in network.distinct_layers():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        middle = tuple(extent // 2 for extent in layer.out_shape[1:]) if mode == "RM2" else ()
        planes = hyperplanes(network, x, layer.name, mode, (*middle, 0), scale=scale)
        value, rebuilt, error = (float(t) for t in (planes.value, planes.reconstruct(), planes.relative_error()))
        table.add_row(layer.name, f"{mode} {(*middle, 0)}", f"{value:.6f}", f"{rebuilt:.6f}", f"{error:+.1e}")
    return table


def check_table(checks: dict[str, "LayerCheck"]) -> Table:
    """Every layer: units, shares and errors."""
    total = sum(check.units for check in checks.values())
    table = Table(
        *("layer", "units", "|e| <= 1 %", "e <= 1 %", "largest |e|", "scaled", "zero"),
        title=f"Every unit of every layer: {total:,} hyperplanes",
        caption="e: relative error; shares in %; scaled: largest error over the sum of |x h| and |b h|; zero: units that are 0",
    )
    for check in checks.values():
        table.add_row(
            check.layer,
            f"{check.units:,}",
            f"{100 * check.share:.4f}",
            f"{100 * check.within_signed / check.units:.4f}",
            f"{check.largest:.1e}",
            f"{check.scaled:.1e}",
            f"{100 * check.zero / check.units:.1f}",
        )
    return table
