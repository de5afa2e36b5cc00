"""Charts of spectra, sparsity and distances, drawn from the kept numbers of all networks."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adjointbackmap import plots
from adjointbackmap.plots.groups import Interval
from adjointbackmap.report.sections import Picture
from adjointbackmap.spectra import RadialProfile, radial_energy
from adjointbackmap.study.charts import interval_rows
from adjointbackmap.study.pictures.likeness import IMAGES, PLANES
from adjointbackmap.study.pictures.panels import captioned
from adjointbackmap.study.pictures.surroundings import merged
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.results import Arrays, Found, save_picture

SPECTRA_FIGURES = ("Fig. 2.8", "Fig. 2.9", "Fig. 2.10")
Saved = Callable[..., Picture]


def draw_charts(
    folder: Path,
    networks: dict[str, Found],
    arrays: dict[str, Arrays],
    key: str,
) -> Iterator[Picture]:
    """Draw all charts into the folder of the results.

    Args:
        folder: Folder of the results.
        networks: Numbers of each network.
        arrays: Arrays of each network.
        key: Folder of the pictures in it.
    """

    def saved(stem: str, drawing: plots.Drawing, published: str = "") -> Picture:
        return save_picture(folder, f"{key}/{stem}", drawing, captioned(drawing), published)

    yield from _spectra(saved, networks, arrays)
    yield _by_layer(saved, networks)
    yield from _sparsity(saved, networks)
    yield _distances(saved, networks)


def _spectra(
    saved: Saved,
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
        first = names[0]
        of_study = any(name.endswith("cifar10") for name in names)
        for n, (word, hashed) in enumerate(zip(networks[first]["classes"], hashes, strict=True)):
            maps = {"image": torch.from_numpy(arrays[first]["pixels"][n])}
            maps |= {name: torch.from_numpy(arrays[name]["planes"][n]) for name in names}
            heading = f"Spectra of {word} {hashed[:8]} and of the hyperplanes of its class"
            published = SPECTRA_FIGURES[n] if of_study else ""
            yield saved(f"spectra-{g}-{n}", plots.spectra(maps, heading), published)
        profiles = {f"images ({first})": _profile(arrays[first], IMAGES)}
        profiles |= {f"hyperplanes, {name}": _profile(arrays[name], PLANES) for name in names}
        profiles["white noise"] = _white_noise(arrays[first]["pixels"].shape[-1])
        title = "Energy by frequency: many images, and the hyperplanes of their classes"
        yield saved(f"profiles-{g}", plots.radial_profiles(profiles, title))


def _profile(arrays: Arrays, of: str) -> RadialProfile:
    """The kept radial profile of the images or of the hyperplanes."""
    frequency = torch.from_numpy(arrays["frequency"])
    return RadialProfile(frequency, torch.from_numpy(arrays[f"profile of {of}"]))


@cache
def _white_noise(extent: int) -> RadialProfile:
    """Expected profile of white noise: the same energy at every frequency but DC."""
    single = torch.zeros(1, extent, extent)
    single[0, 0, 0] = 1.0  # one pixel has the same amplitude at every frequency
    return radial_energy(single)


def _by_layer(saved: Saved, networks: dict[str, Found]) -> Picture:
    """Share of high frequencies of RM1 per layer: median and quartiles over channels and images."""
    values = {}
    for name, found in networks.items():
        shares = found["high by layer"]
        values[name] = {layer: _quartiles(of) for layer, of in shares.items() if of}
    over = "median and quartiles over channels and images"
    heading = f"RM1 hyperplanes of the pictures' images: {over}"
    drawing = plots.by_layer(values, heading, "share of the energy above 0.25 cycles per pixel")
    return saved("high-by-layer", drawing)


def _quartiles(shares: list[float]) -> Interval:
    """Median, lower and upper quartile."""
    low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75)).tolist()
    return middle, low, high


def _sparsity(saved: Saved, networks: dict[str, Found]) -> Iterator[Picture]:
    """By layer: hyperplanes that are zero, and those that use their whole receptive field."""
    # The deepest network comes first: it sets the order of the layers on the axis.
    deepest = sorted(networks, key=lambda name: -len(networks[name]["high by layer"]))
    kinds = {"zero": "zero_share", "whole": "full_share"}
    titles = {
        "zero": "RM4 hyperplanes that are zero everywhere",
        "whole": "RM4 hyperplanes that use their whole receptive field",
    }
    for kind, attribute in kinds.items():
        values = {}
        for name in (n for n in deepest if n.endswith("cifar10")):
            layers = merged(list(networks[name]["sparsity"].values()))
            values[name] = {of: 100 * getattr(found, attribute) for of, found in layers.items()}
        if values:
            quantity = "% of a layer's RM4 hyperplanes"
            yield saved(f"sparsity-{kind}", plots.by_layer(values, titles[kind], quantity))


def _distances(saved: Saved, networks: dict[str, Found]) -> Picture:
    """How far the nearest kink and the nearest class boundary are."""
    names = {"kink": "nearest kink", "boundary": "nearest class boundary"}
    values: dict[str, dict[str, Interval]] = {words: {} for words in names.values()}
    for name, found in networks.items():
        near = [image["found"]["l2"] for image in found["regions"].values()]
        for key, words in names.items():
            values[words] |= _interval(name, [each[key] for each in near if each[key]])
    title = "How far an image is from the end of its linear region, and from another class"
    quantity = "Euclidean distance in pixels from 0 to 1"
    interval = "where nine in ten images lie"
    return saved("distances", interval_rows(values, title, quantity, interval, log=True))


def _interval(name: str, numbers: list[Any]) -> dict[str, Interval]:
    """Median, 5 % and 95 % quantile; empty without numbers."""
    if not numbers:
        return {}
    found = Quantiles.of(numbers)
    return {name: (found.median, found.low, found.high)}
