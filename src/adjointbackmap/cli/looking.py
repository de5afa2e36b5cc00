"""Commands that look at a network: demo, layers, map."""

import json
import re
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from adjointbackmap.cli.checking import show_verified
from adjointbackmap.cli.frame import (
    NO_NETWORK,
    STUDY_SCALE,
    app,
    console,
    help_examples,
    progress,
    use_threads,
)
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.cli.tables import check_table, class_table, unit_table
from adjointbackmap.sources import NetworkOptions, Subject, find_image, load_subject, parse_units

if TYPE_CHECKING:
    from adjointbackmap.engine.network import Network
    from adjointbackmap.exactness.layer_check import LayerCheck
    from adjointbackmap.planes.stored_planes import StoredPlanes
    from adjointbackmap.planes.streaming import Stream


DEMO_NETWORK = "vgg7-cifar10"
LAYERS_EXAMPLES = help_examples(
    "adjointbackmap layers vgg7-cifar10",
    "adjointbackmap layers --model mine:build --shape 3 64 64 --json",
)
MAP_EXAMPLES = help_examples(
    "adjointbackmap map vgg7-cifar10 --layer conv3 --mode RM2 --units 8,8,: --image ship",
    "adjointbackmap map vgg7-cifar10 --layer fc --mode RM0 --units predicted --image photo.jpg",
)


@app.command(help_epilogue=help_examples("adjointbackmap demo --image frog"))
def demo(
    *,
    image: str = "ship",
    out: Path = Path("adjointbackmap-demo"),
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Show prediction and hyperplanes for one sample image, and verify every unit of every layer.

    Args:
        image: A sample image by number, 0 to 199, or the first sample image of a class.
        out: Folder for the picture. Its name ends in the value of --image.
        threads: Number of processor threads.
        output: How tables are printed.
    """
    from adjointbackmap import plots
    from adjointbackmap.exactness.verification import terms_of
    from adjointbackmap.planes.hyperplane import hyperplanes

    started = time.monotonic()
    use_threads(threads)
    subject = load_subject(NetworkOptions(DEMO_NETWORK, fold=True))
    pixels, described = find_image(image, subject)
    x = subject.prepare(pixels)
    network = subject.trace()
    planes = hyperplanes(network, x, "fc", "RM0", scale=STUDY_SCALE)
    best = subject.classes[int(planes.value[0].argmax())]
    output.text(
        console, f"[bold]{subject.title}[/bold] sees {described}: it says [bold]{best}[/bold]."
    )
    output.text(
        console,
        "Every output is an inner product of the image and the network's biases with a hyperplane, "
        "computed here:\n",
    )
    tables = [class_table(planes, subject.classes), unit_table(network, x, STUDY_SCALE)]
    if output == TABLES:  # what is finished is shown before the verification begins
        output.tables(console, *tables)
        tables = []
    checks: dict[str, LayerCheck] = {}
    show_verified(checks, network, x[None], terms_of(network), [described])
    output.tables(console, *tables, check_table(checks))
    title = f"{subject.title}: {described}, seen as {best}"
    figure = plots.class_hyperplanes(planes, subject.classes, pixels, title)
    picture = plots.save(figure, out / f"hyperplanes-{Path(image).stem}.png")
    numbers = picture.with_suffix(".npz").name
    output.text(console, f"Picture: [bold]{picture}[/bold], its numbers: {numbers} beside it")
    seconds = time.monotonic() - started
    output.text(console, f"{seconds:.0f} s in all. Next: adjointbackmap layers {DEMO_NETWORK}")


@app.command(help_epilogue=LAYERS_EXAMPLES)
def layers(source: NetworkOptions = NO_NETWORK, *, output: Output = TABLES) -> None:
    """List the layers of a network with shape, receptive field, modes and number of hyperplanes.

    Args:
        source: The network.
        output: How tables are printed.
    """
    from adjointbackmap.planes.units import unit_dims

    subject = load_subject(source)
    network = subject.trace()
    table = Table("layer", "kind", "output", "field", "modes", "hyperplanes", title=subject.title)
    for layer in network.layers.values():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        units = prod(unit_dims(layer, mode).values())
        shape = "x".join(map(str, layer.out_shape))
        field = "x".join(map(str, layer.receptive_field))
        first = layer.modes[0]
        modes = first if len(layer.modes) == 1 else f"{first} to {layer.modes[-1]}"
        table.add_row(layer.name, layer.kind, shape, field, modes, f"{units:,} in {mode}")
    output.tables(console, table)
    parts = network.biases.names
    output.text(console, f"{len(network.biases)} biases in {len(parts)} parts: {', '.join(parts)}")


@app.command(name="map", help_epilogue=MAP_EXAMPLES)
def map_units(
    source: NetworkOptions = NO_NETWORK,
    *,
    layer: str,
    mode: Literal["RM4", "RM3", "RM2", "RM1", "RM0"] | None = None,
    units: str | None = None,
    image: str = "0",
    own_bias: bool | None = None,
    scale: float = 1.0,
    dtype: Literal["float32", "float64"] | None = None,
    memory: str = "2GiB",
    out: Path | None = None,
    threads: int | None = None,
) -> None:
    """Compute hyperplanes of chosen units into a store on disk, and draw the first ones.

    The store may be larger than memory. A stopped run continues when the same command is run again.

    Args:
        source: The network.
        layer: Name of the layer. The command layers lists the names.
        mode: Reconstruction mode. The default is one hyperplane for each unit: RM2, and RM0 for a
            fully connected layer.
        units: One part per unit dimension of the mode, separated by commas: an int, a slice such as
            2:5, or : for all. For RM0 also the word predicted. All units if left out.
        image: A sample image by number, the first sample image of a class, or a picture file.
        own_bias: Whether the layer's own bias belongs to the units.
        scale: The factor k of the activation pattern.
        dtype: Precision. The default is the precision of the model.
        memory: Memory for one block of hyperplanes and its computation. Blocks are written to disk
            one after the other.
        out: Name of the store (a folder .zarr), of the picture (.png), its numbers (.npz), and of
            the record of what was computed (.json), without these endings. The default is
            hyperplanes with the names of network, layer, mode, units and image.
        threads: Number of processor threads.

    Raises:
        ValueError: If the picture exists, but the store does not.
    """
    from adjointbackmap.planes.query import Query
    from adjointbackmap.planes.streaming import stream

    use_threads(threads)
    subject = load_subject(source)
    pixels, described = find_image(image, subject)
    network = subject.trace()
    x = subject.prepare(pixels)
    chosen = parse_units(units)
    work = stream(Query.of(network, x, layer, mode, chosen, own_bias, scale, dtype, memory=memory))
    found_mode = work.query.mode
    out = out or Path(
        _file_name("hyperplanes", subject.title, layer, found_mode, units, Path(image).stem)
    )
    folder = out.with_name(f"{out.name}.zarr")
    picture = out.with_name(f"{out.name}.png")
    if picture.exists() and not folder.exists():
        msg = (
            "--out must be new or name a store and its picture. "
            f"Got {picture} without {folder.name}: choose another name."
        )
        raise ValueError(msg)
    console.print(f"{work} on disk in {folder}")
    with progress(f"hyperplanes of {layer}") as (bar, job):
        stored = _written(folder, work, lambda share: bar.update(job, completed=share))
    console.print(f"hyperplanes of {layer} ({found_mode}) for {described}: {_errors(stored)}")
    _first_units(stored, network, f"{subject.title}, {layer}, {found_mode}, {described}", picture)
    if network.note:
        console.print(f"{network.note}")
    _record(out, subject, network, image, described, layer, found_mode, units)
    endings = ", ".join(f".{kind}" for kind in ("zarr", "png", "npz", "json"))
    console.print(f"Written: {out} with the endings {endings}")


def _file_name(*parts: str | None) -> str:
    """A file name of some words."""
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts if part)


def _written(folder: Path, work: "Stream", report: Callable[[float], None]) -> "StoredPlanes":
    """Write the store, or name the option where its folder has another one.

    Raises:
        ValueError: If the folder has a store of other hyperplanes.
    """
    from adjointbackmap.planes.storage import write_store

    try:
        return write_store(folder, work, report)
    except ValueError as error:
        words = str(error)
        if not words.startswith("path must be a store"):
            raise
        msg = words.replace("path must", "--out must", 1).replace("another path", "another --out")
        raise ValueError(msg) from error


def _record(
    out: Path,
    subject: Subject,
    network: "Network",
    image: str,
    described: str,
    layer: str,
    mode: str,
    units: str | None,
) -> None:
    """Write what was computed, and how the picture became the network's input."""
    from adjointbackmap.files import disk

    wanted = subject.preprocessing()
    record = {
        "network": subject.title,
        "layer": layer,
        "mode": mode,
        "units": units,
        "image": image,
        "image as the network took it": described,
        "shape": subject.shape,
        "resize": wanted.resize,
        "mean": wanted.mean,
        "std": wanted.std,
        "classes": subject.classes,
    }
    if network.note:
        record["gates"] = network.note
    text = json.dumps(record, indent=1) + "\n"
    disk.write(out.with_name(f"{out.name}.json"), text.encode())


def _errors(stored: "StoredPlanes") -> str:
    """The largest relative error, and the share of the study's limit of 1 %, in words."""
    error = stored.relative_error().abs()
    share = 100 * float((error <= 0.01).float().mean())
    return f"largest |relative error| {float(error.max()):.2e}, share <= 1 %: {share:.4f} %"


def _first_units(stored: "StoredPlanes", network: "Network", title: str, path: Path) -> None:
    """Draw as many units as a picture has room for."""
    from adjointbackmap import plots
    from adjointbackmap.engine.workspace import block_shape

    units = stored.shape[1:]
    first = tuple(slice(0, n) for n in block_shape(units, plots.MOST_PANELS))
    planes = stored.planes(network, first, images=0)
    shown = planes.value.numel()
    count = prod(units)
    which = f" (first {shown} of {count:,} units)" if shown < count else ""
    plots.save(plots.unit_hyperplanes(planes, title + which), path)
