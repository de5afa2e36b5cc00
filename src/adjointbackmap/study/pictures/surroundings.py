"""What is around many images, and what a few of them use: kinks, class boundaries and sparsity, image by image."""

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

Report = Callable[[float], None]


def sparse_images(trained: Trained) -> int:
    """How many images the sparsity of a network is told of: minutes each.

    Args:
        trained: The network.
    """
    return 1 if "resnet20" in trained.name else 3


def regions(trained: Trained, images: data.Images, folder: Path, report: Report) -> dict[str, Any]:
    """Nearest kink and nearest class boundary of each image in pixels, in float64; finished images stay.

    Args:
        trained: The network.
        images: Images that it classifies correctly.
        folder: Of the record.
        report: Called with the share that is done.

    Returns:
        Hash of an image -> its seconds, and by norm what :func:`beside` tells.
    """
    network = None

    def one(image: data.Images) -> dict[str, Any]:
        nonlocal network
        network = network or trained.subject.trace_in_pixels()  # takes seconds: only where an image is missing
        return beside(analyse(network, image.unit_interval().double(), most=1))

    return _recorded(trained, "regions", images, folder, one, report)


def beside(found: Analysis) -> dict[str, Any]:
    """By norm: distances to the nearest kink and boundary, whether the latter lies in the region, and what is behind it.

    Args:
        found: What is beside one image.

    Returns:
        ``"kink"``, ``"boundary"``: distances, ``None`` where none can be reached; ``"ends region"``: whether the region ends at
        the kink, as steps confirm; ``"in region"``; ``"changes"``: whether the network prefers the other class just after.
    """
    told: dict[str, Any] = {}
    for norm in NORMS:
        kink, nearest = found.kinks.get(norm), next(iter(found.boundaries[norm]), None)
        told[norm] = {
            "kink": kink.distance if kink else None,
            "ends region": bool(kink and kink.ends_region),
            "boundary": nearest.distance if nearest else None,
            "in region": bool(nearest and nearest.in_region),
            "changes": bool(nearest and nearest.plane.margin(nearest.after) < 0),
        }
    return told


def sparse(trained: Trained, images: data.Images, folder: Path, report: Report) -> dict[str, Any]:
    """Counts of the RM4 hyperplanes of every convolution at each image [Wan2022, section 2.5.3]; finished images stay.

    Args:
        trained: The network.
        images: A few images.
        folder: Of the record.
        report: Called with the share that is done.

    Returns:
        Hash of an image -> its seconds, and by layer the counts of :class:`adjointbackmap.analysis.fields.Sparsity`.
    """

    def one(image: data.Images) -> dict[str, Any]:
        found = sparsity(trained.network, trained.input(image.unit_interval()))
        return {layer: asdict(counts) for layer, counts in found.items()}

    return _recorded(trained, "sparsity", images, folder, one, report)


def merged(images: Sequence[dict[str, Any]]) -> dict[str, Sparsity]:
    """Counts of several images together, by layer.

    Args:
        images: What :func:`sparse` found for each.
    """
    total: dict[str, Sparsity] = {}
    for found in images:
        for layer, counts in found["found"].items():
            total.setdefault(layer, Sparsity(layer)).merge(Sparsity(**counts))
    return total


def _recorded(
    trained: Trained, what: str, images: data.Images, folder: Path, one: Callable[[data.Images], Any], report: Report
) -> dict[str, Any]:
    """What is found for each image, from a file of these weights; what is missing is computed and kept."""
    about = trained.about
    record = Record(folder / f"{trained.name}-{what}-{about['weights sha256'][:8]}.jsonl", {**about, "what": what})
    for n, hashed in enumerate(images.hashes):
        report(n / len(images))
        if hashed not in record.names:
            started = time.process_time()
            found = one(images[n])
            record.append(hashed, {"seconds": round(time.process_time() - started, 2), "found": found})
    kept = dict(record.results())
    return {hashed: kept[hashed] for hashed in images.hashes}
