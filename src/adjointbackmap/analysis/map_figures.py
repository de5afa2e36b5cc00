"""Pictures of a region map: a Matplotlib figure, and an interactive page."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from adjointbackmap.analysis.maps import RegionMap

THIN = 0.25  # width of the edges of regions, in points
MARKS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))  # the three images of a slice


def draw(
    found: "RegionMap",
    axes: "Axes | None" = None,
    names: Sequence[str] | None = None,
    marks: Sequence[str] | None = None,
    edges: bool = True,
) -> Any:
    """Draw a map: classes in colours, edges of regions, decision boundaries.

    Args:
        found: The map.
        axes: Where to draw; by default a new figure.
        names: Names of the classes.
        marks: Labels of the points (0, 0), (1, 0) and (0, 1), such as the images of a slice.
        edges: Whether to draw the edges of the regions.

    Returns:
        The Matplotlib figure.
    """
    from matplotlib import pyplot as plt
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.patches import Patch

    if axes is None:
        _, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    colours = plt.get_cmap("Pastel1" if edges else "Set2")
    if found.has_classes:
        cells = found.cells
        numbers = cells.classes.unique().tolist()
        colour = {number: colours(place % colours.N) for place, number in enumerate(numbers)}
        faces = [colour[number] for number in cells.classes.tolist()]
        parts = [vertices.cpu().numpy() for vertices in cells.polygons.listed()]
        axes.add_collection(PolyCollection(parts, facecolors=faces, edgecolors="none"))
        labels = [Patch(color=colour[n], label=_label(n, names)) for n in numbers]
        axes.legend(handles=labels, loc="upper right", fontsize="small", title="class")
    if edges:
        outlines = [vertices.cpu().numpy() for vertices in found.vertices()]
        axes.add_collection(
            PolyCollection(outlines, facecolors="none", edgecolors="0.35", linewidths=THIN)
        )
    if found.has_classes:
        lines = [line.points.cpu().numpy() for line in found.boundaries]
        axes.add_collection(LineCollection(lines, colors="black", linewidths=1.6))
    for place, label in zip(MARKS, marks or (), strict=False):
        axes.plot(*place, "o", color="black", markersize=4)
        axes.annotate(label, place, (4, 4), textcoords="offset points", fontsize="small")
    axes.set(xlim=found.limits[0], ylim=found.limits[1], xlabel="s", ylabel="t")
    axes.set_title(f"{len(found.polygons):,} polygons", fontsize="medium")
    return axes.figure


def _label(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names else str(number)


def write_page(
    found: "RegionMap", path: str | PathLike[str], names: Sequence[str] | None = None
) -> None:
    """Write an interactive page of a map, see :meth:`RegionMap.html`.

    Args:
        found: The map.
        path: File to write.
        names: Names of the classes.

    Raises:
        ImportError: If Plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        msg = "An interactive map needs Plotly: pip install plotly."
        raise ImportError(msg) from error
    figure = graph_objects.Figure()
    cells = found.cells
    listed = cells.polygons.listed()
    centres = cells.polygons.centres()
    for number in cells.classes.unique().tolist():
        those = (cells.classes == number).nonzero().flatten().tolist()
        x, y = _rings([listed[n] for n in those])
        name = _label(number, names)
        figure.add_scatter(
            x=x, y=y, fill="toself", mode="lines", line_width=0.4, name=name, hoverinfo="skip"
        )
        figure.add_scatter(
            x=centres[those, 0].tolist(),
            y=centres[those, 1].tolist(),
            mode="markers",
            marker_opacity=0,
            text=[_described(found, n, name) for n in those],
            hoverinfo="text",
            showlegend=False,
        )
    x, y = _rings([line.points for line in found.boundaries], closed=False)
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": "black", "width": 2}, name="decision boundary"
    )
    figure.update_layout(
        title=f"{len(found.polygons):,} polygons",
        xaxis={"title": "s", "range": list(found.limits[0])},
        yaxis={"title": "t", "range": list(found.limits[1]), "scaleanchor": "x"},
        hovermode="closest",
    )
    figure.write_html(path, include_plotlyjs=True)


def _rings(
    parts: Sequence[torch.Tensor], closed: bool = True
) -> tuple[list[float | None], list[float | None]]:
    """Coordinates of several lines, with a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    for points in parts:
        ring = torch.cat([points, points[:1]]) if closed else points
        x += [*ring[:, 0].tolist(), None]
        y += [*ring[:, 1].tolist(), None]
    return x, y


def _described(found: "RegionMap", cell: int, name: str) -> str:
    """What stands under the pointer: class, region, area, and the scores in the middle."""
    region = found.cells.region[cell]
    centre = found.cells.polygons.chosen(torch.tensor([cell])).centres()
    scores = found.values(centre, region[None])[0]
    listed = ", ".join(f"{score:.3g}" for score in scores.tolist())
    area = float(found.areas[region])
    return f"class {name}<br>region {int(region)}, area {area:.3g}<br>scores {listed}"
