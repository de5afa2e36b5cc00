"""Sections to HTML. Templates escape text; pictures and scripts are part of the page."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from adjointbackmap.files.disk import write
from adjointbackmap.report.scenes import plotly_script, scene_figure
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Scene, Section, Table
from adjointbackmap.report.sheets import plain
from adjointbackmap.report.verdicts import MARKS, ClaimGroup, group_claims

FIRST_PICTURES = 2  # of a section, above its claims


@dataclass(frozen=True)
class _Part:
    """A section in the order of the page: a few pictures, claims, tables, all other pictures.

    Attributes:
        section: The section.
        first: The first pictures and scenes.
        groups: Its claims by their sentence.
        tables: Its tables.
        others: All other pictures and scenes.
    """

    section: Section
    first: Sequence[ReportBlock]
    groups: Sequence[ClaimGroup]
    tables: Sequence[Table]
    others: Sequence[ReportBlock]

    @classmethod
    def of(cls, section: Section) -> "_Part":
        blocks = section.blocks
        seen = [block for block in blocks if isinstance(block, Picture | Scene)]
        return cls(
            section,
            seen[:FIRST_PICTURES],
            group_claims([block for block in blocks if isinstance(block, Claim)]),
            [block for block in blocks if isinstance(block, Table)],
            seen[FIRST_PICTURES:],
        )


def write_report(folder: Path, sections: Sequence[Section], about: dict[str, Any]) -> Path:
    """Write ``report.html`` into the folder of the results.

    Args:
        folder: The results; paths of pictures are relative to it.
        sections: What the experiments found.
        about: Facts on the runs: ``environment``, ``settings`` per network, ``seconds`` per
            experiment, ``version``, ``date``.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: If a picture of a section is not in the folder.
    """
    return write(folder / "report.html", render(folder, sections, about))


def render(folder: Path, sections: Sequence[Section], about: dict[str, Any]) -> str:
    """The page as text, see :func:`write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("adjointbackmap.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    env.filters.update(
        plain=plain,
        inline=lambda path: data_url(folder / path),
        kind=kind,
        mark=lambda holds: MARKS[holds],
    )
    env.filters.update(
        numbers=lambda path: _beside(folder, path, ".npz"),
        vector=lambda path: _beside(folder, path, ".svg"),
    )
    parts = [_Part.of(section) for section in sections]
    verdicts = [claim.holds for part in parts for group in part.groups for claim in group.claims]
    scenes = [block for section in sections for block in section.blocks if isinstance(block, Scene)]
    return env.get_template("report.html").render(
        parts=parts,
        about=about,
        held=verdicts.count(True),
        tested=len(verdicts),
        plotly=Markup(plotly_script()) if scenes else "",
        figures={id(scene): Markup(_for_script(scene_figure(scene))) for scene in scenes},
        identity=id,
    )


def kind(block: ReportBlock) -> str:
    """The name of a block's class in lower case. The macro that draws the block has this name.

    Example:
        >>> kind(Claim("Black is white.", "0 of 10", False))
        'claim'
    """
    return type(block).__name__.lower()


def data_url(path: Path) -> str:
    """A picture as a data URL, which holds the picture itself.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        msg = (
            "A picture of the report must be in the folder of the results. "
            f"Got {path}, which is not there: run the study again."
        )
        raise FileNotFoundError(msg)
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _beside(folder: Path, picture: Path, suffix: str) -> str:
    """A link to the file of the same name with another suffix; empty if there is none."""
    path = picture.with_suffix(suffix)
    return path.as_posix() if (folder / path).is_file() else ""


def _for_script(figure: dict[str, Any]) -> str:
    """JSON that is safe inside a script element of a page."""
    return json.dumps(figure).replace("</", "<\\/")
