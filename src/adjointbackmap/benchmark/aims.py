"""The aims of the project, and the figures of a benchmark that reached them."""

import math
from typing import Any

from adjointbackmap.benchmark.figures import Entries, plan_distance, planned, ratio
from adjointbackmap.benchmark.ways import STUDY
from adjointbackmap.report.sheets import Sheet

# Work -> how many times as fast as the commit before.
FASTER = {
    "vgg7/layers": 1.9,
    "resnet20/layers": 1.5,
    "vgg7/conv1": 1.3,
    "vgg7/conv3": 1.6,
    "vgg7/conv5": 2.5,
    "depth/16": 1.5,
}
# Entry -> a peer and how many times as long as ours it must take.
THAN_PEERS = {
    "vgg7/classes": {"FullGrad": 1.0, "Captum InputXGradient": 1.8},
    "resnet20/classes": {"FullGrad": 1.0, "Captum InputXGradient": 1.8},
    "resnet18/layer2.1.conv2": {"jacrev": 3.0},
    "resnet18/layer4.1.conv2": {"jacrev": 1.3},
}
# Entry of two ways -> largest ratio of the first to the second.
AT_MOST = {"float64/vgg7": 2.0, "float64/resnet20": 3.0, "busy/vgg7": 1.2}
# Entry of a held pattern -> most milliseconds of one unit.
MILLISECONDS = {"held/vgg7": 3.0, "held/resnet20": 15.0}
OF_PLAIN = 80.0  # per cent of the rate of the best plain convolution
OF_BEST = 1.2  # largest ratio of the plan's choice to our fastest method


def aims(known: Entries) -> Sheet:
    """The aims and what was measured, for the entries that there are."""
    sheet = Sheet("Aims", ["work", "compared with", "aim", "measured", "reached"])
    for row in (*_before(known), *_peers(known), *_pairs(known), *_shares(known)):
        sheet.rows.append(row)
    return sheet


def _row(work: str, against: str, aim: float, value: float, unit: str, most: bool) -> list[str]:
    """A row of the table.

    Args:
        work: What is computed.
        against: What it is compared with.
        aim: The wanted figure.
        value: The measured figure.
        unit: Unit of both.
        most: Whether the figure must be at most the aim; otherwise it must be at least that.
    """
    figure = "-" if math.isnan(value) else f"{value:.3g} {unit}"
    is_reached = value <= aim if most else value >= aim
    reached = "not measured" if math.isnan(value) else "yes" if is_reached else "no"
    limit = "at most " if most else ""
    return [work, against, f"{limit}{aim:g} {unit}", figure, reached]


def _before(known: Entries) -> list[list[str]]:
    """Rows that compare with the commit before."""
    rows = []
    for work, aim in FASTER.items():
        entry = known.get(f"before/{work}")
        if entry:
            value = _first_to_second(entry)
            rows.append(_row(f"{work}, all units", "the commit before", aim, value, "x", False))
    return rows


def _peers(known: Entries) -> list[list[str]]:
    """Rows that compare with other libraries."""
    rows = []
    for name, peers in THAN_PEERS.items():
        for title, aim in peers.items() if name in known else ():
            entry = known[name]
            value = ratio(entry["ways"].get(title), planned(entry))
            rows.append(_row(f"{name}, {entry['which']} units", title, aim, value, "x", False))
    return rows


def _pairs(known: Entries) -> list[list[str]]:
    """Rows that compare two ways of the same work, and those of a held pattern."""
    rows = []
    for name, aim in AT_MOST.items():
        if name in known:
            entry = known[name]
            work = f"{name}, {entry['pair'][0]}"
            rows.append(_row(work, entry["pair"][1], aim, _first_to_second(entry), "x", True))
    for name, aim in MILLISECONDS.items():
        if name in known:
            entry = known[name]
            value = 1e3 * entry["ways"][entry["pair"][1]].get("seconds", math.nan)
            rows.append(_row(f"{name}, one unit", "itself", aim, value, "ms", True))
    return rows


def _shares(known: Entries) -> list[list[str]]:
    """Rows of the sweep's rate and of the plan."""
    rows = []
    for name in STUDY:
        if f"{name}/sweep" in known and "machine/rate" in known:
            rate = known[f"{name}/sweep"]["gflops"]["touching"]
            share = 100 * rate / known["machine/rate"]["gflops"]
            plain = "the rate of a plain convolution"
            rows.append(_row(f"{name}, windowed sweep", plain, OF_PLAIN, share, "%", False))
    distances = {name: plan_distance(e) for name, e in known.items() if e.get("full")}
    if distances:
        worst = max(distances, key=lambda name: distances[name])
        against = "the best method"
        value = distances[worst]
        rows.append(
            _row(f"the plan's choice, worst in {worst}", against, OF_BEST, value, "x", True)
        )
    return rows


def _first_to_second(entry: dict[str, Any]) -> float:
    """Time of the first way of a pair divided by that of the second."""
    first, second = (entry["ways"][title] for title in entry["pair"])
    return ratio(first, second)
