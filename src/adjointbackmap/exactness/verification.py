"""Verification of many images: finished images are kept in a file, and several workers share the rest."""

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

from adjointbackmap.engine.network import Network, check_network, several
from adjointbackmap.engine.pattern import check_images, check_scale, dtype_of
from adjointbackmap.engine.sweep import images_at_once
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
    scale: float | str = 1 / 8,
    dtype: torch.dtype | str | None = None,
    report: Callable[[float], None] = lambda share: None,
    *,
    accumulate: torch.dtype | str | None = None,
    names: Sequence[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    workers: int | str | None = None,
    memory: str | float | int | None = None,
) -> Checks:
    r"""Hold every unit of every layer against its explicit hyperplane, [Wan2022, eqs. 3.27-3.29].

    Every column of the hyperplanes is computed by a unit tangent of [x; b], and the inner products are
    summed from these: never the network's own arithmetic over again.

    Args:
        network: Traced network.
        images: Image or batch.
        layers: Names of layers; by default every layer but those that give what another gives.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the pattern.
        dtype: ``torch.float64`` for more than the model's own precision.
        report: Called with the share that is done.
        accumulate: ``torch.float64`` for inner products that are summed in it, of hyperplanes in ``dtype``.
        names: Name of each image, such as ``Images.hashes``; by default the SHA-256 of its numbers, see :func:`image_hash`.
        keep: File of finished images, see :class:`adjointbackmap.exactness.journal.Record`: those that it has are
            taken from it, each other one is written to it when it is finished.
        workers: How many processes on this machine share the images, or the address of a Dask scheduler such as
            ``tcp://10.0.0.1:8786``; by default this process alone computes.
        memory: Bytes that a batch of tangents may take in each process, such as ``"64MiB"``; by
            default the batch is the one that is fast.

    Returns:
        Name of a layer -> its errors.

    Raises:
        ValueError: If a layer or the images do not fit the network, or ``keep`` is the file of another job.
        OSError: If another process writes to ``keep``, or its disk is full: finished images stay.
        ImportError: If workers are asked for without Dask.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval()
        >>> x = torch.rand(1, 1, 5, 5)
        >>> {name: check.share for name, check in verify(trace(model, x), x).items()}
        {'0': 1.0, '1': 1.0}
    """
    terms = terms_of(network, layers, own_bias, scale, dtype, accumulate, memory)
    x = check_images(network, images, terms.dtype)
    if names is None:
        names = [image_hash(image) for image in images.reshape(x.shape)]
    total: Checks = {name: LayerCheck(name) for name in terms.layers}
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
    """Name and errors of each image as soon as it is finished: the kept ones first, the others in any order.

    Args:
        network: Traced network.
        images: Batch.
        terms: What is verified.
        names: Name of each image; equal images alone have the same.
        report: Called with the share that is done.
        keep: File of finished images.
        workers: How many processes, or the address of a Dask scheduler.

    Raises:
        BlockingIOError: If another process writes to ``keep``.
    """
    with hold_file(Path(keep)) if keep is not None else nullcontext():
        yield from _verified(network, images, terms, names, report, keep, workers)


def _verified(
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
    times = Counter(names)
    total = len(wanted)
    record = (
        Record(Path(keep), job_of(network, terms), fits(network, terms))
        if keep is not None
        else None
    )
    for name, result in record.results() if record else ():
        if wanted.pop(name, None) is not None:
            yield from [
                (name, {layer: LayerCheck.from_dict(entry) for layer, entry in result.items()})
            ] * times[name]
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
    """What raises a ValueError where the kept errors of an image, name and JSON, cannot be those of the network's layers."""
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
    scale: float | str = 1 / 8,
    dtype: torch.dtype | str | None = None,
    accumulate: torch.dtype | str | None = None,
    memory: str | float | int | None = None,
) -> Terms:
    """What is verified, with what is left out filled in; the arguments are those of :func:`verify`.

    Raises:
        ValueError: If a layer does not fit the network.
    """
    check_network(network)
    chosen = (
        network.distinct_layers()
        if layers is None
        else [network.layer(name) for name in several(layers)]
    )
    precision = dtype_of(dtype) or network.dtype
    names = tuple(layer.name for layer in chosen)
    sums = dtype_of(accumulate) or precision
    room = None if memory is None else bytes_of(memory)
    return Terms(names, own_bias, check_scale(scale), precision, sums, room)


def job_of(network: Network, terms: Terms) -> dict[str, Any]:
    """What makes the results of an image: weights, versions, layers and arithmetic."""
    return {
        "adjointbackmap": version("adjointbackmap"),
        "torch": torch.__version__,
        "device": network.device.type,
        "weights sha256": network.weights_hash(),
        "layers": list(terms.layers),
        "own bias": terms.own_bias,
        "k": terms.scale,
        "dtype": str(terms.dtype).removeprefix("torch."),
        "accumulate": str(terms.accumulate).removeprefix("torch."),
    }


def image_hash(image: Tensor) -> str:
    """SHA-256 of an image's numbers: for bytes ``(C, H, W)`` that of :class:`adjointbackmap.data.Images`.

    Example:
        >>> from adjointbackmap import data
        >>> sample = data.sample()[:1]
        >>> image_hash(sample.pixels[0]) == sample.hashes[0]
        True
    """
    return hashlib.sha256(
        image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def _computed_here(
    network: Network, images: dict[str, Tensor], terms: Terms, report: Callable[[float], None]
) -> Iterator[tuple[str, Checks]]:
    def tell(first: int, count: int, share: float) -> None:
        report(first + share * count)

    done = 0
    for names, batch in _batches(network, images, terms):
        yield from zip(
            names,
            verify_images(network, batch, names, terms, partial(tell, done, len(names))),
            strict=True,
        )
        done += len(names)


def _computed_by_workers(
    network: Network,
    images: dict[str, Tensor],
    terms: Terms,
    report: Callable[[float], None],
    workers: int | str,
) -> Iterator[tuple[str, Checks]]:
    from adjointbackmap.exactness.workers import spread

    load = partial(_loaded, os.getcwd(), _packed(network))
    device = network.device
    done = 0
    items = ((names, batch.cpu()) for names, batch in _batches(network, images, terms))
    for names, found in spread(load, partial(_verified_batch, terms), items, workers, device.type):
        done += len(names)
        report(done)
        yield from zip(names, found, strict=True)


def _batches(network: Network, images: dict[str, Tensor], terms: Terms) -> Iterator[Batch]:
    """Names and images that are computed at once."""
    program = network.program(terms.dtype)
    names = list(images)
    size = images_at_once(program, terms.memory, terms.dtype.itemsize)
    for start in range(0, len(names), size):
        part = names[start : start + size]
        yield part, torch.stack([images[name] for name in part])


def _verified_batch(terms: Terms, network: Network, batch: Batch) -> tuple[list[str], list[Checks]]:
    names, images = batch
    return names, verify_images(network, images.to(network.device), names, terms)


def _packed(network: Network) -> bytes:
    """What another process traces again: a traced network itself cannot be pickled."""
    import cloudpickle

    model = network.model if network.device.type == "cpu" else copy.deepcopy(network.model).cpu()
    return cloudpickle.dumps(
        (model, network.in_shape, network.dtype, network.device.type, network.until, network.output)
    )


def _loaded(folder: str, packed: bytes) -> Network:
    """The network in a worker; modules of the user are looked for in the folder that the run was started in."""
    if folder not in sys.path:
        sys.path.append(folder)
    model, in_shape, dtype, device, until, output = pickle.loads(packed)
    example = torch.zeros(1, *in_shape, dtype=dtype, device=device)
    return trace(model.to(device), example, until, output, audit=False)
