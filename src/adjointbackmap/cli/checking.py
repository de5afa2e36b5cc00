"""Commands that measure a network on many images: verify, analyse."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from adjointbackmap.cli.frame import (
    NO_NETWORK,
    NOT_KEPT,
    STUDY_SCALE,
    app,
    check_device,
    check_extra,
    console,
    help_examples,
    progress,
    use_threads,
)
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.cli.tables import check_table, distance_table, field_table
from adjointbackmap.sources import NetworkOptions, Switch, chosen_images, find_images, load_subject

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.analysis.boundaries import Analysis
    from adjointbackmap.engine.network import Network
    from adjointbackmap.exactness.checks import Terms
    from adjointbackmap.exactness.layer_check import LayerCheck

VERIFY_EXAMPLES = help_examples(
    "adjointbackmap verify vgg7-cifar10 --image ship --csv",
    "adjointbackmap verify vgg7-cifar10 --fold --images 3 --keep done",
)
ANALYSE_EXAMPLES = help_examples("adjointbackmap analyse vgg7-cifar10 --images 3 --sparse 0")


@app.command(help_epilogue=VERIFY_EXAMPLES)
def verify(
    source: NetworkOptions = NO_NETWORK,
    *,
    image: str = "0",
    images: int | None = None,
    dataset: Literal["sample", "cifar10", "cifar100"] = "sample",
    data: Path | None = None,
    layer: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    own_bias: Switch = False,
    scale: float = STUDY_SCALE,
    dtype: Literal["float32", "float64"] = "float32",
    accumulate: Literal["float32", "float64"] | None = None,
    values: Literal["float32", "float64"] | None = None,
    keep: Path | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Compare every unit of every layer with its explicit hyperplane.

    With --keep, a stopped run continues when the same command is run again.

    Args:
        source: The network.
        image: A sample image by number, the first sample image of a class, or a picture file.
        images: Number of images to use instead of --image. Test images of CIFAR are taken in the
            order of their hashes.
        dataset: Images for --images: the 200 sample images that ship, or the test images of CIFAR.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        layer: Names of the layers to verify; all if left out.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the activation pattern. Networks with curved operations take 1.
        dtype: Precision of the network and of the hyperplanes.
        values: Precision of the network alone, if it is another one: --dtype float64 --values
            float32 compares exact hyperplanes with the values of the float32 network.
        accumulate: Precision in which inner products are summed. The default is --dtype.
        keep: File for finished images. Images in it are not computed again.
        workers: Number of processes on this machine that share the images. With --device cuda,
            each has a GPU of its own.
        cluster: Address of a Dask scheduler whose workers share the images.
        device: Where to compute.
        threads: Number of processor threads. Workers share them.
        output: How tables are printed.

    Raises:
        ValueError: If there are fewer images than --images, or both --workers and --cluster are
            given.
        RuntimeError: If a unit is off in float64.
        KeyboardInterrupt: On Ctrl-C, after the table of the finished images.
    """
    import torch

    from adjointbackmap.exactness.verification import image_hash, terms_of

    use_threads(threads)
    check_device(device)
    if workers is not None or cluster is not None:
        check_extra("--workers" if cluster is None else "--cluster", "cluster", distributed="Dask")
    if workers is not None and cluster is not None:
        msg = (
            "The images must be shared by --workers or by --cluster. "
            f"Got both ({workers}, {cluster}): leave one out."
        )
        raise ValueError(msg)
    subject = load_subject(source)
    pixels = chosen_images(image, images, dataset, data, subject)
    x = subject.prepare(pixels).to(device, getattr(torch, dtype))
    network = subject.trace(device)
    sums = getattr(torch, accumulate or dtype)
    if network.curved and scale == STUDY_SCALE:
        scale = 1.0
        output.text(console, "k is 1, because curved gates change with k.")
    terms = terms_of(network, layer, own_bias, scale, x.dtype, sums, values=values)
    names = [image_hash(bytes_) for bytes_ in (255 * pixels).round().to(torch.uint8)]
    checks = _verified(network, x, terms, names, keep, cluster or workers, output)
    if any(check.share < 1 for check in checks.values()) and terms.measured == torch.float64:
        msg = "Every unit must be within 1 % in float64. Got some that are not: see the table."
        raise RuntimeError(msg)


def _verified(
    network: "Network",
    x: "Tensor",
    terms: "Terms",
    names: list[str],
    keep: Path | None,
    workers: int | str | None,
    output: Output,
) -> dict[str, "LayerCheck"]:
    """Verify the images and print the table of the finished ones, also if the run is stopped.

    Raises:
        KeyboardInterrupt: On Ctrl-C; without ``keep`` it advises --keep.
    """
    checks: dict[str, LayerCheck] = {}
    try:
        show_verified(checks, network, x, terms, names, keep, workers)
    except KeyboardInterrupt as stop:
        output.tables(console, check_table(checks))
        if not keep:
            stop.args = (NOT_KEPT,)
        raise
    output.tables(console, check_table(checks))
    return checks


@app.command(help_epilogue=ANALYSE_EXAMPLES)
def analyse(
    source: NetworkOptions = NO_NETWORK,
    *,
    images: int = 1,
    dataset: Literal["sample", "cifar10", "cifar100"] = "sample",
    data: Path | None = None,
    sparse: int = 1,
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Measure the distance to the nearest kink and class boundary, and sparsity by layer.

    Distances are in pixels from 0 to 1.

    Args:
        source: The network.
        images: Number of images. Test images of CIFAR are taken in the order of their hashes.
        dataset: The 200 sample images that ship, or the test images of CIFAR.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        sparse: How many of these images to use for the sparsity table (slow); 0 for none.
        threads: Number of processor threads.
        output: How tables are printed.

    Raises:
        ValueError: If there are fewer images than --images, or --sparse is larger than --images.
    """
    from adjointbackmap.analysis.fields import sparsity

    use_threads(threads)
    if not 0 <= sparse <= images:
        msg = f"--sparse must be from 0 to --images, {images}. Got {sparse}."
        raise ValueError(msg)
    subject = load_subject(source)
    pixels = find_images(images, dataset, data)
    found = _analysed(subject.trace_in_pixels(), pixels)
    tables = [distance_table(found)]
    if sparse:
        with progress("sparsity of every layer") as (bar, job):
            x = subject.prepare(pixels[:sparse])
            counts = sparsity(
                subject.trace(), x, report=lambda share: bar.update(job, completed=share)
            )
        tables.append(field_table(counts))
    output.tables(console, *tables)
    if found[0].unmeasured:
        left_out = ", ".join(found[0].unmeasured)
        words = f"Kinks that are not measured, so that regions may end earlier: {left_out}"
        output.text(console, words)


def _analysed(network: "Network", pixels: "Tensor") -> list["Analysis"]:
    """Analyse images behind a progress bar."""
    from adjointbackmap.analysis.boundaries import analyse as analysis_of

    found = []
    with progress("linear regions") as (bar, job):
        for done, image in enumerate(pixels, start=1):
            found.append(analysis_of(network, image.double()))
            words = f"linear regions: {done} of {len(pixels)} images"
            bar.update(job, completed=done / len(pixels), description=words)
    return found


def show_verified(
    checks: dict[str, "LayerCheck"],
    network: "Network",
    x: "Tensor",
    terms: "Terms",
    names: list[str],
    keep: Path | None = None,
    workers: int | str | None = None,
) -> None:
    """Verify images behind a progress bar; each finished image is merged into ``checks``."""
    from adjointbackmap.exactness.verification import merge, verified

    with progress("verifying every unit") as (bar, job):
        found = verified(
            network, x, terms, names, lambda share: bar.update(job, completed=share), keep, workers
        )
        for done, (_, of_image) in enumerate(found, start=1):
            merge(checks, of_image)
            bar.update(job, description=f"verifying every unit: {done} of {len(names)} images")
