"""Sections -> Markdown: claims and tables for a page of the documentation, with the results that they are made from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from adjointbackmap.files.disk import write
from adjointbackmap.report.page import MARKS
from adjointbackmap.report.sections import Claim, Section, Table
from adjointbackmap.report.sheets import Place, Sheet

PLACE = Place("<!-- study: written by adjointbackmap report -->", "<!-- study: end -->")
APART = "verification"  # has a page of its own, which study verification writes


def markdown(sections: Sequence[Section]) -> str:
    """What was run, the claims and the tables of each section; pictures are in the report.

    Args:
        sections: What the experiments found.

    Example:
        >>> text = markdown([Section("noise", "Noise", ("One image.",), (Claim("It matters.", "3 of 4", True),))])
        >>> print(text.splitlines()[-1])
        | It matters. | 3 of 4 |  | holds |
    """
    return "\n\n".join(part for section in sections for part in _of_section(section))


def _of_section(section: Section) -> Iterator[str]:
    yield f"### {section.title}"
    yield from section.ran
    claims = [block for block in section.blocks if isinstance(block, Claim)]
    if claims:
        rows = [[_cell(c.text), _cell(c.measured), _cell(c.published), MARKS[c.holds]] for c in claims]
        yield Sheet("", ["claim", "measured", "published", "verdict"], rows).markdown()
    for table in (block for block in section.blocks if isinstance(block, Table)):
        yield from (f"*{title}*" for title in (table.sheet.title,) if title)
        yield Sheet("", table.sheet.head, table.sheet.rows).markdown()
        yield from (caption for caption in (table.caption,) if caption)


def _cell(text: str) -> str:
    """Text that may stand in a cell: its bars are no borders."""
    return text.replace("|", "\\|")


def write_document(folder: Path, sections: Sequence[Section], page: Path) -> list[Path]:
    """Put claims and tables into the place of a page, and the results into a folder beside it; not those of the verification.

    Args:
        folder: The results.
        sections: What they tell.
        page: A page with the two lines of :data:`PLACE`.

    Returns:
        The page, and the copies of the results.

    Raises:
        ValueError: If the page has no such place.
    """
    PLACE.check(page)
    PLACE.fill(page, markdown([section for section in sections if section.key != APART]))
    copies = []
    for path in sorted(path for path in folder.glob("**/*.json") if path.parent.name != APART):
        copy = page.parent / "results" / "study" / path.relative_to(folder)
        copies.append(write(copy, path.read_bytes()))
    return [page, *copies]
