"""Pictures of hyperplanes, their spectra and an image's surroundings [Wan2022, 2.5.2.2, 2.5.3]."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adjointbackmap import data, models, plots
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.report.sections import Block, Picture, Section
from adjointbackmap.spectra import RadialProfile
from adjointbackmap.study.pictures.likeness import (
    IMAGES,
    PLANES,
    by_position,
    high_by_layer,
    over_many,
    same_class,
)
from adjointbackmap.study.pictures.panels import captioned, convolutions, draw
from adjointbackmap.study.pictures.surroundings import regions, sparse, sparse_images
from adjointbackmap.study.pictures.tables import (
    claims,
    frequency_table,
    likeness_table,
    region_table,
    sparsity_table,
)
from adjointbackmap.study.results import Arrays, Found, keep, kept
from adjointbackmap.study.setup import SCALE, Setup, Trained, read_json, write_json

KEY = "pictures"
SHOWN = {"cifar10": ("ship", "ship", "frog"), "cifar100": ("apple", "apple", "orange")}
SPECTRA_FIGURES = ("Fig. 2.8", "Fig. 2.9", "Fig. 2.10")


def compute(setup: Setup, report: Callable[[str, float], None]) -> None:
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
        settings = {
            **trained.about,
            "scale": SCALE,
            "images": list(shown.hashes),
            "many": list(many.hashes),
        }
        report(f"{name}: pictures", 0.0)
        keep(path, settings, partial(measured, trained, shown, many, path.parent))
        around = {
            "regions": regions(
                trained,
                many,
                path.parent,
                partial(report, f"{name}: kinks and boundaries"),
            ),
            "sparsity": sparse(
                trained,
                shown[: sparse_images(trained)],
                path.parent,
                partial(report, f"{name}: sparsity"),
            ),
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
    words = SHOWN[models.card(name)["dataset"]]
    places: list[int] = []
    for n, wanted in enumerate(words):
        found = trained.known_by_all(wanted)
        earlier = words[:n].count(wanted)
        if len(found) <= earlier:
            msg = f"There must be {words.count(wanted)} test images of a {wanted} that every shipped network knows. "
            msg += f"Got {len(found)}: use other images with --data."
            raise ValueError(msg)
        places.append(trained.images.hashes.index(found.hashes[earlier]))
    return trained.images[places]


def measured(
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
    found = {
        "classes": [shown.classes[label] for label in shown.labels.tolist()],
        "same class": same_class(shown, planes),
        "positions": [
            by_position(trained, x[:1], layer) for layer in (layers[1], layers[len(layers) // 2])
        ],
        "high by layer": high_by_layer(trained, x),
        "many": spectra,
        "pictures": list(draw(trained, shown, planes, folder)),
    }
    own = planes.image[torch.arange(len(x)), shown.labels]
    return found, {"pixels": shown.unit_interval().numpy(), "planes": own.numpy(), **arrays}


def section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw the spectra into the folder.

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
    blocks: list[Block] = [
        *(claim for name, found in networks.items() for claim in claims(name, found))
    ]
    blocks += [likeness_table(networks), frequency_table(networks), region_table(networks)]
    blocks += [sparsity_table(name, found) for name, found in networks.items()]
    blocks += _spectra(folder, networks, arrays)
    blocks.append(_by_layer(folder, networks))
    for found in networks.values():
        blocks += [
            Picture(Path(KEY) / p["file"], p["caption"], p["published"]) for p in found["pictures"]
        ]
    return Section(
        KEY,
        "Hyperplanes in pictures, their spectra, and what surrounds an image",
        tuple(_ran(networks)),
        tuple(blocks),
    )


def _ran(networks: dict[str, Found]) -> Iterator[str]:
    yield (
        "Hyperplanes are those of the folded networks in their own input, pixels in [0, 1] or "
        f"normalised ones, at the pattern of {SCALE:g} [x; b], in float32. Grids of hyperplanes "
        "are of the first image: the second convolution and the one after the middle; the "
        "channel in RM2 is the one with the largest RM1 value."
    )
    for name, found in networks.items():
        settings = found["settings"]
        images = ", ".join(
            f"{c} {h[:8]}" for c, h in zip(found["classes"], settings["images"], strict=True)
        )
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
    return float(np.median([found["seconds"] for found in images.values()]))


def _spectra(
    folder: Path,
    networks: dict[str, Found],
    arrays: dict[str, Arrays],
) -> Iterator[Picture]:
    """Spectra of each image and of the hyperplanes, and radial profiles.

    Networks with the same images share a picture.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, found in networks.items():
        groups.setdefault(tuple(found["settings"]["images"]), []).append(name)
    for g, (hashes, names) in enumerate(groups.items()):
        classes = networks[names[0]]["classes"]
        of_study = any(name.endswith("cifar10") for name in names)
        for n, (word, hashed) in enumerate(zip(classes, hashes, strict=True)):
            maps = {
                "image": arrays[names[0]]["pixels"][n],
                **{name: arrays[name]["planes"][n] for name in names},
            }
            heading = f"Spectra of {word} {hashed[:8]} and of the hyperplanes of its class"
            drawing = plots.spectra(
                {key: torch.from_numpy(part) for key, part in maps.items()},
                heading,
            )
            yield _saved(
                folder,
                f"spectra-{g}-{n}",
                drawing,
                SPECTRA_FIGURES[n] if of_study else "",
            )
        lines = {
            f"images ({names[0]})": (names[0], IMAGES),
            **{f"hyperplanes, {name}": (name, PLANES) for name in names},
        }
        profiles = {
            heading: RadialProfile(
                *(torch.from_numpy(arrays[name][key]) for key in ("frequency", f"profile of {of}"))
            )
            for heading, (name, of) in lines.items()
        }
        drawing = plots.radial_profiles(
            profiles,
            "Energy by frequency: many images, and the hyperplanes of their classes",
        )
        yield _saved(folder, f"profiles-{g}", drawing)


def _by_layer(folder: Path, networks: dict[str, Found]) -> Picture:
    """Share of high frequencies of RM1 per layer: median and quartiles over channels and images."""
    values = {
        name: {
            layer: _quartiles(shares) for layer, shares in found["high by layer"].items() if shares
        }
        for name, found in networks.items()
    }
    heading = (
        "RM1 hyperplanes of the pictures' images: median and quartiles over channels and images"
    )
    drawing = plots.by_layer(values, heading, "share of the energy above 0.25 cycles per pixel")
    return _saved(folder, "high-by-layer", drawing)


def _quartiles(shares: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75)).tolist()
    return middle, low, high


def _saved(folder: Path, stem: str, drawing: plots.Drawing, published: str = "") -> Picture:
    path = plots.save(drawing, folder / KEY / f"{stem}.png", formats=("png", "svg"))
    return Picture(path.relative_to(folder), captioned(drawing), published)
