"""The figure of a segment: a unit, class scores, the turn of a hyperplane, and flips."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from adjointbackmap.analysis.line_profile import LineProfile

WIDTH = 7.0  # inches
LETTERS = 90  # of one line of the heading
HEIGHT = 1.9  # inches of one panel
BINS = 50  # of the flips along the segment
OPERATIONS = 8  # more do not fit into the legend: those with the fewest flips are drawn as one
BOLD = ("#0072b2", "#d7191c")  # the class at the start, and the one behind the first change


def draw(profile: "LineProfile", names: Sequence[str] | None = None, title: str = "") -> Any:
    """Draw what changes along a segment, one panel below the other.

    Args:
        profile: What was measured.
        names: Names of the classes.
        title: Heading of the figure.

    Returns:
        The Matplotlib figure.
    """
    from matplotlib.figure import Figure

    is_score = profile.layer == "output" and profile.scores is not None
    panels = [_draw_turn, _draw_flips]
    if profile.scores is not None:
        panels.insert(0, _draw_scores)
    if not is_score:
        panels.insert(0, _draw_unit)
    figure = Figure(figsize=(WIDTH, HEIGHT * len(panels) + 0.5), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        panel(axes, profile, names)
        axes.set_axisbelow(True)
        axes.grid(color="0.92")
        axes.tick_params(labelsize="small")
        if profile.change is not None:
            axes.axvline(profile.change.t, color="black", linewidth=0.8, linestyle=":")
    rows[-1].set_xlim(0, float(profile.line.t[-1]))
    rows[-1].set_xlabel("position t on the segment", fontsize="small")
    heading = title or f"{profile.line.regions:,} linear regions"
    figure.suptitle("\n".join(textwrap.wrap(heading, LETTERS)), fontsize="medium")
    return figure


def _draw_unit(axes: "Axes", profile: "LineProfile", names: Sequence[str] | None) -> None:
    """The unit along the segment: linear in each region."""
    axes.plot(*_ends(profile, profile.values.cpu().numpy()), color=BOLD[0])
    axes.set_ylabel(f"unit {profile.unit}\nof {profile.layer}", fontsize="small")


def _draw_scores(axes: "Axes", profile: "LineProfile", names: Sequence[str] | None) -> None:
    """All scores; those of the first class and of the one behind the first change are bold."""
    assert profile.scores is not None
    scores = profile.scores.cpu().numpy()
    change = profile.change
    first = int(scores[0, 0].argmax())
    bold = [first] if change is None else [change.before, change.after]
    for number in range(scores.shape[2]):
        if number not in bold:
            axes.plot(*_ends(profile, scores[:, :, number]), color="0.75", linewidth=0.8)
    for number, colour in zip(bold, BOLD, strict=False):
        label = names[number] if names else f"class {number}"
        axes.plot(*_ends(profile, scores[:, :, number]), color=colour, label=label)
    axes.legend(fontsize="small", loc="best")
    axes.set_ylabel("class scores", fontsize="small")


def _draw_turn(axes: "Axes", profile: "LineProfile", names: Sequence[str] | None) -> None:
    """Angle of the hyperplane to that of the first region."""
    line = profile.line
    places = line.middles[profile.regions].cpu().numpy()
    turned = profile.turned.cpu().numpy()
    if len(places) == line.regions:  # H is constant in each region
        t = line.t.cpu().numpy()
        axes.plot(np.stack([t[:-1], t[1:]], 1).ravel(), turned.repeat(2), color="black")
    else:
        axes.plot(places, turned, color="black")
    axes.set_ylabel("turn of H\nin degrees", fontsize="small")


def _draw_flips(axes: "Axes", profile: "LineProfile", names: Sequence[str] | None) -> None:
    """Numbers of flips in equal parts of the segment, by operation."""
    found = {name: t.cpu().numpy() for name, t in profile.line.flip_places().items()}
    by_count = sorted(found, key=lambda name: len(found[name]))
    few = by_count[: max(0, len(found) - OPERATIONS)]
    series = {name: found[name] for name in found if name not in few}
    if few:
        series[f"{len(few)} others"] = np.concatenate([found[name] for name in few])
    if series:
        edges = np.linspace(0, float(profile.line.t[-1]), BINS + 1).tolist()
        axes.hist(list(series.values()), edges, stacked=True, label=list(series))
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_ylabel(f"flips in 1/{BINS}\nof the segment", fontsize="small")


def _ends(profile: "LineProfile", values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of both ends of all regions: a jump is an upright line."""
    t = profile.line.t.cpu().numpy()
    return np.stack([t[:-1], t[1:]], 1).ravel(), values.ravel()
