"""How objects show themselves: a few lines of text, and a small page in a notebook.

Nothing here knows what is shown. Colours are those of the page, so that both a light and a dark
one are readable.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

MOST_ROWS = 24  # of a table in text
MOST_ROWS_HTML = 200
MOST_WORDS = 6  # of a list
SIDE = 160  # pixels of a picture's longer side, at least
# Borders and backgrounds are half transparent grey: visible on white and on black.
STYLE = """
<style>
.abm-shown { font-size: 13px; line-height: 1.45; color: inherit; max-width: 100%; }
.abm-shown table { border-collapse: collapse; margin: .4em 0; color: inherit; display: block;
  overflow-x: auto; width: fit-content; max-width: 100%; }
.abm-shown th, .abm-shown td { border-bottom: 1px solid rgba(128, 128, 128, .4); color: inherit;
  padding: .15em .7em; text-align: left; background: transparent; white-space: nowrap; }
.abm-shown th { font-weight: 600; }
.abm-shown td.n { text-align: right; font-variant-numeric: tabular-nums; }
.abm-shown dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; margin: .3em 0; }
.abm-shown dt { opacity: .7; font-weight: 400; } .abm-shown dd { margin: 0; }
.abm-shown figure { display: inline-block; margin: .3em 1em .3em 0; vertical-align: top; }
.abm-shown figure img { display: block; max-width: 100%; }
.abm-shown figcaption { opacity: .7; font-size: 12px; max-width: 24em; }
</style>
"""


@dataclass(frozen=True)
class Table:
    """Cells of text under their headings; columns of numbers are at the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Summary:
    """What an object says of itself.

    Attributes:
        title: Its kind and size.
        facts: What it holds, in words.
        tables: Heading -> table.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)


Part = TypeVar("Part", bound="Shown")


class Shown:
    """Something that shows itself by its ``_summary``, and in a notebook by ``_pictures`` too."""

    def _summary(self) -> Summary:
        raise NotImplementedError

    def _pictures(self) -> Iterable[tuple[str, bytes]]:
        """Captions and PNG files."""
        return ()

    def __repr__(self) -> str:
        return shown_text(self._summary())

    def _repr_html_(self) -> str:
        return shown_html(self._summary(), self._pictures())


class ShownDict(Shown, dict[str, Part]):
    """A dict of things that show themselves. It shows a row for each.

    Args:
        title: What the things are.
        parts: Name -> thing, as a ``dict`` takes them.

    Example:
        >>> class Sized(Shown):
        ...     def _summary(self):
        ...         return Summary("Sized", {"units": "8"})
        >>> ShownDict("Layers", {"conv": Sized()})
        Layers: 1
          name  units
          conv      8
    """

    def __init__(
        self, title: str, parts: Mapping[str, Part] | Iterable[tuple[str, Part]] = ()
    ) -> None:
        super().__init__(parts)
        self.title = title

    def _summary(self) -> Summary:
        facts = {name: part._summary().facts for name, part in self.items()}
        heads = list(dict.fromkeys(head for of_part in facts.values() for head in of_part))
        rows = [
            [name, *(of_part.get(head, "") for head in heads)] for name, of_part in facts.items()
        ]
        title = f"{self.title}: {len(self)}"
        return Summary(title, {}, {"": Table(["name", *heads], rows)} if rows else {})


class ShownFields(Shown):
    """A dataclass that shows its fields in words: of tensors the shape and the range."""

    def _summary(self) -> Summary:
        of_class: Any = self  # mypy: only those that inherit from this are dataclasses
        facts = {part.name: shown_value(getattr(self, part.name)) for part in fields(of_class)}
        return Summary(type(self).__name__, facts)


def shown_value(value: Any) -> str:
    """A value in a few words.

    Example:
        >>> import torch
        >>> shown_value(torch.tensor([[1.0, 4.0]])), shown_value({"fc": 1, "conv": 2})
        ('1 x 2 float32, 1 to 4', '2: fc, conv')
        >>> shown_value(0.5)
        '0.5'
    """
    if isinstance(value, Tensor):
        return f"{by(value.shape)} {str(value.dtype).removeprefix('torch.')}, {range_of(value)}"
    if isinstance(value, Shown):
        return value._summary().title
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping):
        return f"{len(value)}: {_listed(map(str, value))}" if value else "none"
    if isinstance(value, list | tuple | set | frozenset):
        return _listed([shown_value(part) for part in value]) if value else "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def range_of(values: Tensor) -> str:
    """Smallest and largest number of a tensor in words, or its only number."""
    if not values.numel():
        return "empty"
    if values.dtype.is_complex:
        return "complex"
    low, high = (float(n) for n in values.detach().aminmax())
    return f"{low:.6g}" if values.numel() == 1 else f"{low:.4g} to {high:.4g}"


def by(shape: Iterable[int]) -> str:
    """A shape in words, such as ``3 x 32 x 32``."""
    return " x ".join(map(str, shape)) or "scalar"


def numbered(count: int, name: str) -> str:
    """A number of things, one or several.

    Example:
        >>> numbered(1, "block"), numbered(3000, "block")
        ('1 block', '3,000 blocks')
    """
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def words_of_bytes(count: int) -> str:
    """A number of bytes in words.

    Example:
        >>> words_of_bytes(800), words_of_bytes(13_800), words_of_bytes(3 * 2**30)
        ('800 bytes', '13.5 KiB', '3 GiB')
    """
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB"


def words_of_work(count: int) -> str:
    """A number of multiply-adds in words.

    Example:
        >>> words_of_work(3_888), words_of_work(15_600_000), words_of_work(2_300_000_000_000)
        ('3,888 multiply-adds', '15.6 M multiply-adds', '2,300 G multiply-adds')
    """
    if count < 10**6:
        return f"{count:,} multiply-adds"
    size, unit = (count / 10**6, "M") if count < 10**9 else (count / 10**9, "G")
    digits = f"{size:.3g}" if size < 1000 else f"{size:,.0f}"
    return f"{digits} {unit} multiply-adds"


def _listed(words: Iterable[str]) -> str:
    """The first few of some words."""
    found = list(words)
    more = f", ... {len(found) - MOST_WORDS} more" if len(found) > MOST_WORDS else ""
    return ", ".join(found[:MOST_WORDS]) + more


def shown_text(summary: Summary) -> str:
    """A summary in lines of text.

    Example:
        >>> print(shown_text(Summary("Network", {"image": "3 x 8 x 8"})))
        Network
          image: 3 x 8 x 8
    """
    lines = [summary.title, *(f"  {name}: {words}" for name, words in summary.facts.items())]
    for heading, table in summary.tables.items():
        lines += [f"  {heading}"] if heading else []
        lines += [f"  {line}".rstrip() for line in _columns(table)]
    return "\n".join(lines)


def shown_html(summary: Summary, pictures: Iterable[tuple[str, bytes]] = ()) -> str:
    """A summary as a piece of HTML, with pictures."""
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in summary.facts.items()
    )
    parts = [f"<strong>{escape(summary.title)}</strong>", f"<dl>{facts}</dl>" if facts else ""]
    parts += [_figure(caption, png) for caption, png in pictures]
    for heading, table in summary.tables.items():
        parts += [f"<div>{escape(heading)}</div>" if heading else "", _html_table(table)]
    return f'<div class="abm-shown">{STYLE}{"".join(parts)}</div>'


def png_of(picture: Tensor | np.ndarray, side: int = SIDE) -> bytes:
    """A picture in [0, 1], ``(C, H, W)`` with 1 or 3 channels, as a PNG file.

    A small one is enlarged, so that its pixels can be seen.
    """
    from PIL import Image

    array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
    levels = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    shape = (3, *levels.shape[1:])
    times = max(1, -(-side // max(shape[1:])))
    enlarged = np.broadcast_to(levels, shape).repeat(times, 1).repeat(times, 2)
    file = BytesIO()
    Image.fromarray(np.moveaxis(enlarged, 0, -1).copy()).save(file, "PNG")
    return file.getvalue()


def _columns(table: Table) -> list[str]:
    shown = [*table.rows[:MOST_ROWS]]
    cells = [list(table.heads), *map(list, shown)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.heads))]
    right = [_is_number_column(table, i) for i in range(len(table.heads))]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(row, widths, right, strict=True)
        )
        for row in cells
    ]
    return lines + _left_out(table, len(shown))


def _html_table(table: Table) -> str:
    shown = table.rows[:MOST_ROWS_HTML]
    right = [_is_number_column(table, i) for i in range(len(table.heads))]
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if r else ''}>{escape(cell)}</td>"
            for cell, r in zip(row, right, strict=True)
        )
        + "</tr>"
        for row in shown
    )
    more = "".join(f"<div>{escape(line)}</div>" for line in _left_out(table, len(shown)))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{more}"


def _left_out(table: Table, shown: int) -> list[str]:
    more = len(table.rows) - shown
    return [f"... {more} more"] if more > 0 else []


def _is_number_column(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows if row[column]]
    return bool(cells) and all(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").removesuffix(" %"))
    except ValueError:
        return False
    return True


def _figure(caption: str, png: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
