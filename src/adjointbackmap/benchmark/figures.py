"""What the entries of a benchmark say: times, ratios and the fastest ways."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from adjointbackmap.benchmark.networks import kernel_names
from adjointbackmap.benchmark.peers import IMAGE_AND_BIAS

DEFECT = 1.5  # largest ratio of the plan's choice to our fastest method that is accepted
Entries = dict[str, dict[str, Any]]


def ratio(slower: dict[str, Any] | None, faster: dict[str, Any]) -> float:
    """Ratio of two times, slower / faster; NaN if one is missing."""
    if slower and "seconds" in slower and "seconds" in faster:
        return slower["seconds"] / faster["seconds"]
    return math.nan


def best_of(entry: dict[str, Any], peer: bool, whole: bool = True) -> tuple[str, dict[str, Any]]:
    """The fastest of our methods, or of the peers.

    With ``whole``, only those count that compute image and bias parts.
    """
    ways = {
        n: w
        for n, w in entry["ways"].items()
        if "seconds" in w and w.get("peer", False) == peer and n != "verify"
    }
    able = {
        n: w
        for n, w in ways.items()
        if not whole or w.get("gives", IMAGE_AND_BIAS) == IMAGE_AND_BIAS
    }
    return min(able.items(), key=lambda item: item[1]["seconds"], default=("none", {}))


def planned(entry: dict[str, Any]) -> dict[str, Any]:
    """The method that the plan chose."""
    return entry["ways"][entry["plan"]]


def plan_distance(entry: dict[str, Any]) -> float:
    """Time of the plan's choice divided by that of our fastest method.

    It is infinite if the plan's choice gave no time.
    """
    if "seconds" not in planned(entry):
        return math.inf
    return ratio(planned(entry), best_of(entry, peer=False)[1])


def defects(found: dict[str, Any]) -> list[str]:
    """Entries in which the plan's choice is much slower than our fastest method.

    The limit is the ratio ``DEFECT``.
    """
    far = {n: plan_distance(e) for n, e in found["entries"].items() if e.get("full")}
    return [f"{n} ({distance:.2f})" for n, distance in far.items() if distance > DEFECT]


def layer_entries(known: Entries, name: str) -> list[dict[str, Any]]:
    """The entries of all layers of a network; empty if one is missing."""
    if not any(n.startswith(name) for n in known):
        return []  # saves building the network
    found = [known.get(f"{name}/{layer}") for layer in kernel_names(name)]
    return [e for e in found if e] if all(found) else []


def whole_network(
    known: Entries, name: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """All layers of one image: times of our methods, and times of the peers.

    The times of jacrev are added over the layers.
    """
    layers = layer_entries(known, name)
    ways = known.get(f"{name}/layers", {}).get("ways", {})
    our = {n: w for n, w in ways.items() if not w.get("peer") and "seconds" in w}
    our |= known.get(f"{name}/verify", {}).get("ways", {})
    peers = {n: w for n, w in ways.items() if w.get("peer")}
    added = [e["ways"]["jacrev"] for e in layers]
    if added and all("seconds" in w for w in added):
        most = max((w["mib"] for w in added if w["mib"] is not None), default=None)
        peers["jacrev, layer by layer"] = {
            "seconds": sum(w["seconds"] for w in added),
            "mib": most,
            "measured": "added",
        }
    return our, peers


def exponent(sizes: list[int], values: Sequence[int | float]) -> str:
    """The power of the size with which a figure grows: the slope of a line in logarithms."""
    pairs = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v and v > 0]
    if len({p[0] for p in pairs}) < 2:
        return "-"
    middle = [fmean(side) for side in zip(*pairs, strict=True)]
    spread = sum((x - middle[0]) ** 2 for x, _ in pairs)
    return f"{sum((x - middle[0]) * (y - middle[1]) for x, y in pairs) / spread:.2f}"
