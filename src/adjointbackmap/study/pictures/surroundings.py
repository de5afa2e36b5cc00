"""Kinks, class boundaries and sparsity, computed and recorded for each image."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adjointbackmap import data
from adjointbackmap.analysis.boundaries import Analysis, analyse
from adjointbackmap.analysis.crossings import NORMS
from adjointbackmap.analysis.fields import Sparsity, sparsity
from adjointbackmap.exactness.journal import Record
from adjointbackmap.study.setup import Trained

ShareReport = Callable[[float], None]


def sparse_images(trained: Trained) -> int:
    """Number of images for the sparsity of a network. Each image takes minutes.

    Args:
        trained: The network.
    """
    return 1 if "resnet20" in trained.name else 3


def regions(
    trained: Trained, images: data.Images, folder: Path, report: ShareReport
) -> dict[str, Any]:
    """Nearest kink and nearest class boundary of each image in pixels, in float64.

    Images in the record are not computed again.

    Args:
        trained: The network.
        images: Images that it classifies correctly.
        folder: Folder of the record.
        report: Called with the finished share.

    Returns:
        Hash of an image -> its seconds, and the result of :func:`beside`.
    """
    network = None

    def one(image: data.Images) -> dict[str, Any]:
        nonlocal network
        # Tracing takes seconds, so it is done only if an image is missing.
        network = network or trained.subject.trace_in_pixels()
        return beside(analyse(network, image.unit_interval().double(), most=1))

    return _recorded(trained, "regions", images, folder, one, report)


def beside(found: Analysis) -> dict[str, Any]:
    """The nearest kink and the nearest class boundary of one image, for each norm.

    Args:
        found: Analysis of one image.

    Returns:
        For each norm: ``"kink"`` and ``"boundary"`` are distances, or ``None`` if none can be
        reached. ``"ends region"`` is whether the region ends at the kink, as confirmed by a step
        to either side. ``"in region"`` is whether the boundary lies in the region. ``"changes"``
        is whether the network prefers the other class just behind the boundary.
    """
    result: dict[str, Any] = {}
    for norm in NORMS:
        kink = found.kinks.get(norm)
        nearest = next(iter(found.boundaries[norm]), None)
        result[norm] = {
            "kink": kink.distance if kink else None,
            "ends region": bool(kink and kink.ends_region),
            "boundary": nearest.distance if nearest else None,
            "in region": bool(nearest and nearest.in_region),
            "changes": bool(nearest and nearest.plane.margin(nearest.after) < 0),
        }
    return result


def sparse(
    trained: Trained, images: data.Images, folder: Path, report: ShareReport
) -> dict[str, Any]:
    """Counts of the RM4 hyperplanes of every convolution at each image [Wan2022, section 2.5.3].

    Images in the record are not computed again.

    Args:
        trained: The network.
        images: A few images.
        folder: Folder of the record.
        report: Called with the finished share.

    Returns:
        Hash of an image -> its seconds, and for each layer the counts of
        :class:`adjointbackmap.analysis.fields.Sparsity`.
    """

    def one(image: data.Images) -> dict[str, Any]:
        found = sparsity(trained.network, trained.input(image.unit_interval()))
        return {layer: asdict(counts) for layer, counts in found.items()}

    return _recorded(trained, "sparsity", images, folder, one, report)


def merged(images: Sequence[dict[str, Any]]) -> dict[str, Sparsity]:
    """Sum the counts of several images, for each layer.

    Args:
        images: Result of :func:`sparse` for each image.
    """
    total: dict[str, Sparsity] = {}
    for found in images:
        for layer, counts in found["found"].items():
            total.setdefault(layer, Sparsity(layer)).merge(Sparsity(**counts))
    return total


def _recorded(
    trained: Trained,
    what: str,
    images: data.Images,
    folder: Path,
    one: Callable[[data.Images], Any],
    report: ShareReport,
) -> dict[str, Any]:
    """The result of ``one`` for each image.

    Results are read from the record of these weights. Missing ones are computed and recorded.
    """
    about = trained.about
    path = folder / f"{trained.name}-{what}-{about['weights sha256'][:8]}.jsonl"
    record = Record(path, {**about, "what": what})
    for n, hashed in enumerate(images.hashes):
        report(n / len(images))
        if hashed not in record.names:
            started = time.process_time()
            found = one(images[n])
            seconds = round(time.process_time() - started, 2)
            record.append(hashed, {"seconds": seconds, "found": found})
    kept = dict(record.results())
    return {hashed: kept[hashed] for hashed in images.hashes}
