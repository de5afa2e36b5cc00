"""The page of the lines of experiment 1, made from its results alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adjointbackmap.files.checked import sealed_text
from adjointbackmap.files.disk import write
from adjointbackmap.report.sheets import PagePlace, Sheet
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import read_json

LINE_PLACE = PagePlace("<!-- line: written by adjointbackmap study line -->", "<!-- line: end -->")
RESULTS = "study-line.json"  # of the page; it has no single images
ENDS = ("adversarial", "random")
COUNT = "{:,.0f}"
COLUMNS = {"regions": COUNT, "turn": "{:.1f}", "stretch": "{:.2f}"}


def summarised(folder: Path) -> dict[str, Any]:
    """Medians and ranges of each network with results.

    Args:
        folder: The results of the lines.

    Raises:
        ValueError: If there are none.
    """
    networks = {}
    for name in PUBLISHED_COLUMNS:
        path = folder / f"{name}.json"
        if path.exists():
            found = read_json(path)
            if found["images"]:
                networks[name] = {"seed": found["job"]["seed"], **_of(found["images"].values())}
    if not networks:
        msg = f"The folder must hold results of study line. Got {folder}: run it first."
        raise ValueError(msg)
    return {"networks": networks}


def _of(images: Any) -> Found:
    """Medians and ranges of one network."""
    rows = list(images)
    fooled = [row for row in rows if row["adversarial"]["class changes at"] is not None]
    attacked = [row["adversarial"] for row in fooled]
    ratios = [row["adversarial"]["regions"] / row["random"]["regions"] for row in rows]
    return {
        "images": len(rows),
        "fooled": len(fooled),
        "steps": _range([row["steps"] for row in fooled], COUNT),
        "l2": _range([row["l2"] for row in rows]),
        "at": _range([row["class changes at"] for row in attacked]),
        "turn until there": _range([row["turn until there"] for row in attacked]),
        "regions until there": _range([row["regions until there"] for row in attacked], COUNT),
        "ratio": _range(ratios),
        **{end: _of_end([row[end] for row in rows]) for end in ENDS},
    }


def _of_end(rows: Sequence[Found]) -> Found:
    """Medians and ranges of the segments to one of the two ends."""
    return {key: _range([row[key] for row in rows], pattern) for key, pattern in COLUMNS.items()}


def _range(numbers: Sequence[float | int], pattern: str = "{:.3g}") -> str:
    """The median and, for several numbers, the range of the middle 90 %."""
    if not numbers:
        return ""
    found = Quantiles.of(list(map(float, numbers)))
    low, median, high = map(pattern.format, (found.low, found.median, found.high))
    return f"{median} ({low} to {high})" if len(numbers) > 1 else median


def line_tables(found: dict[str, Any]) -> list[Sheet]:
    """The two tables of the page."""
    change = Sheet(
        "Where the class changes",
        [
            "network",
            "images",
            "class changes",
            "steps",
            "l2",
            "t",
            "regions until t",
            "turn until t",
        ],
    )
    ends = Sheet(
        "From the image to the adversarial image, and to a random one at the same distance",
        "network|regions|regions, random|ratio|turn|turn, random|stretch|stretch, random".split(
            "|"
        ),
    )
    for name, f in found["networks"].items():
        until = [f[key] for key in ("steps", "l2", "at", "regions until there", "turn until there")]
        change.rows.append([f"`{name}`", str(f["images"]), str(f["fooled"]), *until])
        pairs = [[f[end][key] for end in ENDS] for key in COLUMNS]
        ends.rows.append([f"`{name}`", *pairs[0], f["ratio"], *pairs[1], *pairs[2]])
    return [change, ends]


def write_line_page(found: dict[str, Any], page: Path) -> list[Path]:
    """Write the tables into their place of a page, and their numbers into ``results`` beside it.

    Args:
        found: Medians and ranges, by :func:`summarised`.
        page: The page.
    """
    LINE_PLACE.fill(page, "\n\n".join(sheet.markdown() for sheet in line_tables(found)))
    return [page, write(page.parent / "results" / RESULTS, sealed_text(found).encode())]
