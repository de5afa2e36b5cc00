"""The report section of growing noise: a curve for each kind of noise, and its table."""

from pathlib import Path

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
from adjointbackmap.report.sections import Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.strengths import KEY, KINDS, LEVELS, STEPS
from adjointbackmap.study.judgement.verdict import Interval, interval_of
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.results import Found, save_picture
from adjointbackmap.study.setup import read_json

QUANTITIES = {
    "turn": ("turn of H, degrees", 1.0),
    "flips": ("gates flipped, %", 100.0),
    "spread image": ("spread of image parts", 1.0),
    "spread bias": ("spread of bias parts", 1.0),
}
"""Number -> its name on an axis, and the factor that it is shown with."""
LEVEL = 0.95  # of each interval


def strengths_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its curves into the folder.

    Args:
        folder: Folder of the results of all experiments.

    Returns:
        The section, or ``None`` if there are no results.
    """
    paths = {name: folder / KEY / f"{name}.json" for name in PUBLISHED_COLUMNS}
    networks = {
        name: list(read_json(path)["images"].values())
        for name, path in paths.items()
        if path.exists()
    }
    if not networks:
        return None
    pictures = [_picture(folder, name, images) for name, images in networks.items()]
    tables = [Table(_sheet(name, images), CAPTION) for name, images in networks.items()]
    counts = sorted({len(images) for images in networks.values()})
    ran = (
        f"{' or '.join(map(str, counts))} test images of each network. PGD of {STEPS} steps aims "
        "at nine classes from random starts; each noise counts whole and halved. Random signs "
        "have the same radius. Nine Gaussian directions and independent Gaussian patterns have "
        "the lengths of PGD's patterns. H is the hyperplane of the label (RM0).",
    )
    blocks: tuple[ReportBlock, ...] = (*tables, *pictures)
    return Section(KEY, "Attacks of today against their controls", ran, blocks)


CAPTION = (
    "Medians over images with their 95 % bootstrap interval. Turn: angle between the image parts "
    "of H at the image and under a pattern, the median of 18 patterns. Flips: share of all gates. "
    "Spread: mean distance between the hyperplanes of 18 patterns, over the length of the image's "
    "own. Fooled: share of the patterns that change the class."
)


def numbers_of(images: list[Found], level: int, kind: str, key: str) -> Interval:
    """The median of a number over images, with its interval."""
    numbers = [image[str(level)][kind][key] for image in images]
    return interval_of([n for n in numbers if n is not None], "median", LEVEL)


def _sheet(name: str, images: list[Found]) -> Sheet:
    """A row for each radius and kind of noise."""
    head = ["radius", "noise", "turn", "flips, %", "spread, image", "spread, bias", "fooled, %"]
    sheet = Sheet(name, head)
    for level in LEVELS:
        for kind in KINDS:
            cells = []
            for key, factor in (*((q, f) for q, (_, f) in QUANTITIES.items()), ("fooled", 100.0)):
                found = numbers_of(images, level, kind, key)
                cells.append(_cell(found, factor) if found.images else "")
            sheet.rows.append([f"{level}/255", kind, *cells])
    return sheet


def _cell(found: Interval, factor: float) -> str:
    """A number with its interval, times a factor."""
    low, value, high = (factor * end for end in (found.low, found.value, found.high))
    return str(Interval(low, value, high, found.images))


def _picture(folder: Path, name: str, images: list[Found]) -> Picture:
    """The curves of one network."""
    drawing = draw_strengths(name, images)
    return save_picture(folder, f"{KEY}/{name}-curves", drawing, drawing.caption)


def draw_strengths(name: str, images: list[Found]) -> Drawing:
    """A panel for each quantity: its median against the radius, with a band of its interval.

    Args:
        name: The network.
        images: Results of its images.
    """
    shown = [key for key in QUANTITIES if numbers_of(images, LEVELS[0], KINDS[0], key).images]
    figure = new_figure(WIDTH, 5.6, f"{name}: H as the noise grows")
    panels = figure.subplots(2, 2, squeeze=False).flatten()
    arrays = {}
    for axes, key in zip(panels, shown, strict=False):
        label, factor = QUANTITIES[key]
        for n, kind in enumerate(KINDS):
            rows = [numbers_of(images, level, kind, key) for level in LEVELS]
            ends = factor * np.array([(found.low, found.value, found.high) for found in rows]).T
            style = {"color": COLOURS[n], "marker": MARKERS[n], "markersize": 4}
            axes.plot(LEVELS, ends[1], label=kind if key == shown[0] else None, **style)
            axes.fill_between(LEVELS, ends[0], ends[2], color=COLOURS[n], alpha=0.2, linewidth=0)
            arrays[f"{key} {kind}"] = ends
        axes.set_xscale("log", base=2)
        axes.set_xticks(LEVELS, [f"{level}" for level in LEVELS])
        axes.set_xlabel("radius in grey levels of 255", fontsize=SMALL)
        axes.set_ylabel(label, fontsize=MEDIUM)
        axes.tick_params(labelsize=SMALL)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(KINDS), fontsize=SMALL)
    return finished(figure, arrays, "lines: medians over images; bands: their 95 % intervals")
