"""Verification of many images.

Finished images are kept in a file, and several workers share the others.
"""

import copy
import hashlib
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.display import ShownDict
from adjointbackmap.engine.network import Network, check_network, several
from adjointbackmap.engine.pattern import check_images, check_scale, dtype_of
from adjointbackmap.engine.sweep import images_per_sweep
from adjointbackmap.exactness.checks import Terms, verify_images
from adjointbackmap.exactness.journal import Record
from adjointbackmap.exactness.layer_check import LayerCheck
from adjointbackmap.files.disk import hold_file
from adjointbackmap.planes.query import bytes_of
from adjointbackmap.tracing import trace

Checks = dict[str, LayerCheck]
"""Name of a layer -> its errors."""

Batch = tuple[list[str], Tensor]
"""Names of images, and the images."""


def verify(
    network: Network,
    images: Tensor,
    layers: str | torch.nn.Module | Sequence[str | torch.nn.Module] | None = None,
    own_bias: bool = False,
    scale: float | str | None = None,
    dtype: torch.dtype | str | None = None,
    report: Callable[[float], None] = lambda share: None,
    *,
    accumulate: torch.dtype | str | None = None,
    names: Sequence[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    workers: int | str | None = None,
    memory: str | float | int | None = None,
    values: torch.dtype | str | None = None,
) -> Checks:
    r"""Compare every unit of every layer with its explicit hyperplane [Wan2022, eqs. 3.27-3.29].

    Every number of the hyperplanes is computed with a unit tangent of [x; b], and the inner
    products are summed from these numbers. So the check never repeats the network's own arithmetic.

    Args:
        network: Traced network.
        images: Image or batch.
        layers: Names of layers; by default all layers with different outputs.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the pattern; by default 1/8, and 1 for a network with curved
            operations.
        dtype: ``torch.float64`` for more than the model's own precision.
        report: Called with the finished share.
        accumulate: Dtype of the inner products; by default ``dtype``. With ``torch.float64``,
            hyperplanes in ``dtype`` are summed in float64.
        names: Name of each image, such as ``Images.hashes``; by default the SHA-256 of its numbers,
            see :func:`image_hash`.
        keep: File of finished images, see :class:`adjointbackmap.exactness.journal.Record`. Images
            in the file are not computed again. Each other image is written to it when it is
            finished.
        workers: Number of processes on this machine that share the images, or the address of a Dask
            scheduler such as ``tcp://10.0.0.1:8786``; by default this process alone computes.
        memory: Largest size of a batch of tangents in bytes, in each process, such as ``"64MiB"``;
            by default that of the fastest batch.
        values: Dtype in which the untouched model computes the values; by default ``dtype``. With
            ``torch.float32`` and ``dtype=torch.float64``, exact hyperplanes are compared with what
            the float32 model says: gates are those of its pass, and its parameters are widened.
            ``LayerCheck.flipped`` counts the gates that are not the same in float64.

    Returns:
        Name of a layer -> its errors.

    Raises:
        ValueError: If a layer or the images do not fit the network, or ``keep`` is the file of
            another job.
        OSError: If another process writes to ``keep``, or its disk is full; finished images stay.
        ImportError: If workers are asked for without Dask.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval()
        >>> x = torch.rand(1, 1, 5, 5)
        >>> {name: check.share for name, check in verify(trace(model, x), x).items()}
        {'0': 1.0, '1': 1.0}
    """
    terms = terms_of(network, layers, own_bias, scale, dtype, accumulate, memory, values)
    x = check_images(network, images, terms.dtype)
    if names is None:
        names = [image_hash(image) for image in images.reshape(x.shape)]
    empty = {name: LayerCheck(name) for name in terms.layers}
    total: ShownDict[LayerCheck] = ShownDict("Checks of layers", empty)
    for _, checks in verified(network, x, terms, names, report, keep, workers):
        merge(total, checks)
    return total


def verified(
    network: Network,
    images: Tensor,
    terms: Terms,
    names: Sequence[str],
    report: Callable[[float], None] = lambda share: None,
    keep: str | os.PathLike[str] | None = None,
    workers: int | str | None = None,
) -> Iterator[tuple[str, Checks]]:
    """Name and errors of each image as soon as it is finished.

    Kept images come first, the others in any order.

    Args:
        network: Traced network.
        images: Batch.
        terms: The layers to verify, and the arithmetic.
        names: Name of each image. Only equal images have the same name.
        report: Called with the finished share.
        keep: File of finished images.
        workers: Number of processes, or the address of a Dask scheduler.

    Raises:
        BlockingIOError: If another process writes to ``keep``.
    """
    with hold_file(Path(keep)) if keep is not None else nullcontext():
        yield from _verified_in_turn(network, images, terms, names, report, keep, workers)


def _verified_in_turn(
    network: Network,
    images: Tensor,
    terms: Terms,
    names: Sequence[str],
    report: Callable[[float], None],
    keep: str | os.PathLike[str] | None,
    workers: int | str | None,
) -> Iterator[tuple[str, Checks]]:
    """See :func:`verified`."""
    wanted = dict(zip(names, images, strict=True))
    times = Counter(names)  # equal images are computed once
    total = len(wanted)
    record = None
    if keep is not None:
        record = Record(Path(keep), job_of(network, terms), fits(network, terms))
    for name, result in record.results() if record else ():
        if wanted.pop(name, None) is not None:
            checks = {layer: LayerCheck.from_dict(entry) for layer, entry in result.items()}
            yield from [(name, checks)] * times[name]
    done = total - len(wanted)
    report(done / total)
    if not wanted:
        return
    compute = _computed_here if workers is None else partial(_computed_by_workers, workers=workers)
    for name, checks in compute(network, wanted, terms, lambda n: report((done + n) / total)):
        if record:
            record.append(name, {layer: check.to_dict() for layer, check in checks.items()})
        yield from [(name, checks)] * times[name]


def fits(network: Network, terms: Terms) -> Callable[[str, Any], None]:
    """A check of a kept result, for :class:`adjointbackmap.exactness.journal.Record`.

    It takes the name of an image and the JSON of its errors. It raises a ValueError if these cannot
    be errors of the network's layers.
    """
    shapes = {name: network.layer(name).out_shape for name in terms.layers}

    def check(name: str, result: Any) -> None:
        if not isinstance(result, dict) or result.keys() != shapes.keys():
            msg = f"it has other layers than {', '.join(shapes)}"
            raise ValueError(msg)
        for layer, shape in shapes.items():
            LayerCheck.of_image(result[layer], layer, name, shape)

    return check


def merge(total: Checks, checks: Checks) -> None:
    """Add the errors of other images."""
    for name, check in checks.items():
        total.setdefault(name, LayerCheck(name)).merge(check)


def terms_of(
    network: Network,
    layers: str | torch.nn.Module | Sequence[str | torch.nn.Module] | None = None,
    own_bias: bool = False,
    scale: float | str | None = None,
    dtype: torch.dtype | str | None = None,
    accumulate: torch.dtype | str | None = None,
    memory: str | float | int | None = None,
    values: torch.dtype | str | None = None,
) -> Terms:
    """The terms of a verification, with defaults filled in.

    The arguments are those of :func:`verify`.

    Raises:
        ValueError: If a layer does not fit the network.
    """
    check_network(network)
    if layers is None:
        chosen = network.distinct_layers()
    else:
        chosen = [network.layer(name) for name in several(layers)]
    precision = dtype_of(dtype) or network.dtype
    names = tuple(layer.name for layer in chosen)
    sums = dtype_of(accumulate) or precision
    room = None if memory is None else bytes_of(memory)
    measured = dtype_of(values)
    k = default_scale(network) if scale is None else check_scale(scale)
    return Terms(names, own_bias, k, precision, sums, room, measured)


def default_scale(network: Network) -> float:
    """The factor k of a verification: 1/8 as in the study; 1 if gates are not homogeneous."""
    return 1.0 if network.curved else 1 / 8


def job_of(network: Network, terms: Terms) -> dict[str, Any]:
    """The settings that make the results of an image: weights, versions, layers and arithmetic."""
    # only where it is another dtype, so that files of older versions fit
    other = terms.measured != terms.dtype
    of_values = {"values": str(terms.measured).removeprefix("torch.")} if other else {}
    return {
        "adjointbackmap": version("adjointbackmap"),
        "torch": torch.__version__,
        "device": network.device.type,
        "weights sha256": network.weights_hash(),
        "layers": list(terms.layers),
        "own bias": terms.own_bias,
        "k": terms.scale,
        **network.curved_settings,
        "dtype": str(terms.dtype).removeprefix("torch."),
        "accumulate": str(terms.accumulate).removeprefix("torch."),
        **of_values,
    }


def image_hash(image: Tensor) -> str:
    """SHA-256 of an image's numbers.

    For bytes ``(C, H, W)`` it is the hash in :class:`adjointbackmap.data.Images`.

    Example:
        >>> from adjointbackmap import data
        >>> sample = data.sample()[:1]
        >>> image_hash(sample.pixels[0]) == sample.hashes[0]
        True
    """
    numbers = image.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(numbers.view(torch.uint8).numpy().tobytes()).hexdigest()


def _computed_here(
    network: Network, images: dict[str, Tensor], terms: Terms, report: Callable[[float], None]
) -> Iterator[tuple[str, Checks]]:
    """Name and errors of each image, computed in this process.

    Args:
        network: Traced network.
        images: Name of an image -> the image.
        terms: The layers to verify, and the arithmetic.
        report: Called with the number of finished images, which may be fractional.
    """

    def report_within(first: int, count: int, share: float) -> None:
        report(first + share * count)

    done = 0
    for names, batch in _image_batches(network, images, terms):
        within = partial(report_within, done, len(names))
        checks = verify_images(network, batch, names, terms, within)
        yield from zip(names, checks, strict=True)
        done += len(names)


def _computed_by_workers(
    network: Network,
    images: dict[str, Tensor],
    terms: Terms,
    report: Callable[[float], None],
    workers: int | str,
) -> Iterator[tuple[str, Checks]]:
    """Name and errors of each image, computed by workers; see :func:`_computed_here`."""
    from adjointbackmap.exactness.workers import spread_items

    load = partial(unpacked, os.getcwd(), packed(network))
    device = network.device
    done = 0
    items = ((names, batch.cpu()) for names, batch in _image_batches(network, images, terms))
    work = partial(_verified_batch, terms)
    for names, found in spread_items(load, work, items, workers, device.type):
        done += len(names)
        report(done)
        yield from zip(names, found, strict=True)


def _image_batches(network: Network, images: dict[str, Tensor], terms: Terms) -> Iterator[Batch]:
    """Batches of images that are computed together, with their names."""
    program = network.program(terms.dtype)
    names = list(images)
    size = images_per_sweep(program, terms.memory, terms.dtype.itemsize)
    for start in range(0, len(names), size):
        part = names[start : start + size]
        yield part, torch.stack([images[name] for name in part])


def _verified_batch(terms: Terms, network: Network, batch: Batch) -> tuple[list[str], list[Checks]]:
    """Names and errors of a batch, computed by a worker."""
    names, images = batch
    return names, verify_images(network, images.to(network.device), names, terms)


def packed(network: Network) -> bytes:
    """The bytes from which a worker traces the network again.

    A traced network itself cannot be pickled.
    """
    import cloudpickle

    # a worker puts the model on its own GPU
    model = network.model if network.device.type == "cpu" else copy.deepcopy(network.model).cpu()
    example = (network.in_shape, network.dtype, network.device.type)
    ends = (network.until, network.output, network.reading, network.entrance)
    return cloudpickle.dumps((model, *example, *ends))


def unpacked(folder: str, packed: bytes) -> Network:
    """The network in a worker.

    Modules of the user are imported from the folder in which the run was started.
    """
    if folder not in sys.path:
        sys.path.append(folder)
    model, in_shape, dtype, device, until, output, reading, entrance = pickle.loads(packed)
    chosen = {"curved": reading.curved, "products": reading.products}
    example = torch.zeros(1, *in_shape, dtype=dtype, device=device)
    if entrance is not None:
        example = entrance.example
        chosen["after"] = entrance.after
    return trace(model.to(device), example, until, output, audit=False, **chosen)
