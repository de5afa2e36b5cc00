"""Tables on the terminal: in columns that fit, or as JSON or CSV for other programs."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from cyclopts import Parameter
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from adjointbackmap.sources import Switch


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """How tables are printed.

    Attributes:
        json: Print the tables as one JSON document, and nothing else on standard output.
        csv: Print the tables as CSV with an empty line between two, and nothing else on stdout.
    """

    json: Switch = False
    csv: Switch = False

    def __post_init__(self) -> None:
        if self.json and self.csv:
            msg = "Tables must be printed as --json or --csv. Got both: leave one out."
            raise ValueError(msg)

    def tables(self, console: Console, *found: Table) -> None:
        """Print tables."""
        if self.json:
            documents = [{"title": _title(table), "rows": list(_records(table))} for table in found]
            sys.stdout.write(json.dumps(documents, indent=1) + "\n")
        elif self.csv:
            for i, table in enumerate(found):
                if i:
                    sys.stdout.write("\n")
                heads = [_plain(column.header) for column in table.columns]
                writer = csv.DictWriter(sys.stdout, heads, lineterminator="\n")
                writer.writeheader()
                writer.writerows(_records(table))
        else:
            for table in found:
                for part in fitted(table, console):
                    console.print(part)

    def text(self, console: Console, *words: object) -> None:
        """Print a line for people: on standard error where tables are for programs."""
        if self.json or self.csv:
            Console(stderr=True).print(*words)
        else:
            console.print(*words)


TABLES = Output()


def fitted(table: Table, console: Console) -> Iterator[Table | Text]:
    """The table, or several that fit into the console with the first column in each.

    A column that does not fit would be shortened, and a number without its last digits is wrong.
    """
    for column in table.columns:
        column.no_wrap = True
    widths = [_width(table, i, console) for i in range(len(table.columns))]
    room = console.width - 1
    if sum(widths) <= room or len(widths) < 3:
        yield table
        return
    groups: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if groups[-1] and widths[0] + sum(widths[j] for j in groups[-1]) + widths[i] > room:
            groups.append([])
        groups[-1].append(i)
    for n, group in enumerate(groups):
        yield _part(table, [0, *group], table.title if n == 0 else None)
    if table.caption:  # in lines of its own, for the last part may be narrow
        yield Text(str(table.caption), style="italic")


def _part(table: Table, columns: list[int], title: object) -> Table:
    """Some columns of a table."""
    part = Table(title=title)  # type: ignore[arg-type]
    for i in columns:
        part.add_column(table.columns[i].header, justify=table.columns[i].justify, no_wrap=True)
    cells = [list(table.columns[i].cells) for i in columns]
    for row, style in zip(zip(*cells, strict=True), table.rows, strict=True):
        part.add_row(*row, style=style.style)
    return part


def _width(table: Table, column: int, console: Console) -> int:
    """Characters of a column with its border and padding."""
    cells = [table.columns[column].header, *table.columns[column].cells]
    most = max(Measurement.get(console, console.options, cell).maximum for cell in cells)
    return most + 3


def _records(table: Table) -> Iterator[dict[str, str]]:
    heads = [_plain(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        yield dict(zip(heads, map(_plain, row), strict=True))


def _plain(cell: object) -> str:
    """Text without markup."""
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _title(table: Table) -> str:
    return _plain(table.title or "")
