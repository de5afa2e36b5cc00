"""The claims of [Wan2022, section 2.5.3] with measured numbers, and the tables of the pictures."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from adjointbackmap.report.sections import Claim, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.spectra import high_share
from adjointbackmap.study.pictures.likeness import IMAGES, PLANES
from adjointbackmap.study.pictures.surroundings import merged
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.results import Found

# Degrees. Two vectors of equal length at this angle are about half their length apart.
ALIKE = 30.0
EXTENT = 32  # rows and columns of an image
POSITION_LAYERS = ("the second convolution", "a convolution in the middle")


def picture_claims(name: str, found: Found) -> Iterator[Claim]:
    """The claims of section 2.5.3 and one of our own, each with the measured numbers.

    Args:
        name: The network.
        found: Its results.
    """
    same = found["same class"]
    spectra = found["many"]
    layers = found["high by layer"]
    names = list(layers)
    first, last = (float(np.median(layers[layer])) for layer in (names[1], names[-1]))
    shares = {of: 100 * np.median(spectra["high"][of]) for of in (PLANES, IMAGES)}
    yield Claim(
        "The hyperplanes of a class at two of its images differ significantly "
        f"(read: by more than {ALIKE:g} degrees).",
        f"the two images of the class {same['class']}: {_change(same['image'])}; pairs of one "
        f"class among {len(spectra['high'][IMAGES])} images: "
        f"{Quantiles(**spectra['angles']['one class'])} degrees",
        same["image"]["angle"] > ALIKE,
        "seen in Figs. 2.6 and 2.7",
        name,
    )
    yield Claim(
        "Hyperplanes have stronger amplitudes at high frequencies than images (read: a "
        "larger share of the energy above 0.25 cycles per pixel, for 95 % of the images).",
        f"larger for {100 * higher(spectra):.1f} % of {len(spectra['high'][IMAGES])} images; "
        f"median {shares[PLANES]:.3g} % beside {shares[IMAGES]:.3g} %",
        higher(spectra) >= 0.95,
        "seen in Figs. 2.8 to 2.10",
        name,
    )
    yield Claim(
        "RM1 turns from shapes to irregular pixels as the layer goes high (read: more energy above "
        "0.25 cycles per pixel in the last convolution than in conv1; the hyperplanes of conv0 do "
        "not depend on the image).",
        f"median share {100 * first:.3g} % in {names[1]}, {100 * last:.3g} % in {names[-1]}",
        last > first,
        network=name,
    )
    yield from _position_claims(name, found["positions"])
    yield from _sparsity_claims(name, merged(list(found["sparsity"].values())))
    yield from _region_claims(name, found["regions"])


def _position_claims(name: str, positions: list[dict[str, Any]]) -> Iterator[Claim]:
    """How much the hyperplanes of one channel differ from position to position."""
    for which, of in zip(POSITION_LAYERS, positions, strict=True):
        if of.get("positions", 0) < 2:
            continue
        between = Quantiles(**of["angles"])
        yield Claim(
            f"The same kernels show different hyperplanes at different positions of {which} "
            f"(read: by more than {ALIKE:g} degrees).",
            f"RM2 of channel {of['channel']} of {of['layer']}, every pair of {of['positions']} "
            f"positions: {between} degrees",
            between.median > ALIKE,
            network=name,
        )


def _change(part: dict[str, float]) -> str:
    """Angle and length of a difference, in words."""
    return f"{part['angle']:.3g} degrees, {100 * part['change']:.3g} % of their length"


def _sparsity_claims(name: str, layers: dict[str, Any]) -> Iterator[Claim]:
    """How many kernels use their whole receptive field, and how many use nothing."""
    later = list(layers.values())[1:]
    full = [100 * layer.full_share for layer in later]
    empty = {layer.layer: 100 * layer.zero_share for layer in later if layer.zero}
    yield Claim(
        "Few kernels use the whole of their receptive field "
        "(read: less than half, in every layer after the first).",
        f"{min(full):.3g} to {max(full):.3g} % of the RM4 hyperplanes, by layer",
        max(full) < 50,
        network=name,
    )
    measured = f"all-zero RM4 hyperplanes in {len(empty)} of {len(later)} layers"
    if empty:
        most = max(empty, key=lambda layer: empty[layer])
        measured += f", most in {most}: {empty[most]:.3g} %"
    text = "Some layer has a kernel that takes null from the image."
    yield Claim(text, measured, bool(empty), network=name)


def _region_claims(name: str, images: dict[str, Any]) -> Iterator[Claim]:
    """How far the nearest class boundary is from the end of the linear region."""
    found = [image["found"]["l2"] for image in images.values()]
    reached = [each for each in found if each["kink"] and each["boundary"]]
    ratios = [each["boundary"] / each["kink"] for each in reached]
    inside = sum(each["in region"] for each in found)
    if ratios:
        yield Claim(
            "An image's linear region ends long before its nearest class boundary.",
            f"the boundary is {Quantiles.of(ratios)} times as far in l2; "
            f"it is in the region for {inside} of {len(found)} images",
            inside == 0 and float(np.median(ratios)) > 10,
            network=name,
        )


def likeness_table(networks: dict[str, Found]) -> Table:
    """Table of how different the hyperplanes of one class are at two images, and at many pairs.

    Args:
        networks: Results by network.
    """
    head = ["network", "class", "angle", "difference %", "bias part: angle", "difference %"]
    head += ["pairs of one class", "of two classes"]
    sheet = Sheet("Hyperplanes of one class at different images", head)
    for name, found in networks.items():
        same = found["same class"]
        between = found["many"]["angles"]
        row = [name, same["class"]]
        for part in ("image", "bias"):
            if part in same:
                change = 100 * same[part]["change"]
                row += [f"{same[part]['angle']:.3g}", f"{change:.3g}"]
            else:
                row += ["", ""]
        row += [str(Quantiles(**between[pairs])) for pairs in ("one class", "two classes")]
        sheet.rows.append(row)
    caption = (
        "Angles in degrees between the hyperplanes of a class at the two images of the pictures; "
        "difference: its length relative to the mean length of the two. Last columns: angles "
        "between the image parts of the predicted classes of many images, median and 5 to 95 % "
        "of all pairs."
    )
    return Table(sheet, caption)


def frequency_table(networks: dict[str, Found]) -> Table:
    """Table of how much energy images and hyperplanes have at high frequencies.

    Args:
        networks: Results by network.
    """
    head = ["network", "images", "above 0.25: image %", "hyperplane %"]
    head += ["mean frequency: image", "hyperplane", "higher in, %"]
    sheet = Sheet("Spectra of images and of the predicted class's hyperplane", head)
    for name, found in networks.items():
        many = found["many"]
        row = [name, str(len(many["high"][IMAGES]))]
        row += [str(Quantiles.of(many["high"][of], 100.0)) for of in (IMAGES, PLANES)]
        row += [str(Quantiles.of(many["mean"][of])) for of in (IMAGES, PLANES)]
        sheet.rows.append([*row, f"{100 * higher(many):.1f}"])
    caption = (
        "Share of the energy (squared amplitude without DC, mean of the three channels) above "
        "0.25 cycles per pixel, and mean radial frequency in cycles per pixel: median and 5 to "
        f"95 % of the images; white noise has {100 * white_noise():.1f} % above 0.25. Higher in: "
        "images whose hyperplane has the larger share."
    )
    return Table(sheet, caption)


def white_noise() -> float:
    """Expected share of white noise's energy above a quarter cycle per pixel.

    White noise of 32 x 32 pixels has the same energy at every frequency but DC, as one pixel has.

    Example:
        >>> 100 * white_noise() > 80
        True
    """
    pixel = torch.zeros(EXTENT, EXTENT)
    pixel[0, 0] = 1.0
    return float(high_share(pixel))


def region_table(networks: dict[str, Found]) -> Table:
    """Table of the distances of many images to the nearest kink and the nearest class boundary.

    Args:
        networks: Results by network.
    """
    head = ["network", "norm", "images", "nearest kink", "ends the region, %"]
    head += ["nearest boundary", "in the region, %", "changes, %"]
    sheet = Sheet("Where the linear region of an image ends, and its nearest class boundary", head)
    for name, found in networks.items():
        for norm in next(iter(found["regions"].values()))["found"]:
            every = [image["found"][norm] for image in found["regions"].values()]
            kink = [_distances(every, "kink"), _percent(every, "ends region")]
            boundary = [_distances(every, "boundary"), _percent(every, "in region")]
            changes = _percent(every, "changes")
            sheet.rows.append([name, norm, str(len(every)), *kink, *boundary, changes])
    caption = (
        "Distances in pixels of [0, 1], median and 5 to 95 % of the images, in float64. Ends the "
        "region: the pattern is the same just before the kink, and another just after. In the "
        "region: the same pattern on both sides of the boundary. Changes: the network itself "
        "prefers the other class just after it."
    )
    return Table(sheet, caption)


def _distances(images: list[dict[str, Any]], key: str) -> str:
    """Quantiles of the distances that were found."""
    return str(Quantiles.of([image[key] for image in images if image[key] is not None]))


def _percent(images: list[dict[str, Any]], key: str) -> str:
    """Percentage of the images for which something holds."""
    return f"{100 * np.mean([image[key] for image in images]):.1f}"


def sparsity_table(name: str, found: Found) -> Table:
    """Table of the zero RM4 hyperplanes of each layer, and how much of their fields the others use.

    Args:
        name: The network.
        found: Its results.
    """
    count = len(found["sparsity"])
    head = ["layer", "RM4 hyperplanes", "all zero %", "field used %", "whole field used %"]
    sheet = Sheet(f"{name}: sparsity by layer, {count} {'image' if count == 1 else 'images'}", head)
    for layer in merged(list(found["sparsity"].values())).values():
        shares = (layer.zero_share, layer.used_share, layer.full_share)
        cells = (f"{100 * share:.2f}" for share in shares)
        sheet.rows.append([layer.layer, f"{layer.hyperplanes:,}", *cells])
    caption = (
        "Field used: share of the pixels of all receptive fields, as far as they lie inside the "
        "image, where the hyperplane is not zero in at least one channel; whole field used: "
        "hyperplanes that use every pixel."
    )
    return Table(sheet, caption)


def higher(many: Found) -> float:
    """Share of the images whose hyperplane has more of its energy at high frequencies.

    The comparison is with the share of the image itself.

    Args:
        many: Result of :func:`adjointbackmap.study.pictures.likeness.over_many`.
    """
    return float(np.mean(np.array(many["high"][PLANES]) > np.array(many["high"][IMAGES])))
