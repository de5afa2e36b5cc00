"""The report section of the verdicts: claims, tables and a chart of all rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.report.verdicts import MARKS
from adjointbackmap.study.charts import interval_rows
from adjointbackmap.study.judgement.rule import ALL, ERROR, INTERVALS, LEVEL, NO_ROWS
from adjointbackmap.study.judgement.run import KEY
from adjointbackmap.study.judgement.verdict import Draws, Verdict, judge
from adjointbackmap.study.results import save_picture
from adjointbackmap.study.setup import read_json

WHY_NOT = {
    "whole": "Where it fails, slopes are leaky: no gate is zero, so that nothing is cut.",
    "scaled-image": "Its control is the row of nine Gaussian directions.",
    "scaled-bias": "Its control is the row of nine Gaussian directions.",
}
"""Row -> what a reader should know where it fails."""
CHARTS = {
    "spread": ("scaled-image", "rank-image", "scaled-bias", "rank-bias", "targets"),
    "change": ("direction-image", "direction-bias", "sensitivity-learned"),
}
"""Name of a chart -> rows whose ratios it shows."""


def judgement_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its charts into the folder.

    Args:
        folder: Folder of the results of all experiments.

    Returns:
        The section, or ``None`` if there are no results.
    """
    paths = {name: folder / KEY / f"{name}.json" for name in ALL}
    networks: dict[str, Draws] = {
        name: {seed: list(images.values()) for seed, images in read_json(path)["draws"].items()}
        for name, path in paths.items()
        if path.exists()
    }
    if not networks:
        return None
    verdicts = judge(networks)
    claims = [_claim(verdict) for verdict in verdicts if verdict.intervals]
    tables = [
        Table(_sheet("Sentences of the dissertation", verdicts, own=False), CAPTION),
        Table(_sheet("Controls and questions of our own", verdicts, own=True), CAPTION),
        Table(_left_out(), "Sentences that are no row, and why."),
    ]
    blocks: tuple[ReportBlock, ...] = (*claims, *tables, *_charts(folder, verdicts))
    return Section(KEY, "Verdicts and their controls", _ran(networks, verdicts), blocks)


CAPTION = (
    "For each network and each of two draws of images: the number with its interval, at the level "
    "that is corrected for all intervals of the page. The verdict of a row is that of all its "
    "networks in both draws."
)


def _ran(networks: dict[str, Draws], verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    counts = sorted({len(images) for draws in networks.values() for images in draws.values()})
    seeds = sorted({seed for draws in networks.values() for seed in draws})
    changed = sum(verdict.changed for verdict in verdicts)
    return (
        f"{' or '.join(map(str, counts))} test images of each network that it classifies "
        f"correctly, in each of the draws with seeds {', '.join(seeds)}; image by image, in "
        f"float32. {len(verdicts)} rows have {INTERVALS} intervals in a draw. Each has the level "
        f"{100 * LEVEL:g} %, so that all together miss with a chance of {100 * ERROR:g} % at "
        "most. One training seed for each network.",
        f"Rows whose verdict changed from one draw to the other: {changed} of {len(verdicts)}. "
        "Their verdict is that we cannot tell.",
    )


def _claim(verdict: Verdict) -> Claim:
    """A row as a claim about all its networks."""
    row = verdict.row
    words = "; ".join(
        f"{name}: {' and '.join(map(str, found))}" for name, found in verdict.intervals.items()
    )
    measured = f"{row.quantity}, {row.statistic}, holds {row.side}: {words}"
    if verdict.against and row.key in WHY_NOT:
        measured += f". {WHY_NOT[row.key]}"
    source = f"section {row.source}" if row.source else "a control of ours"
    return Claim(row.sentence, measured, verdict.holds, source)


def _sheet(title: str, verdicts: Sequence[Verdict], own: bool) -> Sheet:
    """A row for each sentence, with a column for each network."""
    sheet = Sheet(title, ["sentence", "verdict", "holds", *(f"`{name}`" for name in ALL)])
    for verdict in verdicts:
        if verdict.row.own == own and verdict.intervals:
            cells = [_cell(verdict, name) for name in ALL]
            word = MARKS[verdict.holds] + (" (draws differ)" if verdict.changed else "")
            sheet.rows.append([verdict.row.sentence, word, verdict.row.side, *cells])
    return sheet


def _cell(verdict: Verdict, name: str) -> str:
    """The intervals of a network; bold where it does not hold."""
    if name not in verdict.intervals:
        return ""
    words = "; ".join(map(str, verdict.intervals[name]))
    return f"**{words}**" if verdict.of(name) is False else words


def _left_out() -> Sheet:
    sheet = Sheet("Sentences without a verdict", ["sentence", "why"])
    sheet.rows.extend([sentence, f"{why}."] for sentence, why in NO_ROWS.items())
    return sheet


def _charts(folder: Path, verdicts: Sequence[Verdict]) -> Iterator[Picture]:
    """Ratios of some rows, with the intervals of the first draw."""
    by_key = {verdict.row.key: verdict for verdict in verdicts}
    for stem, keys in CHARTS.items():
        values = {
            key.replace("-", ", "): {
                name: (found[0].value, found[0].low, found[0].high)
                for name, found in by_key[key].intervals.items()
            }
            for key in keys
        }
        interval = f"interval at the level {100 * LEVEL:g} % over the images of the first draw"
        title = {
            "spread": "Spread under adversarial noise over that of its comparison",
            "change": "Change under adversarial noise or in a trained network, over the control",
        }[stem]
        drawing = interval_rows(values, title, "ratio", interval, mark=1.0, log=True)
        yield save_picture(folder, f"{KEY}/ratios-{stem}", drawing, drawing.caption)
