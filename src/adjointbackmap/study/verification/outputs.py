"""Verification of fully connected layers, many images at once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from adjointbackmap.engine.network import Network
from adjointbackmap.exactness.checks import Terms
from adjointbackmap.exactness.journal import Record
from adjointbackmap.exactness.layer_check import LayerCheck, checks_of
from adjointbackmap.exactness.verification import Checks, fits, job_of
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.study.verification.summation import BATCH, products


def outputs_verified(
    network: Network,
    x: Tensor,
    terms: Terms,
    names: Sequence[str],
    report: Callable[[float], None],
    keep: Path,
) -> Iterator[tuple[str, Checks]]:
    """Yield the name and the errors of each image for fully connected layers.

    Their RM0 hyperplanes are computed for many images at once.

    Args:
        network: Traced network.
        x: Batch.
        terms: What is verified.
        names: Name of each image.
        report: Called with the finished share.
        keep: File of finished images.
    """
    record = Record(keep, {**job_of(network, terms), "mode": "RM0"}, fits(network, terms))
    kept = {}
    for name, found in record.results():
        kept[name] = {layer: LayerCheck.from_dict(entry) for layer, entry in found.items()}
    yield from ((name, kept[name]) for name in names if name in kept)
    missing = [n for n, name in enumerate(names) if name not in kept]
    for start in range(0, len(missing), BATCH):
        report(1 - (len(missing) - start) / len(names))
        part = missing[start : start + BATCH]
        for name, checks in _outputs(network, x[part], terms, [names[n] for n in part]):
            record.append(name, {layer: check.to_dict() for layer, check in checks.items()})
            yield name, checks
    report(1.0)


def _outputs(
    network: Network,
    x: Tensor,
    terms: Terms,
    names: Sequence[str],
) -> list[tuple[str, Checks]]:
    """Names and errors of the images of a batch."""
    found: list[tuple[str, Checks]] = [(name, {}) for name in names]
    for layer in terms.layers:
        options = (terms.own_bias, terms.scale, terms.dtype)
        planes = hyperplanes(network, x, layer, "RM0", None, *options)
        parts = products(planes, terms.accumulate)
        sums = parts.sum(-1)
        magnitudes = parts.abs().sum(-1)
        of_images = checks_of(layer, planes.value, sums, magnitudes, names)
        for (_, checks), check in zip(found, of_images, strict=True):
            checks[layer] = check
    return found
