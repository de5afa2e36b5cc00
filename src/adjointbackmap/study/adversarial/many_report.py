"""The report section on many images: claims, the table of distributions, pictures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adjointbackmap import plots
from adjointbackmap.exactness.layer_check import SHARE_LIMIT
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
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.many import KEY
from adjointbackmap.study.adversarial.targets import PARTS
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.results import Found, save_picture
from adjointbackmap.study.setup import read_json
from adjointbackmap.study.verification.tally import interval

Networks = dict[str, list[Found]]  # name -> results of its images
Strips = dict[str, list[float | None]]  # name -> a number of each image, if it has one


def many_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results.

    Returns:
        The section, or ``None`` if there are no results.
    """
    paths = {name: folder / KEY / f"{name}.json" for name in PUBLISHED_COLUMNS}
    runs = {name: read_json(path) for name, path in paths.items() if path.exists()}
    networks = {name: list(run["images"].values()) for name, run in runs.items() if run["images"]}
    if not networks:
        return None
    seeds, patterns = (
        ", ".join(map(str, sorted({r["job"][key] for r in runs.values()})))
        for key in ("seed", "patterns")
    )
    counts = (
        f"{name}: {len(found)} of {runs[name]['asked']} images" for name, found in networks.items()
    )
    ran = (
        f"A seeded draw (seed {seeds}) of test images, for each network those that it classifies "
        "correctly: experiment 1 on each of them (basic iterative method, stopped at the first "
        f"success), and the spread ratio of experiment 3 ({patterns} patterns of each kind).",
        f"{'; '.join(counts)}.",
    )
    blocks: tuple[ReportBlock, ...] = (
        *many_claims(networks),
        distribution_table(networks),
        *_pictures(folder, networks),
    )
    return Section(KEY, "Many images", ran, blocks)


def many_claims(networks: Networks) -> Iterator[Claim]:
    """The claims of the report, with the numbers of all networks.

    A claim holds if it holds for each network.

    Args:
        networks: Name of a network -> results of its images.
    """
    fooled = {name: _fooled(found) for name, found in networks.items()}
    worst = {
        name: max(image["errors"]["H_adv"] for image in found)
        for name, found in fooled.items()
        if found
    }
    yield Claim(
        "The hyperplanes of the adversarial image reproduce its outputs, in every image.",
        "largest |error| relative to the largest output: "
        + "; ".join(f"{name}: {error:.1e}" for name, error in worst.items()),
        max(worst.values()) <= SHARE_LIMIT if worst else None,
    )
    for text, holds in IN_MOST_IMAGES.items():
        flags = {name: list(map(holds, found)) for name, found in fooled.items()}
        yield _most(f"{text}, in most images.", flags)
    for part in PARTS:
        pairs = {name: [_changes(image, part) for image in found] for name, found in fooled.items()}
        yield from _of_part(CHANGES_MORE.format(part), pairs)
        key = f"distances {part}"
        ratios = {
            name: [(image["spread"][key], 1.0) for image in found]
            for name, found in networks.items()
        }
        yield from _of_part(SPREADS_MORE.format(part), ratios)


def _changes(image: Found, part: str) -> tuple[float | None, float]:
    """Relative change of a part of the label's hyperplane, and of the network's input."""
    return image["changed"].get(part), image["inputs changed"]


def distribution_table(networks: Networks) -> Table:
    """Table of failure counts, and of each number's median and 5 to 95 % range.

    Args:
        networks: Name of a network -> results of its images.
    """
    sheet = Sheet("Distributions over images", ["", *networks])
    for row, count in COUNTS.items():
        sheet.rows.append([row, *(str(sum(map(count, found))) for found in networks.values())])
    for row, number in DISTRIBUTIONS.items():
        known = [_known(number, found) for found in networks.values()]
        if any(known):
            cells = (str(Quantiles.of(values)) if values else "" for values in known)
            sheet.rows.append([row, *cells])
    caption = (
        "Medians, in brackets where nine in ten images lie. Rows of experiment 1 leave out "
        "images whose attack failed, spread ratios those whose patterns could not be made. "
        "Change: norm of the difference over the norm before. Errors: the largest of all "
        "outputs, relative to the largest output. Spread ratio: adversarial over Gaussian "
        "patterns; control: Gaussian ones with the variance of each pixel."
    )
    return Table(sheet, caption)


def _known(number: Callable[[Found], float | None], images: Sequence[Found]) -> list[float]:
    """A number of each image that has it."""
    return [float(value) for image in images if (value := number(image)) is not None]


def _of_attack(number: Callable[[Found], float | None]) -> Callable[[Found], float | None]:
    """Restrict a number of experiment 1 to images whose attack succeeded."""
    return lambda r: number(r) if r["fooled"] else None


def _short_of(kind: str) -> Callable[[Found], bool]:
    """Whether an image has too few patterns of a kind."""
    return lambda r: f"{kind} patterns" in (r["spread"]["missing"] or "")


def _spread(key: str) -> Callable[[Found], float | None]:
    """A number of experiment 3."""
    return lambda r: r["spread"][key]


COUNTS: dict[str, Callable[[Found], bool]] = {
    "images": lambda r: True,
    "failed: the attack": lambda r: not r["fooled"],
    "failed: too few adversarial patterns": _short_of("adversarial"),
    "failed: too few Gaussian patterns": _short_of("Gaussian"),
    "failed: too few control patterns": _short_of("control"),
}
"""Row of the table -> whether an image counts towards it."""

DISTRIBUTIONS: dict[str, Callable[[Found], float | None]] = {
    "steps of the attack": _of_attack(lambda r: r["steps"]),
    "change of the pixels": _of_attack(lambda r: r["pixels changed"]),
    "change of the network's input": _of_attack(lambda r: r["inputs changed"]),
    "change of the label's image part": _of_attack(lambda r: r["changed"]["image"]),
    "change of the label's bias part": _of_attack(lambda r: r["changed"].get("bias")),
    "angle of the label's image parts, degrees": _of_attack(lambda r: r["angle"]["image"]),
    "angle of the label's bias parts, degrees": _of_attack(lambda r: r["angle"].get("bias")),
    "angle of image parts, median of classes": _of_attack(lambda r: r["median angle"]["image"]),
    "angle of bias parts, median of classes": _of_attack(lambda r: r["median angle"].get("bias")),
    "error with H_adv": _of_attack(lambda r: r["errors"]["H_adv"]),
    "error with H_orig": _of_attack(lambda r: r["errors"]["H_orig"]),
    "gates flipped, %": _of_attack(lambda r: 100 * r["gates flipped"] / r["gates"]),
    "gates within rounding, original": _of_attack(lambda r: r["near kinks"][0]),
    "gates within rounding, adversarial": _of_attack(lambda r: r["near kinks"][1]),
    **{
        f"spread ratio, {measure}, {part} part": _spread(f"{measure} {part}")
        for part in PARTS
        for measure in ("distances", "variances")
    },
    **{
        f"spread ratio, distances, {part} part, control": _spread(f"control distances {part}")
        for part in PARTS
    },
    "patterns drawn again": _spread("redrawn"),
}
"""Row of the table -> the number of an image, or ``None`` if it has none."""


def _is_off(r: Found) -> bool:
    return r["errors"]["H_orig"] > SHARE_LIMIT


def _is_another_class(r: Found) -> bool:
    return r["class with H_orig"] != r["after"]


def _flips_more(r: Found) -> bool:
    return r["gates flipped"] > sum(r["near kinks"])


IN_MOST_IMAGES: dict[str, Callable[[Found], bool]] = {
    "The hyperplanes of the original image do not: an output is off by more than 1 % of the "
    "largest one": _is_off,
    "With the hyperplanes of the original image, the class is another one than the "
    "network's": _is_another_class,
    "More gates flip than are within rounding of their kink, before and after the attack "
    "together": _flips_more,
}
"""Claim -> whether it holds for an image whose attack succeeded."""

CHANGES_MORE = (
    "The label's hyperplane ({} part) changes more than the network's input, "
    "each relative to its norm"
)
SPREADS_MORE = (
    "The label's hyperplane ({} part, mean distances) spreads more under adversarial than "
    "under Gaussian patterns"
)


def _most(text: str, flags: dict[str, list[bool]]) -> Claim:
    """A claim about most images.

    It holds if the 95 % interval of the share lies above one half for each network.
    """
    words = []
    verdicts = []
    for name, held in flags.items():
        if held:
            count = len(held)
            outside = held.count(False)
            low, high = interval(count, outside, count, outside)
            range_ = f"{100 * low:.0f} to {100 * high:.0f} %"
            words.append(f"{name}: {count - outside} of {count} ({range_})")
            verdicts.append(True if low > 0.5 else False if high < 0.5 else None)
    holds = False if False in verdicts else None if None in verdicts or not verdicts else True
    return Claim(text, "; ".join(words) or "no image", holds)


def _of_part(text: str, pairs: dict[str, list[tuple[float | None, float]]]) -> Iterator[Claim]:
    """A claim that one number exceeds another in most images.

    No claim is made if no image has the first number.
    """
    flags = {
        name: [number > other for number, other in found if number is not None]
        for name, found in pairs.items()
    }
    if any(flags.values()):
        yield _most(f"{text}, in most images.", flags)


def _fooled(found: Sequence[Found]) -> list[Found]:
    return [r for r in found if r["fooled"]]


def _pictures(folder: Path, networks: Networks) -> Iterator[Picture]:
    """Flipped gates per layer for each data set, then angles and spread ratios of all images."""
    for classes in ("cifar10", "cifar100"):
        flips = {
            name: _fooled(found)
            for name, found in networks.items()
            if name.endswith(f"-{classes}") and _fooled(found)
        }
        if flips:
            yield _saved(folder, f"flipped-{classes}", _draw_flips(flips, classes))
    turned: dict[str, Strips] = {}
    ratios: dict[str, Strips] = {}
    for part in PARTS:
        turned[part] = {}
        ratios[part] = {}
        for name, found in networks.items():
            turned[part][name] = [image["angle"].get(part) for image in _fooled(found)]
            ratios[part][name] = [image["spread"][f"distances {part}"] for image in found]
    title = "Angle between H and H_adv of the label's class"
    yield _saved(folder, "angles", _strips(turned, title, "degrees", False))
    title = "Spread of the label's hyperplane: adversarial over Gaussian patterns"
    quantity = "ratio of mean distances; the line is at 1"
    yield _saved(folder, "spread", _strips(ratios, title, quantity, True))


def _draw_flips(networks: Networks, classes: str) -> Drawing:
    """Share of each layer's gates that flip, for the networks of one data set."""
    # The deepest network comes first: it sets the order of the layers on the axis.
    deepest = sorted(networks, key=lambda name: -len(networks[name][0]["flipped"]))
    values = {name: _by_layer(networks[name]) for name in deepest}
    title = f"Gates that flip under adversarial noise ({classes})"
    quantity = "% of a layer's gates: median, and where nine in ten images lie"
    return plots.by_layer(values, title, quantity)


def _by_layer(found: Sequence[Found]) -> dict[str, tuple[float, float, float]]:
    """Median, 5 % and 95 % quantile of the share of each layer's gates that flip."""
    shares = {
        layer: Quantiles.of([r["flipped"][layer] for r in found], 100.0)
        for layer in found[0]["flipped"]
    }
    return {layer: (share.median, share.low, share.high) for layer, share in shares.items()}


def _strips(
    values: dict[str, Strips],
    title: str,
    quantity: str,
    ratio: bool,
) -> Drawing:
    """A row of points for each network and part, with its median.

    Image parts and bias parts have different colours.
    """
    pairs = [(name, part) for name in values["image"] for part in values]
    rows = [(n, part) for n, part in pairs if any(v is not None for v in values[part][n])]
    figure = new_figure(WIDTH, 1.5 + 0.45 * max(1, len(rows)), title)
    axes = figure.add_subplot()
    numbers = {}
    for place, (name, part) in enumerate(rows):
        known = np.array([v for v in values[part][name] if v is not None])
        # Points are spread over the height of the row so that they do not hide each other.
        heights = place + np.linspace(-0.25, 0.25, len(known))
        look = PARTS.index(part)
        style: dict[str, Any] = {"s": 12, "alpha": 0.6, "linewidths": 0}
        axes.scatter(known, heights, color=COLOURS[look], marker=MARKERS[look], **style)
        axes.plot([np.median(known)] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        numbers[f"{name} {part}"] = known
    if ratio:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    labels = [f"{name}, {part} part" for name, part in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=SMALL)
    axes.invert_yaxis()
    axes.set_xlabel(quantity, fontsize=MEDIUM)
    axes.tick_params(axis="x", which="both", labelsize=SMALL)
    return finished(figure, numbers, "a point for each image, a black line at the median")


def _saved(folder: Path, stem: str, drawing: Drawing) -> Picture:
    return save_picture(folder, f"{KEY}/{stem}", drawing, drawing.caption)
