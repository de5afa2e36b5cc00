"""What an experiment tells: claims, tables, pictures and scenes in the order of reading, made from its results alone."""

from dataclasses import dataclass
from pathlib import Path

from adjointbackmap.report.sheets import Sheet


@dataclass(frozen=True)
class Claim:
    """A sentence of the dissertation, or of ours, tested by a number.

    Attributes:
        text: The sentence.
        measured: The number that tests it, with what it is of.
        holds: Whether the number bears the sentence out; ``None`` where it cannot tell.
        published: The number that was published, where there is one.
    """

    text: str
    measured: str
    holds: bool | None
    published: str = ""


@dataclass(frozen=True)
class Table:
    """A table and its caption.

    Attributes:
        sheet: The table; its title heads it.
        caption: What it shows, and what its columns are.
        published: The table of the dissertation that stands beside it.
    """

    sheet: Sheet
    caption: str = ""
    published: Sheet | None = None


@dataclass(frozen=True)
class Picture:
    """A figure in files beside each other: PNG, SVG, and the numbers that it shows as NPZ.

    Attributes:
        path: The PNG, relative to the folder of the results.
        caption: What it shows: scale, units, where zero is.
        published: The figures of the dissertation that it stands for.
    """

    path: Path
    caption: str
    published: str = ""


@dataclass(frozen=True)
class Scene:
    """Points in three dimensions that the reader can turn.

    Attributes:
        groups: Name of a group -> its points ``(n, 3)``; the first group is drawn in red.
        labels: Name of a group -> a word for each of its points.
        title: Heading.
        caption: What it shows.
    """

    groups: dict[str, list[list[float]]]
    labels: dict[str, list[str]]
    title: str
    caption: str


Block = Claim | Table | Picture | Scene


@dataclass(frozen=True)
class Section:
    """One experiment on one page.

    Attributes:
        key: Its name in files and links.
        title: Heading.
        ran: What was run, on what, with which settings; a paragraph each.
        blocks: What it found, in the order of reading.
    """

    key: str
    title: str
    ran: tuple[str, ...]
    blocks: tuple[Block, ...]
