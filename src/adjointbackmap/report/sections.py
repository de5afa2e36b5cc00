"""Sections of the report: claims, tables, pictures and scenes in the order of reading.

They are made from the results of an experiment alone.
"""

from dataclasses import dataclass
from pathlib import Path

from adjointbackmap.report.sheets import Sheet


@dataclass(frozen=True)
class Claim:
    """A sentence of the dissertation, or one of ours, and the number that tests it.

    Attributes:
        text: The sentence. Claims of several networks have the same text.
        measured: The number that tests it, and what it measures.
        holds: Whether the number supports the sentence; ``None`` if it cannot decide.
        published: The published number, if there is one.
        network: The network that it is about; empty if it is about all.
    """

    text: str
    measured: str
    holds: bool | None
    published: str = ""
    network: str = ""


@dataclass(frozen=True)
class Table:
    """A table and its caption.

    Attributes:
        sheet: The table; its title is the heading.
        caption: What the table shows, and what its columns are.
        published: The table of the dissertation to compare it with.
    """

    sheet: Sheet
    caption: str = ""
    published: Sheet | None = None


@dataclass(frozen=True)
class Picture:
    """A figure as three files of one name: PNG, SVG, and its numbers as NPZ.

    Attributes:
        path: The PNG, relative to the folder of the results.
        caption: What it shows: the scale, units, and the colour of zero.
        published: The figures of the dissertation that it corresponds to.
        title: Its heading, for readers who cannot see it.
    """

    path: Path
    caption: str
    published: str = ""
    title: str = ""


@dataclass(frozen=True)
class Scene:
    """Points in three dimensions that the reader can turn.

    Attributes:
        groups: Name of a group -> its points ``(n, 3)``; the first group is drawn in red.
        labels: Name of a group -> a label for each of its points.
        title: Heading.
        caption: What it shows.
    """

    groups: dict[str, list[list[float]]]
    labels: dict[str, list[str]]
    title: str
    caption: str


ReportBlock = Claim | Table | Picture | Scene


@dataclass(frozen=True)
class Section:
    """One experiment, shown on one page.

    Attributes:
        key: Its name in files and links.
        title: Heading.
        ran: What was run, with which data and settings; one string per paragraph.
        blocks: What it found, in the order of reading.
    """

    key: str
    title: str
    ran: tuple[str, ...]
    blocks: tuple[ReportBlock, ...]
