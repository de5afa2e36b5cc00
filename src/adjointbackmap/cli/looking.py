"""Commands that look at a network: demo, layers, map."""

import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from adjointbackmap.cli.checking import show_verified
from adjointbackmap.cli.frame import NO_SOURCE, STUDY_SCALE, app, console, progress, use_threads
from adjointbackmap.cli.tables import check_table, class_table, unit_table
from adjointbackmap.sources import Source, find_image, load_subject, parse_units

if TYPE_CHECKING:
    from adjointbackmap.engine.network import Network
    from adjointbackmap.exactness.layer_check import LayerCheck
    from adjointbackmap.planes.storage import StoredPlanes


DEMO_NETWORK = "vgg7-cifar10"


@app.command
def demo(
    *, image: str = "ship", out: Path = Path("adjointbackmap-demo"), threads: int | None = None
) -> None:
    """Show one image of the sample: prediction, hyperplanes of every class, every unit of every layer verified.

    Args:
        image: Number of a sample image, 0 to 199, or a class for its first one.
        out: Folder for the picture, whose name ends in that of the image.
        threads: Threads of the processor to use.
    """
    from adjointbackmap import plots
    from adjointbackmap.exactness.verification import terms_of
    from adjointbackmap.planes.hyperplane import hyperplanes

    started = time.monotonic()
    use_threads(threads)
    subject = load_subject(Source(DEMO_NETWORK, fold=True))
    pixels, described = find_image(image, subject)
    x = subject.prepare(pixels)
    network = subject.trace()
    planes = hyperplanes(network, x, "fc", "RM0", scale=STUDY_SCALE)
    best = subject.classes[int(planes.value[0].argmax())]
    console.print(f"[bold]{subject.title}[/bold] sees {described}: it says [bold]{best}[/bold].")
    console.print(
        "Every output is an inner product of the image and the network's biases with a hyperplane, computed here:\n"
    )
    console.print(class_table(planes, subject.classes))
    console.print(unit_table(network, x, STUDY_SCALE))
    checks: dict[str, LayerCheck] = {}
    show_verified(checks, network, x[None], terms_of(network), [described])
    console.print(check_table(checks))
    figure = plots.class_hyperplanes(
        planes, subject.classes, pixels, f"{subject.title}: {described}, seen as {best}"
    )
    console.print(
        f"Picture: [bold]{plots.save(figure, out / f'hyperplanes-{Path(image).stem}.png')}[/bold]"
    )
    console.print(
        f"{time.monotonic() - started:.0f} s in all. Next: adjointbackmap layers {DEMO_NETWORK}"
    )


@app.command
def layers(source: Source = NO_SOURCE) -> None:
    """List the layers of a network: kind, output shape, receptive field, modes and number of hyperplanes."""
    from adjointbackmap.planes.units import unit_dims

    subject = load_subject(source)
    network = subject.trace()
    table = Table("layer", "kind", "output", "field", "modes", "hyperplanes", title=subject.title)
    for layer in network.layers.values():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        units = prod(unit_dims(layer, mode).values())
        shape, field = (
            "x".join(map(str, extents)) for extents in (layer.out_shape, layer.receptive_field)
        )
        modes = (
            layer.modes[0] if len(layer.modes) == 1 else f"{layer.modes[0]} to {layer.modes[-1]}"
        )
        table.add_row(layer.name, layer.kind, shape, field, modes, f"{units:,} in {mode}")
    console.print(table)
    console.print(
        f"{len(network.biases)} biases in {len(network.biases.names)} parts: {', '.join(network.biases.names)}"
    )


@app.command(name="map")
def map_units(
    source: Source = NO_SOURCE,
    *,
    layer: str,
    mode: Literal["RM4", "RM3", "RM2", "RM1", "RM0"],
    units: str | None = None,
    image: str = "0",
    own_bias: bool | None = None,
    scale: float = 1.0,
    dtype: Literal["float32", "float64"] | None = None,
    memory: str = "2GiB",
    out: Path = Path("hyperplanes"),
    threads: int | None = None,
) -> None:
    """Compute the hyperplanes of chosen units into a store on disk, larger than memory if need be, and draw the first ones.

    A run that was stopped goes on where it was when the same command is run again.

    Args:
        source: The network.
        layer: Name of the layer, see the command layers.
        mode: Reconstruction mode.
        units: Parts over the mode's unit dimensions, separated by commas: an int, a slice such as 2:5 or : for all;
            or predicted, for RM0. All units if left out.
        image: Number of a sample image, a class for its first one, or a picture file.
        own_bias: Whether the layer's own bias belongs to the units.
        scale: The factor k of the activation pattern.
        dtype: float64 for more than the model's own precision.
        memory: For one block of hyperplanes and what computing it takes; blocks go to the disk one after the other.
        out: Name of the store (a folder .zarr) and of the picture (.png) without their endings.
        threads: Threads of the processor to use.

    Raises:
        ValueError: If there is a picture of this name, but no store.
    """
    from adjointbackmap.planes.query import Query
    from adjointbackmap.planes.storage import write
    from adjointbackmap.planes.streaming import stream

    use_threads(threads)
    subject = load_subject(source)
    pixels, described = find_image(image, subject)
    network = subject.trace()
    x = subject.prepare(pixels)
    work = stream(
        Query.of(network, x, layer, mode, parse_units(units), own_bias, scale, dtype, memory=memory)
    )
    folder, picture = (out.with_name(out.name + ending) for ending in (".zarr", ".png"))
    if picture.exists() and not folder.exists():
        msg = f"--out must be new or name a store and its picture. Got {picture} without {folder.name}: choose another name."
        raise ValueError(msg)
    console.print(f"{work} on disk in {folder}")
    with progress(f"hyperplanes of {layer}") as (bar, job):
        stored = write(folder, work, lambda share: bar.update(job, completed=share))
    console.print(f"hyperplanes of {layer} ({mode}) for {described}: {_errors(stored)}")
    _first_units(stored, network, f"{subject.title}, {layer}, {mode}, {described}", picture)
    console.print(f"Written: {folder} and {picture}")


def _errors(stored: "StoredPlanes") -> str:
    error = stored.relative_error().abs()
    share = 100 * float((error <= 0.01).float().mean())
    return f"largest |relative error| {float(error.max()):.2e}, share <= 1 %: {share:.4f} %"


def _first_units(stored: "StoredPlanes", network: "Network", title: str, path: Path) -> None:
    """Draw as many units as one has room for."""
    from adjointbackmap import plots
    from adjointbackmap.planes.streaming import block_shape

    units = stored.shape[1:]
    planes = stored.planes(
        network, tuple(slice(0, n) for n in block_shape(units, plots.MOST_PANELS)), images=0
    )
    shown = planes.value.numel()
    count = prod(units)
    which = f" (first {shown} of {count:,} units)" if shown < count else ""
    plots.save(plots.unit_hyperplanes(planes, title + which), path)
