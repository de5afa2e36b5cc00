"""What hyperplanes look like, in numbers: how alike two are, and how much high frequency they hold."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.spectra import high_share, mean_frequency, radial_energy
from adjointbackmap.study.pictures.panels import convolutions
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.setup import SCALE, Trained

IMAGES, PLANES = "images", "hyperplanes"


def mutual_angles(planes: Float[Tensor, "n *part"], others: Float[Tensor, "m *part"]) -> Float[Tensor, "n m"]:
    """Angles in degrees between each hyperplane of one set and each of another, in float64.

    Args:
        planes: Image parts or bias parts, none of them zero.
        others: The same of other units or images.

    Example:
        >>> mutual_angles(torch.eye(2)[:1], torch.tensor([[2.0, 2.0], [0.0, -3.0]])).round().tolist()
        [[45.0, 90.0]]
    """
    first, second = (torch.nn.functional.normalize(part.flatten(1).double(), dim=1) for part in (planes, others))
    return (first @ second.T).clamp(-1, 1).acos().rad2deg()


def same_class(images: data.Images, planes: Hyperplanes) -> dict[str, Any]:
    """How the hyperplanes of the first image's class differ at the first two images [Wan2022, section 2.5.3].

    Args:
        images: At least two images, the first two of one class.
        planes: All RM0 hyperplanes of each.

    Returns:
        The class, and by part, ``"image"`` and ``"bias"``: the angle in degrees, and the length of the difference relative to
        the mean length of the two; no bias part where there are no biases.
    """
    label = int(images.labels[0])
    found: dict[str, Any] = {"class": images.classes[label]}
    for part in ("image", "bias") if len(planes.network.biases) else ("image",):
        first, second = getattr(planes, part)[:2, label].flatten(1).double()
        change = (first - second).norm() / ((first.norm() + second.norm()) / 2)
        found[part] = {"angle": float(mutual_angles(first[None], second[None])), "change": float(change)}
    return found


def by_position(trained: Trained, x: Float[Tensor, "1 c h w"], layer: str) -> dict[str, Any]:
    """Angles between the RM2 hyperplanes of one channel at two positions, each on its own receptive field.

    Args:
        trained: The network.
        x: An image as the network takes it.
        layer: Name of a convolution.

    Returns:
        The layer and its channel, the one that RM1 is largest for; how many positions have a field inside the image and a
        hyperplane that is not zero; and of the angles of all pairs of these the quantiles.
    """
    channel = int(hyperplanes(trained.network, x, layer, "RM1", scale=SCALE).value[0].argmax())
    units = (slice(None), slice(None), channel)
    part = hyperplanes(trained.network, x, layer, "RM2", units, scale=SCALE).image_part
    found: dict[str, Any] = {"layer": layer, "channel": channel}
    if isinstance(part, Patches):
        last = torch.tensor(part.image) - torch.tensor(part.values.shape[-2:])
        inside = ((part.corners >= 0) & (part.corners <= last)).all(-1)
        planes = part.values[0][inside & part.values[0].flatten(2).any(2)]
        first, second = torch.triu_indices(len(planes), len(planes), 1)
        found |= {"positions": len(planes), "angles": _told(mutual_angles(planes, planes)[first, second])}
    return found


def high_by_layer(trained: Trained, x: Float[Tensor, "n c h w"]) -> dict[str, list[float]]:
    """Share of the energy above a quarter cycle per pixel, mean of the colours, of each RM1 hyperplane that is not zero.

    Args:
        trained: The network.
        x: Images as the network takes them.

    Returns:
        Name of a convolution -> a share for each of its channels and images.
    """
    found = {}
    for layer in convolutions(trained.network):
        image = hyperplanes(trained.network, x, layer.name, "RM1", scale=SCALE).image.flatten(0, 1)
        found[layer.name] = high_share(image[image.flatten(1).any(1)]).mean(1).tolist()
    return found


def over_many(trained: Trained, images: data.Images) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Spectra of many images and of the hyperplanes of their classes, and angles between the latter.

    Args:
        trained: The network.
        images: Images that it classifies correctly.

    Returns:
        ``"high"``, the share of the energy above a quarter cycle per pixel, and ``"mean"``, the mean frequency in cycles per
        pixel, of each image and of each hyperplane, mean of the colours; and of the angles in degrees the quantiles over all
        pairs of hyperplanes of ``"one class"`` and of ``"two classes"``. And the arrays of the radial profiles.
    """
    x = trained.input(images.unit_interval())
    planes = hyperplanes(trained.network, x, "fc", "RM0", images.labels[:, None, None], scale=SCALE).image[:, 0]
    maps = {IMAGES: images.unit_interval(), PLANES: planes}
    measured = {"high": high_share, "mean": mean_frequency}
    found: dict[str, Any] = {key: {n: of(part).mean(1).tolist() for n, part in maps.items()} for key, of in measured.items()}
    first, second = torch.triu_indices(len(planes), len(planes), 1)
    same, between = images.labels[first] == images.labels[second], mutual_angles(planes, planes)[first, second]
    found["angles"] = {"one class": _told(between[same]), "two classes": _told(between[~same])}
    profiles = {name: radial_energy(part) for name, part in maps.items()}
    arrays = {f"profile of {name}": profile.share.mean(1).numpy() for name, profile in profiles.items()}
    return found, {"frequency": profiles[IMAGES].frequency.numpy(), **arrays}


def _told(numbers: Tensor) -> dict[str, float]:
    """The quantiles of some numbers, as JSON has them."""
    return asdict(Quantiles.of(numbers.numpy()))
