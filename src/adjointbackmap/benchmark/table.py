"""The tables of a benchmark, made from the entries of its file, for a page or for the terminal."""

import math
from collections.abc import Callable
from typing import Any

from adjointbackmap.benchmark.aims import aims
from adjointbackmap.benchmark.figures import (
    DEFECT,
    Entries,
    best_of,
    exponent,
    plan_distance,
    planned,
    ratio,
    whole_network,
)
from adjointbackmap.benchmark.peers import CLASS_PEERS, IMAGE_AND_BIAS, PEERS
from adjointbackmap.benchmark.ways import STUDY
from adjointbackmap.report.sheets import Sheet

SIDES = "Growth with the side of the image: four convolutions of 16 channels, the last one's units"
DEPTHS = (
    "Growth with depth: residual blocks of two convolutions of 16 channels at 32 x 32, "
    "the last convolution's units"
)
NOTE = (
    "time of some units, columns or images extrapolated to all; "
    "its memory is that of those that were measured"
)


# figures as text


def seconds_of(way: dict[str, Any]) -> str:
    """A time as text, with a star if it was extrapolated."""
    if "seconds" not in way:
        return "left out"
    star = "*" if "measured" in way else ""
    return f"{way['seconds']:.3g} s{star}"


def mib_of(way: dict[str, Any]) -> str:
    """Peak memory as text."""
    return "not measured" if way.get("mib") is None else f"{way['mib']:,.0f} MiB"


def products_of(way: dict[str, Any]) -> str:
    """Multiply-adds as text."""
    return f"{way['multiply_adds'] / 1e9:.3g} G" if "multiply_adds" in way else ""


def times(value: float) -> str:
    """A ratio as text."""
    return "-" if math.isnan(value) else f"{value:.3g} x"


# the tables


def plan_and_peers(known: Entries) -> Sheet:
    """One row per layer and batch: the plan's choice and the fastest peer."""
    head = [
        "work",
        "hyperplanes",
        "plan",
        "multiply-adds",
        "time",
        "memory",
        "plan / best method",
        "jacrev",
    ]
    sheet = Sheet(
        "The plan's choice beside the fastest peer that gives image and bias parts",
        [*head, "best peer", "ratio to it"],
    )
    for name, e in known.items():
        if "plan" not in e or "size" in e:
            continue
        way = planned(e)
        title, peer = best_of(e, peer=True)
        jacrev = next((seconds_of(w) for n, w in e["ways"].items() if "jacrev" in n), "-")
        defect = " (defect)" if plan_distance(e) > DEFECT else ""
        distance = f"{plan_distance(e):.2f}{defect}" if e["full"] else "-"
        cost = [products_of(way), seconds_of(way), mib_of(way), distance, jacrev]
        compared = [f"{title}, {seconds_of(peer)}", times(ratio(peer, way))]
        sheet.rows.append([f"{name}, {e['mode']}", e["which"], e["plan"], *cost, *compared])
    return sheet


def totals(known: Entries) -> Sheet:
    """All layers of one image: our methods and the peers."""
    sheet = Sheet(
        "Every layer of one image",
        ["network", "hyperplanes", "ours", "time", "memory", "peer", "time", "memory", "ratio"],
    )
    for name in STUDY:
        our, peers = whole_network(known, name)
        counted = [known[n] for n in (f"{name}/layers", f"{name}/verify") if n in known]
        units = f"{counted[0]['units']:,}" if counted else ""
        for way, w in our.items():
            for peer, p in peers.items():
                our_cells = [way, seconds_of(w), mib_of(w)]
                peer_cells = [peer, seconds_of(p), mib_of(p), times(ratio(p, w))]
                sheet.rows.append([name, units, *our_cells, *peer_cells])
    return sheet


def rates(known: Entries) -> Sheet:
    """The rates of the windowed sweep and of a plain convolution."""
    head = [
        "work",
        "multiply-adds",
        "time",
        "memory",
        "GFLOP/s",
        "share of the best plain convolution",
    ]
    sheet = Sheet("The windowed sweep of all layers beside a plain 3 x 3 convolution", head)
    plain = known.get("machine/rate", {}).get("gflops", math.nan)
    for name in STUDY:
        e = known.get(f"{name}/sweep")
        if e:
            way = e["ways"]["sweep"]
            shares = {k: 100 * v / plain for k, v in e["gflops"].items()}
            touching = f"{shares['touching']:.0f} % of those that touch a window"
            share = f"{shares['products']:.0f} %; {touching}"
            rate = f"{e['gflops']['products']:.0f}"
            cells = [products_of(way), seconds_of(way), mib_of(way), rate, share]
            sheet.rows.append([f"{name}, sweep", *cells])
    for channels, way in known.get("machine/rate", {}).get("ways", {}).items():
        figures = [products_of(way), seconds_of(way), mib_of(way), f"{way['gflops']:.0f}"]
        sheet.rows.append([f"plain convolution, {channels}", *figures, ""])
    return sheet


def growing(known: Entries, family: str, title: str) -> Sheet:
    """Cost for each size, and the power of the size with which each figure grows."""
    head = [
        "size",
        "hyperplanes",
        "plan",
        "multiply-adds",
        "time",
        "memory",
        "all layers verified",
        "memory",
        "jacrev",
    ]
    sheet = Sheet(title, [*head, "ratio to it"])
    found = [e for n, e in known.items() if n.startswith(f"{family}/")]
    nothing: dict[str, Any] = {}
    for e in found:
        way = planned(e)
        check = e["ways"].get("verify", nothing)
        peer = e["ways"].get("jacrev", nothing)
        ours = [e["which"], e["plan"], products_of(way), seconds_of(way), mib_of(way)]
        others = [seconds_of(check), mib_of(check), seconds_of(peer), times(ratio(peer, way))]
        sheet.rows.append([str(e["size"]), *ours, *others])
    if found:
        sheet.rows.append(powers(found))
    return sheet


def powers(found: list[dict[str, Any]]) -> list[str]:
    """The last row of a growing family: the power of the size with which each figure grows."""
    nothing: dict[str, Any] = {}

    def power(of: Callable[[dict[str, Any]], int | float | None]) -> str:
        return exponent([e["size"] for e in found], [of(e) or 0.0 for e in found])

    def at(way: str, key: str) -> Callable[[dict[str, Any]], int | float | None]:
        return lambda e: (planned(e) if way == "plan" else e["ways"].get(way, nothing)).get(key)

    ours = [power(at("plan", key)) for key in ("multiply_adds", "seconds", "mib")]
    pairs = (("verify", "seconds"), ("verify", "mib"), ("jacrev", "seconds"))
    others = [power(at(way, key)) for way, key in pairs]
    return ["power of the size", power(lambda e: e["units"]), "", *ours, *others, ""]


def peers(known: Entries) -> Sheet:
    """The parts that each peer computes, and how far its hyperplanes are from ours."""
    sheet = Sheet(
        "Peers",
        [
            "peer",
            "gives",
            "counted from some",
            "largest difference to ours",
            "fastest in",
            "left out in",
        ],
    )
    for title, peer in {**PEERS, **CLASS_PEERS}.items():
        ways = {n: e["ways"][title] for n, e in known.items() if title in e["ways"]}
        worst = max((w["difference"] for w in ways.values() if "difference" in w), default=None)
        full = [n for n in ways if known[n].get("full")]
        fastest = [n for n in full if best_of(known[n], peer=True, whole=False)[0] == title]
        left = [f"{n}: {w['left_out']}" for n, w in ways.items() if "left_out" in w]
        reasons = f"{len(left)} of {len(ways)}" + (f" ({left[0]})" if left else "")
        figures = [
            "not measured" if worst is None else f"{worst:.1e}",
            ", ".join(fastest) or "-",
            reasons.replace("|", "/"),
        ]
        sheet.rows.append([title, peer.gives, peer.of, *figures])
    return sheet


def all_ways(known: Entries) -> Sheet:
    """All methods of the entries that have every method."""
    head = [
        "work",
        "way",
        "gives",
        "multiply-adds",
        "time",
        "memory",
        "ratio to the plan's choice",
        "settings",
        "measured",
    ]
    sheet = Sheet("Every way", head)
    for name, e in known.items():
        for title, w in e["ways"].items() if e.get("full") else ():
            if "left_out" in w:
                reason = f"left out: {w['left_out']}".replace("|", "/")
                sheet.rows.append([name, title, *[""] * 6, reason])
                continue
            gives = w.get("gives", IMAGE_AND_BIAS)
            figures = [products_of(w), seconds_of(w), mib_of(w), times(ratio(w, planned(e)))]
            how = [w.get("settings", ""), w.get("measured", "all")]
            sheet.rows.append([name, title, gives, *figures, *how])
    return sheet


def short(found: dict[str, Any]) -> list[Sheet]:
    """The tables for the terminal, without empty ones.

    A quick look measures too little to compare it with the aims.
    """
    known = found["entries"]
    first = [] if found["quick"] else [aims(known)]
    return [sheet for sheet in (*first, *_measured(known)) if sheet.rows]


def _measured(known: Entries) -> list[Sheet]:
    """The tables of time and memory."""
    grown = [growing(known, "side", SIDES), growing(known, "depth", DEPTHS)]
    return [plan_and_peers(known), totals(known), rates(known), in_one_run(known), *grown]


def in_one_run(known: Entries) -> Sheet:
    """Two ways of the same work, measured in the same run."""
    head = ["work", "first", "time", "second", "time", "first / second"]
    sheet = Sheet("Two ways in one run", head)
    for name, e in known.items():
        if e.get("pair"):
            (first, second) = (e["ways"][title] for title in e["pair"])
            cells = [e["pair"][0], seconds_of(first), e["pair"][1], seconds_of(second)]
            sheet.rows.append([name, *cells, times(ratio(first, second))])
    return sheet


def sheets(known: Entries) -> list[Sheet]:
    """All tables."""
    found = (aims(known), *_measured(known), peers(known), all_ways(known))
    return [sheet for sheet in found if sheet.rows]


def where_measured(found: dict[str, Any]) -> str:
    """The machine, the versions and the processes of the figures."""
    env = found["environment"]
    known = found["entries"]
    runs = {e["run"] for e in known.values()}
    repeats = min((e["repeats"] for e in known.values()), default=0)
    machine = f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads"
    versions = f"torch {env['torch']}, Python {env['python']}"
    others = ", ".join(f"{name} {number}" for name, number in env["peers"].items())
    processes = f"{len(runs)} process{'es' if len(runs) != 1 else ''}"
    medians = f"Medians of at least {repeats} runs, in {processes}"
    loads = [e["load"] for e in known.values()]
    load = ""
    if loads:
        load = f"; load of the machine before an entry {min(loads):.1f} to {max(loads):.1f}"
    quick = " A quick look: not figures to keep." if found["quick"] else ""
    return f"{machine}, {versions}, {others or 'no other peer'}. {medians}{load}.{quick}"


def speed_markdown(found: dict[str, Any]) -> str:
    """The machine and all tables as Markdown."""
    tables = [sheet.markdown() for sheet in sheets(found["entries"])]
    return "\n\n".join([where_measured(found), *tables, f"\\* {NOTE}."])
