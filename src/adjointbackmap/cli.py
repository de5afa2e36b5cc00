"""The command line: each command is a function of its own; torch is imported when a command runs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from adjointbackmap.subjects import Source, find_image, load_subject, parse_units
from adjointbackmap.tables import check_table, class_table, unit_table

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap import training
    from adjointbackmap.network import Network
    from adjointbackmap.verification import LayerCheck

app = App(
    name="adjointbackmap",
    help="Exact effective hyperplanes of any unit of any layer of a piecewise-affine network.",
    error_console=Console(stderr=True, soft_wrap=True),
    error_formatter=lambda error: Text(f"adjointbackmap: {' '.join(str(error).split())}"),
)
console = Console()
DEMO_NETWORK = "vgg7-cifar10"
STUDY_SCALE = 1 / 8


NO_SOURCE = Source()


@app.command
def demo(*, image: str = "ship", out: Path = Path("adjointbackmap-demo"), threads: int | None = None) -> None:
    """Show one image of the sample: prediction, hyperplanes of every class, every unit of every layer verified.

    Args:
        image: Number of a sample image, 0 to 199, or a class for its first one.
        out: Folder for the picture.
        threads: Threads of the processor to use.
    """
    from adjointbackmap import plots
    from adjointbackmap.hyperplane import hyperplanes

    started = time.monotonic()
    _use_threads(threads)
    subject = load_subject(Source(DEMO_NETWORK, fold=True))
    pixels, described = find_image(image, subject)
    x = subject.prepare(pixels)
    network = subject.trace()
    planes = hyperplanes(network, x, "fc", "RM0", scale=STUDY_SCALE)
    best = subject.classes[int(planes.value[0].argmax())]
    console.print(f"[bold]{subject.title}[/bold] sees {described}: it says [bold]{best}[/bold].")
    console.print("Every output is an inner product of the image and the network's biases with a hyperplane, computed here:\n")
    console.print(class_table(planes, subject.classes))
    console.print(unit_table(network, x, STUDY_SCALE))
    console.print(check_table(_verified(network, x, STUDY_SCALE, "float32")))
    figure = plots.class_hyperplanes(planes, subject.classes, pixels, f"{subject.title}: {described}, seen as {best}")
    console.print(f"Picture: [bold]{plots.save(figure, out / 'hyperplanes.png')}[/bold]")
    console.print(f"{time.monotonic() - started:.0f} s in all. Next: adjointbackmap layers {DEMO_NETWORK}")


@app.command
def layers(source: Source = NO_SOURCE) -> None:
    """List the layers of a network: kind, output shape, receptive field, modes and number of hyperplanes."""
    from adjointbackmap.units import unit_dims

    subject = load_subject(source)
    network = subject.trace()
    table = Table("layer", "kind", "output", "field", "modes", "hyperplanes", title=subject.title)
    for layer in network.layers.values():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        units = prod(unit_dims(layer, mode).values())
        shape, field = ("x".join(map(str, extents)) for extents in (layer.out_shape, layer.receptive_field))
        modes = layer.modes[0] if len(layer.modes) == 1 else f"{layer.modes[0]} to {layer.modes[-1]}"
        table.add_row(layer.name, layer.kind, shape, field, modes, f"{units:,} in {mode}")
    console.print(table)
    console.print(f"{len(network.biases)} biases in {len(network.biases.names)} parts: {', '.join(network.biases.names)}")


@app.command(name="map")
def mapparse_units(
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
) -> None:
    """Compute the hyperplanes of chosen units and write them to a file and a picture.

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
        memory: Largest size of the result.
        out: Name of the files without their ending.
    """
    import torch

    from adjointbackmap import plots
    from adjointbackmap.hyperplane import hyperplanes
    from adjointbackmap.store import write_npz

    subject = load_subject(source)
    pixels, described = find_image(image, subject)
    with console.status("computing hyperplanes"):
        planes = hyperplanes(
            subject.trace(),
            subject.prepare(pixels),
            layer,
            mode,
            units=parse_units(units),
            own_bias=own_bias,
            scale=scale,
            dtype=getattr(torch, dtype) if dtype else None,
            memory=memory,
        )
    error = planes.relative_error().abs()
    shape = " x ".join(map(str, planes.image.shape))
    console.print(f"{planes.value.numel():,} hyperplanes of {layer} ({mode}), image part {shape}, for {described}")
    console.print(
        f"largest |relative error| {float(error.max()):.2e}, share <= 1 %: {100 * float((error <= 0.01).float().mean()):.4f} %"
    )
    figure = plots.unit_hyperplanes(planes, f"{subject.title}, {layer}, {mode}, {described}")
    archive = write_npz(planes, out.with_name(out.name + ".npz"))
    picture = plots.save(figure, out.with_name(out.name + ".png"))
    console.print(f"Written: {archive} and {picture}")


@app.command
def verify(
    source: Source = NO_SOURCE,
    *,
    image: str = "0",
    images: int | None = None,
    layer: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    own_bias: bool = False,
    scale: float = STUDY_SCALE,
    dtype: Literal["float32", "float64"] = "float32",
    threads: int | None = None,
) -> None:
    """Hold every unit of every layer against its explicit hyperplane.

    Args:
        source: The network.
        image: Number of a sample image, a class for its first one, or a picture file.
        images: The first so many images of the sample, in the place of one.
        layer: Only these layers.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the activation pattern.
        dtype: float64 for more than the model's own precision.
        threads: Threads of the processor to use.

    Raises:
        ValueError: If there are not so many images.
        RuntimeError: If a unit is off in float64.
    """
    import torch

    from adjointbackmap import data

    _use_threads(threads)
    subject = load_subject(source)
    if images is None:
        pixels = find_image(image, subject)[0][None]
    else:
        if not 0 < images <= len(data.sample()):
            msg = f"--images must be from 1 to {len(data.sample())}. Got {images}."
            raise ValueError(msg)
        pixels = data.sample()[:images].unit_interval()
    x = subject.prepare(pixels).to(getattr(torch, dtype))
    checks = _verified(subject.trace(), x, scale, dtype, layer, own_bias)
    console.print(check_table(checks))
    if any(check.share < 1 for check in checks.values()) and dtype == "float64":
        msg = "Every unit must be within 1 % in float64. Got some that are not: see the table."
        raise RuntimeError(msg)


@app.command
def train(
    network: str,
    dataset: Literal["cifar10", "cifar100"] = "cifar10",
    *,
    data: Path | None = None,
    out: Path | None = None,
    epochs: int = 30,
    batch: int = 128,
    peak_rate: float = 0.2,
    rise: float = 0.2,
    weight_decay: float = 5e-4,
    start: Path | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
) -> None:
    """Train a network of the study; stop it at any time and start it again to go on where it was.

    Args:
        network: vgg7-nobias, fixup-resnet20-nobias, vgg7, resnet20 or fixup-resnet20.
        dataset: The data.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        out: Folder of the run: checkpoint, log, weights and card; runs/<network>-<dataset>-<seed> if left out.
        epochs: Passes over the training images.
        batch: Images in a step.
        peak_rate: Largest learning rate.
        rise: Share of the steps in which the rate rises.
        weight_decay: Factor of the squared weights in the loss.
        start: Weights to begin from, the safetensors file of an earlier run.
        seed: Of initialisation, order and augmentation.
        device: Where to train.
        threads: Threads of the processor to use.
    """
    from adjointbackmap.training import Recipe, Task
    from adjointbackmap.training import train as run

    _use_threads(threads)
    recipe = Recipe(epochs=epochs, batch=batch, peak_rate=peak_rate, rise=rise, weight_decay=weight_decay)
    task = Task(network, dataset, seed, recipe, str(start) if start else None)
    folder = out or Path("runs") / f"{network}-{dataset}-{seed}"
    with _progress(f"{network} on {dataset}") as (bar, job):

        def report(progress: "training.Progress") -> None:
            known = "" if progress.validation is None else f", validation {100 * progress.validation:.1f} %"
            description = f"{network} on {dataset}: loss {progress.loss:.3f}{known}"
            bar.update(job, completed=progress.step / progress.steps, description=description)

        card = run(task, folder, data, device, report)
    console.print(f"test accuracy {100 * card['test accuracy']:.2f} %, kept epoch {card['kept epoch']}; written to {folder}")


@app.command
def evaluate(
    source: Source = NO_SOURCE,
    *,
    dataset: Literal["cifar10", "cifar100", "sample"] | None = None,
    split: Literal["test", "validation", "train"] = "test",
    data: Path | None = None,
    threads: int | None = None,
) -> None:
    """Accuracy of a network on a data set, recomputed from its weights.

    Args:
        source: The network.
        dataset: The data; that of a shipped name if left out. sample is the 200 images that ship with the package.
        split: Which images.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        threads: Threads of the processor to use.
    """
    from adjointbackmap import data as sets
    from adjointbackmap.training import accuracy

    _use_threads(threads)
    subject = load_subject(source)
    chosen = dataset or ("cifar100" if source.name and source.name.endswith("cifar100") else "cifar10")
    images = sets.sample() if chosen == "sample" else sets.load(chosen, split, data)
    share = accuracy(subject.module, images, subject.prepare)
    which = "the sample" if chosen == "sample" else f"{chosen} {split}"
    console.print(f"{subject.title}: {100 * share:.2f} % of {len(images):,} images ({which})")


def main() -> None:
    """Run the command line: bad input is one line and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]adjointbackmap:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; finished work is kept")
        sys.exit(130)


def _use_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        msg = f"--threads must be at least 1. Got {threads}."
        raise ValueError(msg)
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _progress(description: str) -> Iterator[tuple[Progress, Any]]:
    with Progress(console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=1.0)


def _verified(
    network: "Network",
    x: "Tensor",
    scale: float,
    dtype: str,
    layers: list[str] | None = None,
    own_bias: bool = False,
) -> dict[str, "LayerCheck"]:
    import torch

    from adjointbackmap.verification import verify as run

    with _progress("verifying every unit") as (bar, job):
        return run(network, x, layers, own_bias, scale, getattr(torch, dtype), lambda share: bar.update(job, completed=share))
