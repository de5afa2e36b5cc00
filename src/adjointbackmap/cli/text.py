"""The command text: what each word of a sentence adds to a unit."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

from adjointbackmap.cli.frame import app, console, help_examples, use_threads
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.sources import parse_units

if TYPE_CHECKING:
    from adjointbackmap.text.readers import Reading

TEXT_EXAMPLES = help_examples(
    'adjointbackmap text "a thoughtful, moving film"',
    'adjointbackmap text "dull from start to end" --network textcnn-reviews --html words.html',
    'adjointbackmap text "a gripping story" --layer blocks.0.up --units 1,5 --json',
)
# Red adds, blue takes away; the background of the strongest word has this much of its colour.
RED = (214, 47, 39)
BLUE = (49, 110, 190)


@app.command(help_epilogue=TEXT_EXAMPLES)
def text(
    sentence: str,
    *,
    network: str = "transformer-reviews",
    layer: str = "output",
    units: str | None = None,
    curved: Literal["frozen", "tangent"] = "frozen",
    html: Path | None = None,
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Show what each word of a sentence, and each bias, adds to a unit: they sum to its value.

    Args:
        sentence: The sentence, in quotation marks.
        network: A shipped network that reads sentences: transformer-reviews or textcnn-reviews.
        layer: Name of the layer of the unit.
        units: The unit: an int for each dimension of the layer, separated by commas. The default is
            the predicted class.
        curved: What to do with curved operations: hold their gates constant (frozen: hyperplanes
            are not the derivative), or take their derivative (tangent).
        html: File for a page with the coloured words.
        threads: Number of processor threads.
        output: How tables are printed.
    """
    from adjointbackmap import models
    from adjointbackmap.files import disk

    use_threads(threads)
    reader = models.reader(network, curved)
    chosen = None if units in (None, "predicted") else parse_units(units)
    reading = reader.read(sentence, layer, chosen)
    output.text(
        console,
        f"[bold]{network}[/bold] says [bold]{reading.predicted}[/bold]. "
        f"What each word adds to the unit [bold]{reading.unit}[/bold]:\n",
    )
    if output == TABLES:
        console.print(coloured(reading), "")
    output.tables(console, *_tables(reading))
    if reading.unknown:
        output.text(console, f"Unknown to the network: {', '.join(reading.unknown)}")
    if reading.note:
        output.text(console, f"{reading.note}")
    if html is not None:
        disk.write(html, reading.html())
        output.text(console, f"Written: {html}")


def coloured(reading: "Reading") -> Text:
    """The words of a sentence on red if they add, and on blue if they take away."""
    most = max(abs(amount) for _, amount in reading.words) or 1.0
    line = Text()
    for i, (word, amount) in enumerate(reading.words):
        colour = RED if amount > 0 else BLUE
        share = abs(amount) / most
        # from white to the colour, with black letters on both
        mixed = (round(255 + (c - 255) * 0.75 * share) for c in colour)
        line.append(f" {word} ", style=f"black on #{''.join(f'{c:02x}' for c in mixed)}")
        if i + 1 < len(reading.words):
            line.append(" ")
    return line


def _tables(reading: "Reading") -> list[Table]:
    words = Table("word", "adds", title="words")
    for word, amount in reading.words:
        words.add_row(Text(word), f"{amount:+.6f}")
    biases = Table("biases of", "add", title="biases")
    for name, amount in reading.biases:
        biases.add_row(Text(name), f"{amount:+.6f}")
    found = Table("words", "biases", "sum", "value of the model", "difference", title="sum")
    found.add_row(
        f"{reading.of_words:+.6f}",
        f"{reading.of_biases:+.6f}",
        f"{reading.total:.6f}",
        f"{reading.value:.6f}",
        f"{reading.error:.1e}",
    )
    return [words, biases, found]
