"""Tables as data, for a Markdown page, the terminal or a report.

A :class:`PagePlace` is where tables go in a page.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adjointbackmap.files.disk import write

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Sheet:
    """A table; its cells may hold Markdown.

    Attributes:
        title: Heading or caption; empty for none.
        head: Names of the columns.
        rows: Cells of each row.
    """

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as Markdown.

        Example:
            >>> print(Sheet("Losses", ["layer", "loss"], [["conv1", "0.5"]]).markdown())
            ### Losses
            <BLANKLINE>
            | layer | loss |
            | --- | --- |
            | conv1 | 0.5 |
        """
        heading = [f"### {self.title}", ""] if self.title else []
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join([*heading, *(f"| {' | '.join(cells)} |" for cells in lines)])

    def rich(self, columns: int | None = None) -> "Table":
        """The table for the terminal, without Markdown marks.

        Args:
            columns: Number of columns to show; by default all.
        """
        from rich.table import Table

        table = Table(*map(plain, self.head[:columns]), title=self.title or None)
        for row in self.rows:
            table.add_row(*map(plain, row[:columns]))
        return table


def folded(summary: str, parts: Iterable[str]) -> str:
    """Markdown that a reader opens by its summary. Markdown needs the empty lines around it.

    Example:
        >>> print(folded("Losses", ["Low is good."]))
        <details><summary>Losses</summary>
        <BLANKLINE>
        Low is good.
        <BLANKLINE>
        </details>
    """
    return "\n\n".join([f"<details><summary>{summary}</summary>", *parts, "</details>"])


def plain(cell: str) -> str:
    r"""The text of a cell without Markdown marks.

    Example:
        >>> plain(r"**short** of \\|e\\|")
        'short of |e|'
    """
    return cell.translate(str.maketrans("", "", "\\`")).replace("**", "")


@dataclass(frozen=True)
class PagePlace:
    """The place for tables in a page, between two comment lines that a reader does not see.

    Attributes:
        begin: The line above.
        end: The line below.
    """

    begin: str
    end: str

    def check(self, page: Path) -> None:
        """Raise if a page does not have this place.

        Raises:
            ValueError: If the page does not have it.
        """
        text = page.read_text() if page.is_file() else ""
        if self.begin not in text or self.end not in text:
            msg = (
                f"--docs must be a page with the lines {self.begin} and {self.end}. "
                f"Got {page}: add them to it."
            )
            raise ValueError(msg)

    def fill(self, page: Path, text: str) -> None:
        """Replace the text in the place."""
        before, _, rest = page.read_text().partition(self.begin)
        write(page, f"{before}{self.begin}\n\n{text}\n\n{self.end}{rest.partition(self.end)[2]}")
