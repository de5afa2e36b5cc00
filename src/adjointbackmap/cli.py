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

from adjointbackmap.subjects import Source, find_image, find_images, load_subject, parse_units
from adjointbackmap.tables import check_table, class_table, region_table, sparsity_table, unit_table

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap import training
    from adjointbackmap.counts import LayerCheck
    from adjointbackmap.network import Network
    from adjointbackmap.store import StoredPlanes
    from adjointbackmap.verification import Terms

app = App(
    name="adjointbackmap",
    help="Exact effective hyperplanes of any unit of any layer of a piecewise-affine network.",
    error_console=Console(stderr=True, soft_wrap=True),
    suppress_keyboard_interrupt=False,  # main tells that finished work is kept
    error_formatter=lambda error: Text(f"adjointbackmap: {' '.join(str(error).split())}"),
)
study = App(name="study", help="Repeat the experiments of the dissertation, beside what it published.")
app.command(study)
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
    from adjointbackmap.runs import terms_of

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
    checks: dict[str, LayerCheck] = {}
    _verify(checks, network, x[None], terms_of(network), [described])
    console.print(check_table(checks))
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
    """
    import torch

    from adjointbackmap.store import write
    from adjointbackmap.streaming import stream

    _use_threads(threads)
    subject = load_subject(source)
    pixels, described = find_image(image, subject)
    network, x, precision = subject.trace(), subject.prepare(pixels), getattr(torch, dtype) if dtype else None
    work = stream(network, x, layer, mode, parse_units(units), own_bias, scale, precision, memory=memory)
    folder = out.with_name(out.name + ".zarr")
    console.print(f"{work} on disk in {folder}")
    with _progress(f"hyperplanes of {layer}") as (bar, job):
        stored = write(folder, work, lambda share: bar.update(job, completed=share))
    console.print(f"hyperplanes of {layer} ({mode}) for {described}: {_errors(stored)}")
    picture = _first_units(stored, network, f"{subject.title}, {layer}, {mode}, {described}", out.with_name(out.name + ".png"))
    console.print(f"Written: {folder} and {picture}")


@app.command
def verify(
    source: Source = NO_SOURCE,
    *,
    image: str = "0",
    images: int | None = None,
    dataset: Literal["sample", "cifar10", "cifar100"] = "sample",
    data: Path | None = None,
    layer: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    own_bias: bool = False,
    scale: float = STUDY_SCALE,
    dtype: Literal["float32", "float64"] = "float32",
    accumulate: Literal["float32", "float64"] | None = None,
    keep: Path | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
) -> None:
    """Hold every unit of every layer against its explicit hyperplane; with --keep, stop and start it at any time.

    Args:
        source: The network.
        image: Number of a sample image, a class for its first one, or a picture file.
        images: The first so many images of the data, in the place of one; the test images are in the order of their hashes.
        dataset: The data for --images: the sample of 200 that ships, or the test images of CIFAR.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        layer: Only these layers.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the activation pattern.
        dtype: float64 for more than the model's own precision.
        accumulate: float64 for inner products that are summed in it; --dtype if left out.
        keep: File of finished images: those that it has are not computed again.
        workers: So many processes on this machine share the images; with --device cuda, each has a card of its own.
        cluster: Address of a Dask scheduler whose workers share the images.
        device: Where to compute.
        threads: Threads of the processor to use; workers share them.

    Raises:
        ValueError: If there are not so many images, or both --workers and --cluster are given.
        RuntimeError: If a unit is off in float64.
        KeyboardInterrupt: On Ctrl-C, after the table of what is finished.
    """
    import torch

    from adjointbackmap.runs import image_hash, terms_of
    from adjointbackmap.tracing import trace

    _use_threads(threads)
    if workers is not None and cluster is not None:
        msg = f"The images must be shared by --workers or by --cluster. Got both ({workers}, {cluster}): leave one out."
        raise ValueError(msg)
    subject = load_subject(source)
    pixels = find_image(image, subject)[0][None] if images is None else find_images(images, dataset, data)
    x = subject.prepare(pixels).to(device, getattr(torch, dtype))
    network = trace(subject.module.to(device), torch.zeros(1, *subject.shape, device=device))
    terms = terms_of(network, layer, own_bias, scale, x.dtype, getattr(torch, accumulate or dtype))
    names = [image_hash(bytes_) for bytes_ in (255 * pixels).round().to(torch.uint8)]
    checks: dict[str, LayerCheck] = {}
    try:
        _verify(checks, network, x, terms, names, keep, cluster or workers)
    except KeyboardInterrupt:
        console.print(check_table(checks))
        raise KeyboardInterrupt("" if keep else "stopped; with --keep FILE, it goes on where it was") from None
    console.print(check_table(checks))
    if any(check.share < 1 for check in checks.values()) and dtype == "float64":
        msg = "Every unit must be within 1 % in float64. Got some that are not: see the table."
        raise RuntimeError(msg)


@app.command
def analyse(
    source: Source = NO_SOURCE,
    *,
    images: int = 1,
    dataset: Literal["sample", "cifar10", "cifar100"] = "sample",
    data: Path | None = None,
    sparse: int = 1,
    threads: int | None = None,
) -> None:
    """Distances in pixels in [0, 1] to the nearest kink and class boundary, and how sparse the hyperplanes are, by layer.

    Args:
        source: The network.
        images: The first so many images of the data; the test images are in the order of their hashes.
        dataset: The sample of 200 that ships, or the test images of CIFAR.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        sparse: The first so many of these images for the table by layer, which takes longest; 0 for none.
        threads: Threads of the processor to use.

    Raises:
        ValueError: If there are not so many images.
    """
    from adjointbackmap.analysis import analyse as analysis_of
    from adjointbackmap.effective import sparsity

    _use_threads(threads)
    if not 0 <= sparse <= images:
        msg = f"--sparse must be from 0 to --images, {images}. Got {sparse}."
        raise ValueError(msg)
    subject = load_subject(source)
    pixels, network, found = find_images(images, dataset, data), subject.trace_in_pixels(), []
    with _progress("linear regions") as (bar, job):
        for done, image in enumerate(pixels, start=1):
            found.append(analysis_of(network, image.double()))
            bar.update(job, completed=done / images, description=f"linear regions: {done} of {images} images")
    console.print(region_table(found))
    if found[0].unmeasured:
        console.print(f"Kinks that are not measured, so that regions may end earlier: {', '.join(found[0].unmeasured)}")
    if sparse:
        with _progress("sparsity of every layer") as (bar, job):
            x = subject.prepare(pixels[:sparse])
            counts = sparsity(subject.trace(), x, report=lambda share: bar.update(job, completed=share))
        console.print(sparsity_table(counts))


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


@app.command
def bench(
    *,
    only: str = "",
    repeats: int | None = None,
    quick: bool = False,
    out: Path | None = None,
    docs: Path | None = None,
    threads: int | None = None,
) -> None:
    """Measure time and memory beside named peers on an idle machine; stop it at any time and start it again to go on.

    Args:
        only: Part of the names of what to measure, such as vgg7, conv3 or classes.
        repeats: Runs of which the median is taken; 5 if left out, 1 with --quick.
        quick: A look at a part of it, not figures to keep.
        out: File of the finished entries; benchmark.json if left out, benchmark-quick.json with --quick.
        docs: Page to write the tables into, such as docs/speed.md.
        threads: Threads of the processor to use.

    Raises:
        RuntimeError: If the plan's choice is far slower than the best of the methods.
    """
    from adjointbackmap.benchmark.runs import bench as run
    from adjointbackmap.benchmark.runs import check_page, write_page
    from adjointbackmap.benchmark.table import DEFECT, defects, short, where_measured

    _use_threads(threads)
    if docs:
        check_page(docs)
    file = out or Path("benchmark-quick.json" if quick else "benchmark.json")
    with _progress("warming up") as (bar, job):
        found = run(file, only, quick, repeats, lambda name, share: bar.update(job, completed=share, description=name))
    console.print(where_measured(found), highlight=False)
    for sheet in short(found["entries"]):
        console.print(sheet.rich())
    if docs:
        write_page(found, docs)
    console.print(f"Written: {file}{f' and {docs}' if docs else ''}")
    far = defects(found)
    if far:
        msg = f"The plan must be at most {DEFECT} times as slow as the best method. Got more in {', '.join(far)}."
        raise RuntimeError(msg)


@study.command
def verification(
    *,
    network: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    images: int | None = None,
    images_float64: int | None = None,
    images_fc: int | None = None,
    out: Path = Path("study-verification"),
    data: Path | None = None,
    workers: int | None = None,
    docs: Path | None = None,
    results: Path | None = None,
    threads: int | None = None,
) -> None:
    """Every unit of every layer of the shipped networks over the test images, beside Tables 3.3, 3.4, Figs. 2.4 and 2.5.

    Stop it at any time and start it again to go on where it was; a later run with more images only adds.

    Args:
        network: Only these networks.
        images: Test images in float32, by hash; if left out, all for VGG7 and 1,000 for ResNet20.
        images_float64: In float64, and in float32 with sums in float64; if left out, 200 for VGG7 and 50 for ResNet20.
        images_fc: For the layer fc; all test images if left out.
        out: Folder of finished images and of the results, verification.json.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        workers: So many processes share the images.
        docs: Page to write the tables into, such as docs/verification.md; results and figures go into folders beside it.
        results: Make the page of this earlier verification.json, and compute nothing.
        threads: Threads of the processor to use; workers share them.

    Raises:
        ValueError: If --results is given without --docs.
        RuntimeError: If a unit is off in float64.
        KeyboardInterrupt: On Ctrl-C, after the tables of what is finished.
    """
    from adjointbackmap.study.page import check_page, off_in_float64
    from adjointbackmap.study.verification import RESULTS, Counts, check_networks, run

    _use_threads(threads)
    chosen, counts, file = check_networks(network), Counts(images, images_float64, images_fc), results or out / RESULTS
    if docs:
        check_page(docs)
    elif results:
        msg = f"--results must come with the page to write. Got {results} alone: add --docs PAGE."
        raise ValueError(msg)
    if not results:
        with _progress("study verification") as (bar, job):

            def report(what: str, share: float) -> None:
                if bar.tasks[job].description != what:
                    bar.reset(job, description=what)
                bar.update(job, completed=share)

            try:
                run(out, chosen, counts, data, workers, report)
            except KeyboardInterrupt:
                if file.exists():
                    _tell_study(file, docs)
                raise
    off = off_in_float64(_tell_study(file, docs))
    if off:
        msg = f"Every unit must be within 1 % in float64. Got some that are not, in {', '.join(off)}: see the tables."
        raise RuntimeError(msg)


def main() -> None:
    """Run the command line: bad input is one line and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]adjointbackmap:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        Console(stderr=True).print(str(stop) or "stopped; finished work is kept")
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


def _tell_study(file: Path, docs: Path | None) -> dict[str, Any]:
    """Show the results in a file, write their page, and return them."""
    from adjointbackmap.study.page import show, write_page
    from adjointbackmap.study.verification import read

    found = read(file)
    for table in show(found):
        console.print(table)
    console.print(f"Written: {', '.join(map(str, write_page(found, file, docs) if docs else [file]))}")
    return found


def _errors(stored: "StoredPlanes") -> str:
    error = stored.relative_error().abs()
    share = 100 * float((error <= 0.01).float().mean())
    return f"largest |relative error| {float(error.max()):.2e}, share <= 1 %: {share:.4f} %"


def _first_units(stored: "StoredPlanes", network: "Network", title: str, path: Path) -> Path:
    """A picture of as many units as one has room for."""
    from adjointbackmap import plots
    from adjointbackmap.streaming import block_shape

    units = stored.shape[1:]
    planes = stored.planes(network, tuple(slice(0, n) for n in block_shape(units, plots.MOST_PANELS)), images=0)
    shown, count = planes.value.numel(), prod(units)
    which = f" (first {shown} of {count:,} units)" if shown < count else ""
    return plots.save(plots.unit_hyperplanes(planes, title + which), path)


def _verify(
    checks: dict[str, "LayerCheck"],
    network: "Network",
    x: "Tensor",
    terms: "Terms",
    names: list[str],
    keep: Path | None = None,
    workers: int | str | None = None,
) -> None:
    """Add the errors of each image when it is finished."""
    from adjointbackmap.runs import merge, verified

    with _progress("verifying every unit") as (bar, job):
        found = verified(network, x, terms, names, lambda share: bar.update(job, completed=share), keep, workers)
        for done, (_, of_image) in enumerate(found, start=1):
            merge(checks, of_image)
            bar.update(job, description=f"verifying every unit: {done} of {len(names)} images")
