"""Pictures of hyperplanes, their spectra and an image's surroundings [Wan2022, 2.5.2.2, 2.5.3]."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adjointbackmap import data, models
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.report.sections import Picture, ReportBlock, Section
from adjointbackmap.study.pictures.charts import draw_charts
from adjointbackmap.study.pictures.likeness import (
    by_position,
    high_by_layer,
    over_many,
    same_class,
)
from adjointbackmap.study.pictures.panels import convolutions, draw_panels
from adjointbackmap.study.pictures.surroundings import regions, sparse, sparse_images
from adjointbackmap.study.pictures.tables import (
    frequency_table,
    likeness_table,
    picture_claims,
    region_table,
    sparsity_table,
)
from adjointbackmap.study.results import Arrays, Found, keep, kept
from adjointbackmap.study.setup import SCALE, Setup, Trained, read_json, write_json

KEY = "pictures"
# Classes of the images in the pictures, two of the same class first [Wan2022, Figs. 2.6-2.10].
SHOWN_CLASSES = {"cifar10": ("ship", "ship", "frog"), "cifar100": ("apple", "apple", "orange")}


def compute_pictures(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Draw and measure every network of a run.

    A network is skipped if the folder has its results for the same weights, images and settings.

    Args:
        setup: Networks, images and folder.
        report: Called with what is computed and the share that is done.
    """
    for name in setup.networks:
        trained = setup.trained(name)
        shown = shown_images(setup, name)
        many = setup.many(name)
        path = setup.folder / KEY / f"{name}.json"
        hashes = {"images": list(shown.hashes), "many": list(many.hashes)}
        settings = {**trained.about, "scale": SCALE, **hashes}
        report(f"{name}: pictures", 0.0)
        keep(path, settings, partial(measure_pictures, trained, shown, many, path.parent))
        of_regions = partial(report, f"{name}: kinks and boundaries")
        of_sparsity = partial(report, f"{name}: sparsity")
        few = shown[: sparse_images(trained)]
        around = {
            "regions": regions(trained, many, path.parent, of_regions),
            "sparsity": sparse(trained, few, path.parent, of_sparsity),
        }
        write_json(path, read_json(path) | around)
    report("pictures", 1.0)


def shown_images(setup: Setup, name: str) -> data.Images:
    """The images of the pictures.

    They are the first images by hash of certain classes. Only images that all shipped networks with
    these classes classify correctly are used.

    Args:
        setup: The run.
        name: A network.

    Raises:
        ValueError: If a class has too few such images.
    """
    trained = setup.trained(name)
    words = SHOWN_CLASSES[models.card(name)["dataset"]]
    places: list[int] = []
    for n, wanted in enumerate(words):
        found = trained.known_by_all(wanted)
        earlier = words[:n].count(wanted)
        if len(found) <= earlier:
            msg = (
                f"There must be {words.count(wanted)} test images of a {wanted} "
                "that every shipped network knows. "
                f"Got {len(found)}: use other images with --data."
            )
            raise ValueError(msg)
        places.append(trained.images.hashes.index(found.hashes[earlier]))
    return trained.images[places]


def measure_pictures(
    trained: Trained,
    shown: data.Images,
    many: data.Images,
    folder: Path,
) -> tuple[Found, Arrays]:
    """Compute the numbers of one network, and the arrays that the section draws later.

    Pictures of hyperplanes are drawn immediately.

    Args:
        trained: The network.
        shown: The images of the pictures.
        many: The images for the spectra over many images.
        folder: Folder for the pictures.
    """
    x = trained.input(shown.unit_interval())
    planes = hyperplanes(trained.network, x, "fc", "RM0", scale=SCALE)
    spectra, arrays = over_many(trained, many)
    layers = [layer.name for layer in convolutions(trained.network)]
    early_and_middle = (layers[1], layers[len(layers) // 2])
    found = {
        "classes": [shown.classes[label] for label in shown.labels.tolist()],
        "same class": same_class(shown, planes),
        "positions": [by_position(trained, x[:1], layer) for layer in early_and_middle],
        "high by layer": high_by_layer(trained, x),
        "many": spectra,
        "pictures": list(draw_panels(trained, shown, planes, folder)),
    }
    own = planes.image[torch.arange(len(x)), shown.labels]
    return found, {"pixels": shown.unit_interval().numpy(), "planes": own.numpy(), **arrays}


def pictures_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw the charts into the folder.

    Args:
        folder: Folder of the results.

    Returns:
        The section, or ``None`` if there are no results.
    """
    # The key "sparsity" is written last: without it the run was stopped.
    results = [result for result in kept(folder / KEY) if "sparsity" in result[1]]
    if not results:
        return None
    networks = {name: found for name, found, _ in results}
    arrays = {name: shown for name, _, shown in results}
    blocks: list[ReportBlock] = []
    for name, found in networks.items():
        blocks += picture_claims(name, found)
    blocks += [likeness_table(networks), frequency_table(networks), region_table(networks)]
    blocks += [sparsity_table(name, found) for name, found in networks.items()]
    blocks += draw_charts(folder, networks, arrays, KEY)
    for found in networks.values():
        for shown in found["pictures"]:
            path = Path(KEY) / shown["file"]
            heading = shown.get("title", "")
            blocks.append(Picture(path, shown["caption"], shown["published"], heading))
    title = "Hyperplanes in pictures, their spectra, and what surrounds an image"
    return Section(KEY, title, tuple(_ran(networks)), tuple(blocks))


def _ran(networks: dict[str, Found]) -> Iterator[str]:
    """What was run, in words."""
    yield (
        "Hyperplanes are those of the folded networks in their own input, pixels in [0, 1] or "
        f"normalised ones, at the pattern of {SCALE:g} [x; b], in float32. Grids of hyperplanes "
        "are of the first and the last image: the second convolution and the one after the middle; "
        "the channel in RM2 is the one with the largest RM1 value."
    )
    for name, found in networks.items():
        settings = found["settings"]
        pairs = zip(found["classes"], settings["images"], strict=True)
        images = ", ".join(f"{word} {hashed[:8]}" for word, hashed in pairs)
        beyond = " CIFAR-100 is beyond the study's pictures." if name.endswith("cifar100") else ""
        yield (
            f"{name}: {images}, the first of their classes by hash that every shipped network of "
            f"these classes classifies correctly. Spectra over many: {len(settings['many'])} "
            "images that it classifies correctly, drawn with the run's seed; kinks and "
            f"boundaries of {len(found['regions'])} of these in pixels, in float64, "
            f"{_seconds(found['regions']):.3g} s of processor time each; sparsity of "
            f"{len(found['sparsity'])} of the pictures' images, {_seconds(found['sparsity']):.3g} "
            f"s each.{beyond}"
        )


def _seconds(images: dict[str, Any]) -> float:
    """Median processor time of an image."""
    return float(np.median([found["seconds"] for found in images.values()]))
