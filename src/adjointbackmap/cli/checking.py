"""Commands that measure a network on many images: verify, analyse."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from adjointbackmap.cli.frame import NO_SOURCE, STUDY_SCALE, app, console, progress, use_threads
from adjointbackmap.cli.tables import check_table, region_table, sparsity_table
from adjointbackmap.sources import Source, find_image, find_images, load_subject

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.engine.network import Network
    from adjointbackmap.exactness.checks import Terms
    from adjointbackmap.exactness.layer_check import LayerCheck


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

    from adjointbackmap.exactness.verification import image_hash, terms_of

    use_threads(threads)
    if workers is not None and cluster is not None:
        msg = f"The images must be shared by --workers or by --cluster. Got both ({workers}, {cluster}): leave one out."
        raise ValueError(msg)
    subject = load_subject(source)
    pixels = (
        find_image(image, subject)[0][None]
        if images is None
        else find_images(images, dataset, data)
    )
    x = subject.prepare(pixels).to(device, getattr(torch, dtype))
    network = subject.trace(device)
    terms = terms_of(network, layer, own_bias, scale, x.dtype, getattr(torch, accumulate or dtype))
    names = [image_hash(bytes_) for bytes_ in (255 * pixels).round().to(torch.uint8)]
    checks: dict[str, LayerCheck] = {}
    try:
        show_verified(checks, network, x, terms, names, keep, cluster or workers)
    except KeyboardInterrupt as stop:
        console.print(check_table(checks))
        if not keep:
            stop.args = ("stopped; with --keep FILE, it goes on where it was",)
        raise
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
    from adjointbackmap.analysis.boundaries import analyse as analysis_of
    from adjointbackmap.analysis.fields import sparsity

    use_threads(threads)
    if not 0 <= sparse <= images:
        msg = f"--sparse must be from 0 to --images, {images}. Got {sparse}."
        raise ValueError(msg)
    subject = load_subject(source)
    pixels = find_images(images, dataset, data)
    network = subject.trace_in_pixels()
    found = []
    with progress("linear regions") as (bar, job):
        for done, image in enumerate(pixels, start=1):
            found.append(analysis_of(network, image.double()))
            bar.update(
                job,
                completed=done / images,
                description=f"linear regions: {done} of {images} images",
            )
    console.print(region_table(found))
    if found[0].unmeasured:
        console.print(
            f"Kinks that are not measured, so that regions may end earlier: {', '.join(found[0].unmeasured)}"
        )
    if sparse:
        with progress("sparsity of every layer") as (bar, job):
            x = subject.prepare(pixels[:sparse])
            counts = sparsity(
                subject.trace(), x, report=lambda share: bar.update(job, completed=share)
            )
        console.print(sparsity_table(counts))


def show_verified(
    checks: dict[str, "LayerCheck"],
    network: "Network",
    x: "Tensor",
    terms: "Terms",
    names: list[str],
    keep: Path | None = None,
    workers: int | str | None = None,
) -> None:
    """Verify images behind a bar, and add the errors of each one to ``checks`` when it is finished."""
    from adjointbackmap.exactness.verification import merge, verified

    with progress("verifying every unit") as (bar, job):
        found = verified(
            network, x, terms, names, lambda share: bar.update(job, completed=share), keep, workers
        )
        for done, (_, of_image) in enumerate(found, start=1):
            merge(checks, of_image)
            bar.update(job, description=f"verifying every unit: {done} of {len(names)} images")
