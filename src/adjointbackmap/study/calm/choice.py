"""Which network is calm: the rule that was fixed before the run, and its tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adjointbackmap.report.sheets import PagePlace, Sheet
from adjointbackmap.study.calm.measure import LEVELS, STEPS
from adjointbackmap.study.judgement.verdict import Interval, interval_of
from adjointbackmap.study.results import Found

CALM_PLACE = PagePlace("<!-- calm: written by adjointbackmap study calm -->", "<!-- calm: end -->")
POINTS = 0.04  # of clean accuracy that a calm network may lose
MOST_POINTS = 0.08  # if none is within the first
AIM = 0.5  # of the twin's turn
LEVEL = 0.95  # of each interval
RESAMPLES = 5000


@dataclass(frozen=True)
class Choice:
    """The chosen network.

    Attributes:
        title: Its name; empty if none qualifies.
        reason: Why it was chosen, or why none was.
    """

    title: str
    reason: str


def turns(found: Found, level: int = LEVELS[0], kind: str = "PGD") -> list[float]:
    """The turn of each image."""
    return [image[str(level)][kind]["turn"] for image in found["images"]]


def choose(twin: Found, candidates: Sequence[Found]) -> Choice:
    """The least median turn at the first radius under PGD, among networks near the twin's accuracy.

    Networks may lose four points of clean accuracy. If none is within four, they may lose eight.

    Args:
        twin: Numbers of the plain network of the same seed, on validation images.
        candidates: Those of the others, on the same split.
    """
    clean = twin["accuracies"]["clean"]
    for points in (POINTS, MOST_POINTS):
        near = [c for c in candidates if c["accuracies"]["clean"] >= clean - points]
        if near:
            best = min(near, key=lambda found: float(np.median(turns(found))))
            words = (
                f"the least median turn on validation images of the {len(near)} networks at most "
                f"{100 * points:g} points below the plain one"
            )
            return Choice(best["title"], words)
    return Choice("", f"no network is within {100 * MOST_POINTS:g} points of the plain one")


def turn_ratio(twin: Found, found: Found, level: int = LEVELS[0], kind: str = "PGD") -> Interval:
    """Median turn of a network over that of the twin, with a bootstrap interval over images."""
    first, second = (np.asarray(turns(one, level, kind)) for one in (found, twin))
    source = np.random.default_rng(0)
    drawn = [
        np.median(part[source.integers(len(part), size=(RESAMPLES, len(part)))], axis=1)
        for part in (first, second)
    ]
    low, high = np.quantile(drawn[0] / drawn[1], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(
        float(low), float(np.median(first) / np.median(second)), float(high), len(first)
    )


def verdict(ratio: Interval) -> str:
    """Whether the aim of half of the twin's turn is reached."""
    side = ratio.side(AIM, above=False)
    return {True: "reached", False: "not reached", None: "cannot tell"}[side]


def outcome_sheet(title: str, networks: Sequence[Found]) -> Sheet:
    """A row for each network; the first is the plain twin."""
    head = ["network", "training", "clean, %"]
    for level in LEVELS:
        head += [f"PGD-{STEPS} {level}/255, %", f"APGD {level}/255, %"]
    for level in LEVELS:
        head += [f"turn, PGD {level}/255", f"turn, random {level}/255"]
    sheet = Sheet(title, [*head, f"turn at {LEVELS[0]}/255 over the twin's", "aim"])
    for found in networks:
        shares = found["accuracies"]
        row = [found["title"], found["words"], f"{100 * shares['clean']:.1f}"]
        for level in LEVELS:
            row += [f"{100 * shares[f'{name} {level}']:.1f}" for name in ("PGD", "APGD")]
        for level in LEVELS:
            row += [_median(turns(found, level, kind)) for kind in ("PGD", "random")]
        ratio = turn_ratio(networks[0], found)
        own = found is networks[0]
        sheet.rows.append([*row, *(("", "") if own else (str(ratio), verdict(ratio)))])
    return sheet


def other_sheet(networks: Sequence[Found]) -> Sheet:
    """A row for each network with the secondary numbers."""
    near = LEVELS[0]
    head = ["network", "gates flipped by PGD, %", "by random signs, %", "regions to PGD"]
    head += ["to random signs", "nearest kink, l2", "linf", "spread ratio", "biases' share, %"]
    sheet = Sheet(f"At {near}/255 and at the image", head)
    for found in networks:
        images = found["images"]
        cells = [
            _median([100 * image[str(near)][kind]["flips"] for image in images])
            for kind in ("PGD", "random")
        ]
        slow = [image for image in images if "kinks" in image]
        cells += [
            _median([image[str(near)][kind]["regions"] for image in slow])
            for kind in ("PGD", "random")
        ]
        for norm in ("l2", "linf"):
            cells.append(_median([i["kinks"][norm] for i in slow if i["kinks"][norm] is not None]))
        cells.append(_median([image[str(near)]["spread ratio"] for image in images]))
        cells.append(_median([100 * image["biases"] for image in images]))
        sheet.rows.append([found["title"], *cells])
    return sheet


def _median(numbers: Sequence[float]) -> str:
    """The median with its interval."""
    return str(interval_of(list(numbers), "median", LEVEL)) if numbers else ""
