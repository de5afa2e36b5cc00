"""Sections to Markdown: a page for each question, with figures, claims and folded tables.

A summary in JSON holds what the pages show, so that they can be made again from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from adjointbackmap.files.checked import read_sealed, sealed_text
from adjointbackmap.files.disk import write
from adjointbackmap.report.page import data_url
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import PagePlace, Sheet, folded
from adjointbackmap.report.verdicts import MARKS, group_claims

STUDY_PLACE = PagePlace("<!-- study: written by adjointbackmap report -->", "<!-- study: end -->")
APART = "verification"  # the command ``study verification`` writes a page of its own for it
SUMMARY = "study.json"  # in the folder of a study it has the runs alone
INDEX = "index.md"
CLAIMS = "claims.md"
FIGURES = Path("figures") / "study"  # beside the folder of the pages
MADE = (
    "*`adjointbackmap report docs/results/study.json --docs docs/study` writes this page: "
    "[all pages of the study](index.md).*"
)


@dataclass(frozen=True)
class QuestionPage:
    """A page of the documentation that answers one question.

    Attributes:
        name: Name of its file, without suffix.
        question: Its heading.
        key: The section that it shows.
        lead: Its first paragraphs: what was asked, and how the numbers are to be read.
        pictures: Paths of its pictures in the folder of the results, in the order of reading.
        phrases: Parts of the claims and table titles that are on the page. Empty for all that no
            other page of the section has.
    """

    name: str
    question: str
    key: str
    lead: str
    pictures: tuple[str, ...]
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """What a page shows.

    Attributes:
        page: The page.
        ran: What was run; a paragraph each.
        claims: Its claims.
        tables: Its tables.
        pictures: Its pictures.
    """

    page: QuestionPage
    ran: tuple[str, ...]
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]


def contents(sections: Sequence[Section], pages: Sequence[QuestionPage]) -> list[Content]:
    """Share the blocks of the sections among the pages.

    Pages of sections without results are left out, and so are pictures that are not there.

    Args:
        sections: What the experiments found.
        pages: The pages, in the order of reading.
    """
    by_key = {section.key: section for section in sections}
    return [_content(page, by_key[page.key], pages) for page in pages if page.key in by_key]


def _content(page: QuestionPage, section: Section, pages: Sequence[QuestionPage]) -> Content:
    others = [
        phrase
        for other in pages
        if other.key == page.key and other != page
        for phrase in other.phrases
    ]

    def belongs(text: str) -> bool:
        if page.phrases:
            return any(phrase in text for phrase in page.phrases)
        return not any(phrase in text for phrase in others)

    claims = [block for block in section.blocks if isinstance(block, Claim)]
    tables = [block for block in section.blocks if isinstance(block, Table)]
    pictures = {b.path.as_posix(): b for b in section.blocks if isinstance(b, Picture)}
    return Content(
        page,
        section.ran,
        tuple(claim for claim in claims if belongs(claim.text)),
        tuple(table for table in tables if belongs(table.sheet.title)),
        tuple(pictures[path] for path in page.pictures if path in pictures),
    )


def page_markdown(content: Content) -> str:
    """A page: its lead, a picture, claims, and the other pictures. Tables and runs are folded.

    Args:
        content: What it shows.
    """
    page = content.page
    shown = [part for picture in content.pictures for part in _picture(picture)]
    parts = [f"# {page.question}", page.lead, *shown[:2]]
    if content.claims:
        parts += ["## What was found", claims_table(content.claims)]
        parts.append(folded("Each claim with its numbers, network by network", _details(content)))
    if shown[2:]:
        parts += ["## Pictures", *shown[2:]]
    if content.tables:
        parts += ["## Tables", *_tables(content.tables)]
    parts += ["## What was run", folded("Images, weights and settings", content.ran), MADE]
    return "\n\n".join(parts) + "\n"


def _picture(picture: Picture) -> tuple[str, str]:
    """A picture and its caption."""
    place = f"../{(FIGURES / figure_name(picture.path)).as_posix()}"
    beside = f" Beside {picture.published}." if picture.published else ""
    return f"![{picture.title}]({place})", f"*{picture.caption}{beside}*"


def claims_table(claims: Sequence[Claim]) -> str:
    """A row for each sentence, with its verdict over all networks."""
    rows = [[_cell(group.text), group.verdict] for group in group_claims(claims)]
    return Sheet("", ["claim", "verdict"], rows).markdown()


def _details(content: Content) -> Iterator[str]:
    """The numbers behind each claim."""
    for group in group_claims(content.claims):
        yield f"**{group.text}**"
        rows = [
            [
                claim.network or "all",
                _cell(claim.measured),
                _cell(claim.published),
                MARKS[claim.holds],
            ]
            for claim in group.claims
        ]
        yield Sheet("", ["network", "measured", "published", "verdict"], rows).markdown()


def _tables(tables: Sequence[Table]) -> Iterator[str]:
    """Folded tables. A caption that several of them share is above them, once."""
    captions = [table.caption for table in tables]
    shared = {caption for caption in captions if captions.count(caption) > 1}
    yield from (caption for caption in dict.fromkeys(captions) if caption in shared)
    for table in tables:
        count = len(table.sheet.rows)
        summary = f"{table.sheet.title}: {count} {'row' if count == 1 else 'rows'}"
        shown = Sheet("", table.sheet.head, table.sheet.rows).markdown()
        own = [table.caption] if table.caption and table.caption not in shared else []
        yield folded(summary, [shown, *own])


def index_markdown(found: Sequence[Content]) -> str:
    """The table of the pages: for each, how many of its claims hold for every network."""
    rows = []
    for content in found:
        groups = group_claims(content.claims)
        held = sum(group.holds is True for group in groups)
        page = content.page
        count = f"{held} of {len(groups)}" if groups else ""
        rows.append([f"[{page.question}]({page.name}.md)", count])
    head = ["question", "claims that hold for every network"]
    return Sheet("", head, rows).markdown()


def claims_markdown(found: Sequence[Content]) -> str:
    """All claims in the order of the pages, with their verdicts."""
    parts = [
        "# Which claims hold?",
        "A claim is a sentence of the dissertation, or one of ours that says so by its words. It "
        "is tested by a number for each network. Where the sentence has no threshold, ours is in "
        "brackets: *read*. The pages have the numbers.",
        "Claims are not equally hard: for some sentences any network would pass, and most are "
        "about one image. [The rule of judgement](../study-rule.md) is stricter. Networks on "
        "CIFAR-100 are beyond the chapters of the dissertation, so they stand apart and count "
        "nowhere.",
    ]
    for content in found:
        if content.claims:
            page = content.page
            parts += [f"## [{page.question}]({page.name}.md)", claims_table(content.claims)]
    return "\n\n".join([*parts, MADE]) + "\n"


def figure_name(picture: Path) -> str:
    """The name of a picture's file in the documentation.

    Example:
        >>> figure_name(Path("noise/vgg7-cifar10-image.png"))
        'noise-vgg7-cifar10-image.png'
    """
    return picture.as_posix().replace("/", "-")


def write_pages(
    sections: Sequence[Section], where: Path, pages: Sequence[QuestionPage]
) -> list[Path]:
    """Write all pages, and the table of pages into the place of ``index.md``.

    Args:
        sections: What the experiments found.
        where: Folder with ``index.md``, which has the two lines of :data:`STUDY_PLACE`.
        pages: The pages.

    Returns:
        The written files.

    Raises:
        ValueError: If ``index.md`` has no such place.
    """
    STUDY_PLACE.check(where / INDEX)
    found = contents(sections, pages)
    STUDY_PLACE.fill(where / INDEX, index_markdown(found))
    texts = {f"{content.page.name}.md": page_markdown(content) for content in found}
    texts[CLAIMS] = claims_markdown(found)
    return [where / INDEX, *(write(where / name, text) for name, text in texts.items())]


def write_document(
    folder: Path, sections: Sequence[Section], where: Path, pages: Sequence[QuestionPage]
) -> list[Path]:
    """Write all pages, their figures, and a summary of the study.

    The summary holds what the pages show, so that they can be made again from it, see
    :func:`read_summary`. The section of the verification is left out.

    Args:
        folder: The results.
        sections: The sections that belong to the results.
        where: Folder of the pages, see :func:`write_pages`. Figures go into ``figures/study``
            beside it, and the summary into ``results``.
        pages: The pages.

    Returns:
        The pages, and the summary.
    """
    shown = [section for section in sections if section.key != APART]
    written = write_pages(shown, where, pages)
    used = {path for page in pages for path in page.pictures}
    for picture in _pictures(shown, used):
        data_url(folder / picture.path)  # raises if it is missing
        target = where.parent / FIGURES / figure_name(picture.path)
        write(target, _smaller(folder / picture.path))
    run = read_sealed(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    found = {"run": run, "sections": [_to_dict(section, used) for section in shown]}
    summary = where.parent / "results" / SUMMARY
    return [*written, write(summary, sealed_text(found).encode())]


def _smaller(picture: Path) -> bytes:
    """The same pixels in a smaller PNG file, without the channel of opacity."""
    from PIL import Image

    content = BytesIO()
    with Image.open(picture) as opened:
        opened.convert("RGB").save(content, format="png", optimize=True)
    return content.getvalue()


def _pictures(sections: Sequence[Section], used: set[str]) -> Iterator[Picture]:
    """The pictures that a page shows."""
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture) and block.path.as_posix() in used:
                yield block


def _cell(text: str) -> str:
    """Text for a table cell: its bars are escaped, so that they do not end the cell."""
    return text.replace("|", "\\|")


def read_summary(file: Path) -> list[Section]:
    """Read the sections of a summary: claims, tables, and the pictures of the pages.

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


def _to_dict(section: Section, used: set[str]) -> dict[str, Any]:
    """What the pages show of a section, for JSON."""
    claims = [asdict(block) for block in section.blocks if isinstance(block, Claim)]
    tables = [
        {**asdict(block.sheet), "caption": block.caption}
        for block in section.blocks
        if isinstance(block, Table)
    ]
    pictures = [
        {**asdict(picture), "path": picture.path.as_posix()}
        for picture in _pictures([section], used)
    ]
    start = {"key": section.key, "title": section.title, "ran": list(section.ran)}
    return {**start, "claims": claims, "tables": tables, "pictures": pictures}


def _from_dict(found: dict[str, Any]) -> Section:
    claims = [Claim(**one) for one in found["claims"]]
    tables = [
        Table(Sheet(one["title"], one["head"], one["rows"]), one["caption"])
        for one in found["tables"]
    ]
    pictures = [Picture(**{**one, "path": Path(one["path"])}) for one in found["pictures"]]
    blocks: tuple[ReportBlock, ...] = (*claims, *tables, *pictures)
    return Section(found["key"], found["title"], tuple(found["ran"]), blocks)
