"""Sections to Markdown: claims and tables for a page of the documentation.

A summary in JSON holds what the page shows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adjointbackmap.files.checked import read_sealed, sealed_text
from adjointbackmap.files.disk import write
from adjointbackmap.report.page import MARKS
from adjointbackmap.report.sections import Claim, Section, Table
from adjointbackmap.report.sheets import PagePlace, Sheet

STUDY_PLACE = PagePlace("<!-- study: written by adjointbackmap report -->", "<!-- study: end -->")
APART = "verification"  # the command ``study verification`` writes a page of its own for it
SUMMARY = "study.json"  # in the folder of a study it has the runs alone


def study_markdown(sections: Sequence[Section]) -> str:
    """The runs, the claims and the tables of each section. Pictures are only in the report.

    Args:
        sections: What the experiments found.

    Example:
        >>> claim = Claim("It matters.", "3 of 4", True)
        >>> text = study_markdown([Section("noise", "Noise", ("One image.",), (claim,))])
        >>> print(text.splitlines()[-1])
        | It matters. | 3 of 4 |  | holds |
    """
    return "\n\n".join(part for section in sections for part in _of_section(section))


def _of_section(section: Section) -> Iterator[str]:
    """The paragraphs and tables of one section."""
    yield f"### {section.title}"
    yield from section.ran
    claims = [block for block in section.blocks if isinstance(block, Claim)]
    if claims:
        rows = [
            [_cell(c.text), _cell(c.measured), _cell(c.published), MARKS[c.holds]] for c in claims
        ]
        yield Sheet("", ["claim", "measured", "published", "verdict"], rows).markdown()
    for table in (block for block in section.blocks if isinstance(block, Table)):
        if table.sheet.title:
            yield f"*{table.sheet.title}*"
        yield Sheet("", table.sheet.head, table.sheet.rows).markdown()
        if table.caption:
            yield table.caption


def _cell(text: str) -> str:
    """Text for a table cell: its bars are escaped, so that they do not end the cell."""
    return text.replace("|", "\\|")


def fill(page: Path, sections: Sequence[Section]) -> None:
    """Write the claims and tables of some sections into the place of a page."""
    STUDY_PLACE.fill(page, study_markdown(sections))


def write_document(folder: Path, sections: Sequence[Section], page: Path) -> list[Path]:
    """Write claims and tables into the place of a page, and a summary of the study beside it.

    The summary holds the text and the numbers of the page, so that the page can be made again
    from it, see :func:`read_summary`. The section of the verification is left out.

    Args:
        folder: The results.
        sections: The sections that belong to the results.
        page: A page with the two lines of :data:`STUDY_PLACE`.

    Returns:
        The page, and the summary.

    Raises:
        ValueError: If the page has no such place.
    """
    STUDY_PLACE.check(page)
    shown = [section for section in sections if section.key != APART]
    fill(page, shown)
    run = read_sealed(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    found = {"run": run, "sections": [_to_dict(section) for section in shown]}
    return [page, write(page.parent / "results" / SUMMARY, sealed_text(found).encode())]


def read_summary(file: Path) -> list[Section]:
    """Read the sections of a summary: their claims and tables, without pictures.

    Raises:
        ValueError: If the file is damaged, or no summary.
    """
    found = read_sealed(file, "take it from the repository again")
    try:
        return [_from_dict(one) for one in found["sections"]]
    except (KeyError, TypeError) as error:
        msg = (
            f"{file} must be a summary that report --docs wrote. Got another file: name the "
            "summary, or the folder that study all wrote."
        )
        raise ValueError(msg) from error


def _to_dict(section: Section) -> dict[str, Any]:
    """What a page shows of a section, for JSON."""
    claims = [asdict(block) for block in section.blocks if isinstance(block, Claim)]
    tables = [
        {**asdict(block.sheet), "caption": block.caption}
        for block in section.blocks
        if isinstance(block, Table)
    ]
    start = {"key": section.key, "title": section.title, "ran": list(section.ran)}
    return {**start, "claims": claims, "tables": tables}


def _from_dict(found: dict[str, Any]) -> Section:
    claims = [Claim(**one) for one in found["claims"]]
    tables = [
        Table(Sheet(one["title"], one["head"], one["rows"]), one["caption"])
        for one in found["tables"]
    ]
    return Section(found["key"], found["title"], tuple(found["ran"]), (*claims, *tables))
