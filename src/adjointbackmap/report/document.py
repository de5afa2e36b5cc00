"""Sections to Markdown: claims and tables for a page of the documentation.

The results that they are made from are copied too.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from adjointbackmap.files.disk import write
from adjointbackmap.report.page import MARKS
from adjointbackmap.report.sections import Claim, Section, Table
from adjointbackmap.report.sheets import Place, Sheet

PLACE = Place("<!-- study: written by adjointbackmap report -->", "<!-- study: end -->")
APART = "verification"  # the command ``study verification`` writes a page of its own for it


def markdown(sections: Sequence[Section]) -> str:
    """The runs, the claims and the tables of each section. Pictures are only in the report.

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
        rows = [
            [_cell(c.text), _cell(c.measured), _cell(c.published), MARKS[c.holds]] for c in claims
        ]
        yield Sheet("", ["claim", "measured", "published", "verdict"], rows).markdown()
    for table in (block for block in section.blocks if isinstance(block, Table)):
        yield from (f"*{title}*" for title in (table.sheet.title,) if title)
        yield Sheet("", table.sheet.head, table.sheet.rows).markdown()
        yield from (caption for caption in (table.caption,) if caption)


def _cell(text: str) -> str:
    """Text for a table cell: its bars are escaped, so that they do not end the cell."""
    return text.replace("|", "\\|")


def write_document(folder: Path, sections: Sequence[Section], page: Path) -> list[Path]:
    """Write claims and tables into the place of a page, and copy the results.

    The copies go into a folder next to the page. The section of the verification is left out.

    Args:
        folder: The results.
        sections: The sections that belong to the results.
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
