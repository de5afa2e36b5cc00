"""Tables and figures of the verification for a page, built only from its results."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from adjointbackmap import plots
from adjointbackmap.files.disk import write
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import PagePlace, Sheet, folded
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS, Column
from adjointbackmap.study.verification.histograms import histograms
from adjointbackmap.study.verification.results_file import RESULTS, read_results
from adjointbackmap.study.verification.run import BESIDE, KEY, WIDENED
from adjointbackmap.study.verification.summation import SUM_ORDERS

VERIFICATION_PLACE = PagePlace(
    "<!-- verification: written by adjointbackmap study verification -->",
    "<!-- verification: end -->",
)
SUMS_TITLE = "The same images, inner products summed in float32 and in float64:"
WIDENED_TITLE = "Hyperplanes in float64, held to the network's own float32 values:"
ORDERS_TITLE = (
    "The worst unit of each layer, its terms summed in other orders and precisions "
    "(relative errors):"
)
Layers = dict[str, dict[str, Any]]  # name of a layer -> its tally


def layers_of(entry: dict[str, Any], arithmetic: str) -> Layers:
    """Every layer that was verified in one arithmetic, in the order of the network."""
    run = entry["runs"].get(arithmetic, {})
    return {
        name: layer
        for part in ("convolutions", "fc")
        for name, layer in run.get(part, {}).get("layers", {}).items()
    }


def verdict(layer: dict[str, Any], published: float, of: str = "") -> str:
    """Compare the measured share of units with the published percentage.

    The verdict is "short" if the published percentage lies above the interval of the measured
    share. Otherwise it is "above" if the share reaches the percentage, and "within" if it does not.

    Args:
        layer: Counts and intervals.
        published: The published percentage.
        of: Empty for absolute errors, ``"_signed"`` for signed ones.

    Example:
        >>> layer = {"check": {"units": 1000, "within": 990}, "interval": [0.98, 0.995]}
        >>> [verdict(layer, published) for published in (98.5, 99.2, 99.9)]
        ['above', 'within', '**short**']
    """
    check = layer["check"]
    if 100 * layer[f"interval{of}"][1] < published:
        return "**short**"
    return "above" if 100 * check[f"within{of}"] >= published * check["units"] else "within"


def short_rows(entry: dict[str, Any], column: Column, of: str = "") -> tuple[int, int]:
    """The number of layers of a network that are short in float32, and of all its layers."""
    layers = layers_of(entry, "float32")
    verdicts = [verdict(layer, column.shares[name], of) for name, layer in layers.items()]
    return verdicts.count("**short**"), len(layers)


def percent(count: int, units: int) -> str:
    """A share in percent, rounded down, so that 100 means all units.

    Example:
        >>> percent(9_999_999, 10_000_000), percent(10_000_000, 10_000_000)
        ('99.99999', '100')
        >>> percent(99_999_999, 100_000_000)
        '99.99999'
    """
    return "100" if count == units else f"{count * 10**7 // units / 10**5:.5f}"


def summary_table(networks: dict[str, Any]) -> Sheet:
    """Table with a row for each network.

    The columns are accuracy, the images of the convolutions and of ``fc``, the machines, the number
    of short rows, and the time.
    """
    counted = ["images", "fc", "on"]
    head = ["network", "published in", "accuracy %", "folded %", *counted]
    head += ["short, signed", "short", "float64", *counted, "hours"]
    sheet = Sheet("", head)
    for name, entry in networks.items():
        column = PUBLISHED_COLUMNS[name]
        row = [f"`{name}`", column.source, *_accuracies(entry), *_images(entry, "float32")]
        row += ["{} of {}".format(*short_rows(entry, column, of)) for of in ("_signed", "")]
        double = [layer["check"] for layer in layers_of(entry, "float64").values()]
        within = sum(check["within"] for check in double)
        units = sum(check["units"] for check in double)
        row.append(percent(within, units) if double else "")
        seconds = sum(part["seconds"] for run in entry["runs"].values() for part in run.values())
        sheet.rows.append([*row, *_images(entry, "float64"), f"{seconds / 3600:.1f}"])
    return sheet


def _accuracies(entry: dict[str, Any]) -> list[str]:
    """Accuracy of the trained and of the folded network in percent; empty if not measured."""
    accuracy = entry.get("accuracy")
    keys = ("trained", "folded")
    return [f"{100 * accuracy[key]:.2f}" if accuracy else "" for key in keys]


def layer_rows(entry: dict[str, Any], column: Column, title: str = "") -> Sheet:
    """Table with a row for each layer, next to the published column."""
    head = ["layer", "published", "e <= 1 %", "is", "\\|e\\| <= 1 %", "is"]
    head += ["float64", "95 % interval", "units", "units in float64"]
    sheet = Sheet(title, [*head, "outside", "rounded", "c / sum", "zero"])
    double = layers_of(entry, "float64")
    for name, layer in layers_of(entry, "float32").items():
        check = layer["check"]
        units = check["units"]
        published = column.shares[name]
        other = double.get(name, {}).get("check")
        row = [name, f"{'>= ' if column.at_least else ''}{published:g}"]
        row += [percent(check["within_signed"], units), verdict(layer, published, "_signed")]
        row += [percent(check["within"], units), verdict(layer, published)]
        row.append(percent(other["within"], other["units"]) if other else "")
        row.append(" to ".join(f"{100 * end:.5f}" for end in layer["interval"]))
        row += [f"{units:,}", f"{other['units']:,}" if other else ""]
        row += [f"{units - check['within']:,}", f"{check['rounded']:,}"]
        row += [f"{check['outside']:.1e}", f"{100 * check['zero'] / units:.2f}"]
        sheet.rows.append(row)
    return sheet


def sums_rows(entry: dict[str, Any]) -> Sheet:
    """Table with a row for each layer: inner products summed in float32 and in float64.

    Both sums use the same images. Another column is the network's own rounding error.
    """
    head = ["layer", "units", "outside, float32", "outside, sums in float64"]
    head += ["outside, network alone", "largest scaled, float32", "sums in float64"]
    sheet = Sheet("", head)
    alone = entry.get("outside alone", {})
    single = layers_of(entry, "float32 again")
    double = layers_of(entry, "float32, sums in float64")
    for name in single:
        if name not in double or single[name]["images"] != double[name]["images"]:
            continue
        pair = single[name]["check"], double[name]["check"]
        outside = [f"{c['units'] - c['within']:,}" for c in pair]
        scaled = [f"{c['scaled']:.1e}" for c in pair]
        of_network = f"{alone[name]:,}" if name in alone else ""
        sheet.rows.append([name, f"{pair[0]['units']:,}", *outside, of_network, *scaled])
    return sheet


def widened_rows(entry: dict[str, Any], column: Column) -> Sheet:
    """Table with a row for each layer: hyperplanes in float64, the network's values in float32.

    The float32 columns are of the same images.
    """
    head = ["layer", "images", "published", "e <= 1 %", "is", "in float32", "\\|e\\| <= 1 %", "is"]
    head += ["in float32", "95 % interval", "outside", "gates that differ"]
    sheet = Sheet("", head)
    single = layers_of(entry, BESIDE)
    for name, layer in layers_of(entry, WIDENED).items():
        check = layer["check"]
        units = check["units"]
        published = column.shares[name]
        same = name in single and single[name]["images"] == layer["images"]
        row = [name, f"{layer['images']:,}", f"{'>= ' if column.at_least else ''}{published:g}"]
        for of in ("_signed", ""):
            other = single[name]["check"][f"within{of}"] if same else None
            row += [percent(check[f"within{of}"], units), verdict(layer, published, of)]
            row.append("" if other is None else percent(other, units))
        row.append(" to ".join(f"{100 * end:.5f}" for end in layer["interval"]))
        row += [f"{units - check['within']:,}", f"{check['flipped']:,}"]
        sheet.rows.append(row)
    return sheet


def order_rows(entry: dict[str, Any]) -> Sheet:
    """Table of the worst unit of each layer: its error for each order and precision of the sum."""
    sheet = Sheet("", ["layer", "image", "unit", "c", "sum of \\|x h\\|, \\|b h\\|", *SUM_ORDERS])
    for name, found in entry.get("orders", {}).items():
        image, unit = found["place"]
        errors = [f"{found['errors'][order]:+.1e}" for order in SUM_ORDERS]
        place = [f"`{image[:8]}`", ", ".join(map(str, unit))]
        sizes = [f"{found['value']:.1e}", f"{found['magnitude']:.1f}"]
        sheet.rows.append([name, *place, *sizes, *errors])
    return sheet


def verification_markdown(found: dict[str, Any], figures: str = "figures") -> str:
    """All tables as Markdown, with links to the figures.

    Args:
        found: The results.
        figures: Folder of the figures, relative to the page.
    """
    networks = _in_order(found)
    numbered = enumerate(found["environments"], start=1)
    machines = "; ".join(f"{number}: {_machine(here)}" for number, here in numbered)
    where = (
        f"Measured on {machines}. Hours are the computing time of all runs, without killed ones."
    )
    parts = [where, summary_table(networks).markdown()]
    for name, entry in networks.items():
        parts += _network(name, entry, figures)
    return "\n\n".join(parts)


def _network(name: str, entry: dict[str, Any], figures: str) -> Iterator[str]:
    """Tables and figures of one network as Markdown."""
    column = PUBLISHED_COLUMNS[name]
    yield f"### {name}"
    yield f"Published: {column.source}; histograms: {column.figure}."
    for kind in ("signed", "absolute"):
        yield f"![Relative errors of {name}, {kind}]({figures}/verification-{name}-{kind}.png)"
    layers = layer_rows(entry, column)
    yield folded(f"{name}: {len(layers.rows)} layers", [layers.markdown()])
    more = {
        WIDENED_TITLE: widened_rows(entry, column),
        SUMS_TITLE: sums_rows(entry),
        ORDERS_TITLE: order_rows(entry),
    }
    for title, sheet in more.items():
        if sheet.rows:
            yield folded(title.rstrip(":"), [sheet.markdown()])


def draw_histograms(found: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Write two figures for each network."""
    for name, entry in _in_order(found).items():
        runs = {kind: layers_of(entry, kind) for kind in ("float32", "float64")}
        for kind in ("signed", "absolute") if runs["float32"] else ():
            title = f"{name}: relative error of every unit ({PUBLISHED_COLUMNS[name].figure})"
            figure = histograms(runs, title, kind == "signed")
            yield plots.save(figure, folder / f"verification-{name}-{kind}.png")


def show(found: dict[str, Any]) -> Iterator[Sheet]:
    """Yield for each network the table of its layers, next to the published column."""
    for name, entry in _in_order(found).items():
        yield layer_rows(
            entry, PUBLISHED_COLUMNS[name], f"{name}, {PUBLISHED_COLUMNS[name].source}"
        )


def off_in_float64(found: dict[str, Any]) -> list[str]:
    """Networks with a unit whose relative error in float64 is more than 1 %."""
    off = []
    for name, entry in found["networks"].items():
        checks = [layer["check"] for layer in layers_of(entry, "float64").values()]
        if any(check["within"] < check["units"] for check in checks):
            off.append(name)
    return off


def write_page(found: dict[str, Any], results: Path, page: Path) -> list[Path]:
    """Write the tables between the two marks of a page.

    Figures and results go into folders next to the page. Returns the paths of all written files.
    """
    VERIFICATION_PLACE.fill(page, verification_markdown(found))
    kept = page.parent / "results" / results.name
    if kept.resolve() != results.resolve():
        write(kept, results.read_bytes())
    return [page, kept, *draw_histograms(found, page.parent / "figures")]


def _in_order(found: dict[str, Any]) -> dict[str, Any]:
    """The networks in the order of the study."""
    return {
        name: found["networks"][name] for name in PUBLISHED_COLUMNS if name in found["networks"]
    }


def _machine(here: dict[str, Any]) -> str:
    """An environment in words."""
    card = f"{here['gpu']} beside " if "gpu" in here else ""
    versions = f"torch {here['torch']}, Python {here['python']}"
    return f"{card}{here['cpu']}, {here['threads']} threads, {versions}"


def _images(entry: dict[str, Any], arithmetic: str) -> list[str]:
    """Numbers of images of the convolutions and of ``fc``, then the numbers of the machines."""
    runs = [entry["runs"].get(arithmetic, {}).get(part, {}) for part in ("convolutions", "fc")]
    machines = sorted({place + 1 for run in runs for place in run.get("environments", [])})
    return [*(f"{run.get('images', 0):,}" for run in runs), ", ".join(map(str, machines))]


def verification_section(folder: Path) -> Section | None:
    """Build the report section from the results in a folder; ``None`` if there are none."""
    if not (folder / KEY / RESULTS).is_file():
        return None
    found = read_results(folder / KEY / RESULTS)
    ran = (
        "Every unit of every layer but the first convolution is rebuilt from its explicit "
        "hyperplane and compared with the network's own value: folded networks, own bias left "
        "out, pattern at k = 1/8, in float32 as published and in float64.",
        "A row falls short where the published share lies above the 95 % interval of ours.",
    )
    pictures = list(draw_histograms(found, folder / KEY))
    every = replace(summary_table(_in_order(found)), title="All networks")
    blocks: list[ReportBlock] = [Table(every), *_claims(found)]
    for name, entry in _in_order(found).items():
        blocks += _blocks(name, entry, pictures, folder)
    return Section(KEY, "Every unit of every layer", ran, tuple(blocks))


def _blocks(
    name: str,
    entry: dict[str, Any],
    pictures: list[Path],
    folder: Path,
) -> Iterator[ReportBlock]:
    """Table and pictures of one network."""
    column = PUBLISHED_COLUMNS[name]
    yield Table(layer_rows(entry, column, name), f"Published: {column.source}.")
    for path in pictures:
        if path.stem.startswith(f"verification-{name}-"):
            caption = f"Relative errors of every unit of {name}."
            yield Picture(path.relative_to(folder), caption, column.figure)


def _claims(found: dict[str, Any]) -> Iterator[Claim]:
    """The shares in float32 as published, and in float64 all units."""
    networks = _in_order(found)
    for words, of in (("e <= 1 % (signed, as published)", "_signed"), ("|e| <= 1 %", "")):
        counts = [
            short_rows(entry, PUBLISHED_COLUMNS[name], of) for name, entry in networks.items()
        ]
        short = sum(count for count, _ in counts)
        rows = sum(count for _, count in counts)
        text = (
            f"In float32 the share of {words} is at or above the published one, "
            "within its interval, in every row."
        )
        published = "100 % but for some thousandths in each row"
        yield Claim(text, f"{rows - short} of {rows} rows", not short, published)
    units = 0
    within = 0
    for entry in networks.values():
        for layer in layers_of(entry, "float64").values():
            units += layer["check"]["units"]
            within += layer["check"]["within"]
    if units:
        measured = f"{percent(within, units)} % of {units:,} units"
        yield Claim("In float64 every unit is rebuilt.", measured, within == units)
