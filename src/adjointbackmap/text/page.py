"""A reading as HTML: words coloured by what they add, the biases, and the sum."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adjointbackmap.text.readers import Reading

# Red adds, blue takes away, as in the pictures; black or white text is readable on both.
RED = "214, 47, 39"
BLUE = "49, 110, 190"
DARKEST = 0.75  # opacity of the colour of the word that adds most
# Borders and backgrounds are half transparent, so that light and dark pages are readable.
STYLE = """
<style>
.abm-text { font: 15px/1.5 system-ui, sans-serif; max-width: 46em; color: inherit; }
.abm-text .words { display: flex; flex-wrap: wrap; gap: .35em .3em; margin: .8em 0; }
.abm-text .word { padding: .1em .4em .15em; border-radius: .3em; text-align: center; }
.abm-text .word small { display: block; font-size: 11px; opacity: .75;
  font-variant-numeric: tabular-nums; }
.abm-text .unknown { text-decoration: underline dotted; }
.abm-text table { border-collapse: collapse; margin: .5em 0; }
.abm-text td { padding: .1em .8em .1em 0; border-bottom: 1px solid rgba(128, 128, 128, .3); }
.abm-text td.n { text-align: right; font-variant-numeric: tabular-nums; }
.abm-text .bar { height: .7em; border-radius: .15em; min-width: 1px; }
.abm-text .sum { margin: .6em 0; font-variant-numeric: tabular-nums; }
.abm-text .error { white-space: nowrap; }
.abm-text .note { opacity: .75; font-size: 13px; }
</style>
"""
BAR = 12  # width of the longest bar, in em


def part(reading: "Reading") -> str:
    """The reading as a part of a page."""
    amounts = [abs(amount) for _, amount in reading.words]
    most = max(amounts) or 1.0
    words = "".join(_word(w, a, most, w in reading.unknown) for w, a in reading.words)
    largest = max((abs(amount) for _, amount in reading.biases), default=0.0) or 1.0
    biases = "".join(_row(name, amount, largest) for name, amount in reading.biases)
    notes = [reading.note] if reading.note else []
    if reading.unknown:
        notes.append(f"unknown to the network: {', '.join(reading.unknown)}")
    shown = f"<div class='note'>{escape('; '.join(notes))}</div>" if notes else ""
    return (
        f"{STYLE}<div class='abm-text'><b>{escape(reading.title)}</b> says "
        f"<b>{escape(reading.predicted)}</b>. What each word adds to the unit "
        f"<b>{escape(reading.unit)}</b>:"
        f"<div class='words'>{words}</div>"
        f"<div class='sum'>words {reading.of_words:+.4f}, biases {reading.of_biases:+.4f}: "
        f"sum <b>{reading.total:.4f}</b>, value of the model <b>{reading.value:.4f}</b>, "
        f"<span class='error'>difference {reading.error:.1e}</span></div>"
        f"<details open><summary>Biases by layer</summary><table>{biases}</table></details>"
        f"{shown}</div>"
    )


def whole(reading: "Reading") -> str:
    """The reading as a page of its own."""
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{escape(reading.title)}: {escape(reading.sentence)}</title>"
        "<style>:root { color-scheme: light dark; } body { margin: 2em; }</style>"
        f"<body>{part(reading)}</body></html>\n"
    )


def _colour(amount: float, most: float) -> str:
    return f"rgba({RED if amount > 0 else BLUE}, {DARKEST * abs(amount) / most:.3f})"


def _word(word: str, amount: float, most: float, is_unknown: bool) -> str:
    name = "word unknown" if is_unknown else "word"
    return (
        f"<span class='{name}' style='background: {_colour(amount, most)}'>{escape(word)}"
        f"<small>{amount:+.3f}</small></span>"
    )


def _row(name: str, amount: float, largest: float) -> str:
    width = BAR * abs(amount) / largest
    bar = f"<div class='bar' style='width: {width:.2f}em; background: {_colour(amount, largest)}'>"
    return f"<tr><td>{escape(name)}</td><td class='n'>{amount:+.4f}</td><td>{bar}</div></td></tr>"
