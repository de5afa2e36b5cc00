"""How similar hyperplanes are, and how much of their energy is at high frequencies."""

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

IMAGES = "images"
PLANES = "hyperplanes"


def mutual_angles(
    planes: Float[Tensor, "n *part"],
    others: Float[Tensor, "m *part"],
) -> Float[Tensor, "n m"]:
    """Angle in degrees between each hyperplane of one set and each of another, in float64.

    Args:
        planes: Image parts or bias parts, none of them zero.
        others: The same for other units or images.

    Example:
        >>> others = torch.tensor([[2.0, 2.0], [0.0, -3.0]])
        >>> mutual_angles(torch.eye(2)[:1], others).round().tolist()
        [[45.0, 90.0]]
    """
    first, second = (
        torch.nn.functional.normalize(part.flatten(1).double(), dim=1) for part in (planes, others)
    )
    return (first @ second.T).clamp(-1, 1).acos().rad2deg()


def same_class(images: data.Images, planes: Hyperplanes) -> dict[str, Any]:
    """Difference of a class's hyperplanes at two images [Wan2022, section 2.5.3].

    Args:
        images: At least two images, the first two of the same class.
        planes: All RM0 hyperplanes of each image.

    Returns:
        The class, and a dictionary for each of ``"image"`` and ``"bias"``: the angle in degrees,
        and the norm of the difference relative to the mean of the two norms. There is no bias part
        if the network has no biases.
    """
    label = int(images.labels[0])
    found: dict[str, Any] = {"class": images.classes[label]}
    for part in ("image", "bias") if len(planes.network.biases) else ("image",):
        first, second = getattr(planes, part)[:2, label].flatten(1).double()
        change = (first - second).norm() / ((first.norm() + second.norm()) / 2)
        found[part] = {
            "angle": float(mutual_angles(first[None], second[None])),
            "change": float(change),
        }
    return found


def by_position(trained: Trained, x: Float[Tensor, "1 c h w"], layer: str) -> dict[str, Any]:
    """Angles between the RM2 hyperplanes of one channel at different positions.

    Each hyperplane is compared on its own receptive field.

    Args:
        trained: The network.
        x: One image in the units of the network's input.
        layer: Name of a convolution.

    Returns:
        The layer, the channel with the largest RM1 value, the number of positions, and the
        quantiles of the angles over all pairs of positions. A position counts if its receptive
        field lies inside the image and its hyperplane is not zero.
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
        found |= {
            "positions": len(planes),
            "angles": _quantiles(mutual_angles(planes, planes)[first, second]),
        }
    return found


def high_by_layer(trained: Trained, x: Float[Tensor, "n c h w"]) -> dict[str, list[float]]:
    """Share of the energy above a quarter cycle per pixel for each nonzero RM1 hyperplane.

    The share is the mean of the three colours.

    Args:
        trained: The network.
        x: Images in the units of the network's input.

    Returns:
        Name of a convolution -> a share for each of its channels and images.
    """
    found = {}
    for layer in convolutions(trained.network):
        image = hyperplanes(trained.network, x, layer.name, "RM1", scale=SCALE).image.flatten(0, 1)
        found[layer.name] = high_share(image[image.flatten(1).any(1)]).mean(1).tolist()
    return found


def over_many(
    trained: Trained,
    images: data.Images,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Spectra of many images and of their classes' hyperplanes, and angles between hyperplanes.

    Args:
        trained: The network.
        images: Images that it classifies correctly.

    Returns:
        Two dictionaries. The first has ``"high"``, the share of the energy above a quarter cycle
        per pixel, and ``"mean"``, the mean frequency in cycles per pixel. Both are given for each
        image and each hyperplane, averaged over the colours. Its ``"angles"`` are the quantiles of
        the angles in degrees over all pairs of hyperplanes of ``"one class"`` and of ``"two
        classes"``. The second dictionary has the arrays of the radial profiles.
    """
    x = trained.input(images.unit_interval())
    units = images.labels[:, None, None]  # one unit (class,) for each image
    planes = hyperplanes(trained.network, x, "fc", "RM0", units, scale=SCALE).image[:, 0]
    maps = {IMAGES: images.unit_interval(), PLANES: planes}
    found: dict[str, Any] = {
        "high": {name: high_share(part).mean(1).tolist() for name, part in maps.items()},
        "mean": {name: mean_frequency(part).mean(1).tolist() for name, part in maps.items()},
    }
    first, second = torch.triu_indices(len(planes), len(planes), 1)
    same = images.labels[first] == images.labels[second]
    between = mutual_angles(planes, planes)[first, second]
    found["angles"] = {
        "one class": _quantiles(between[same]),
        "two classes": _quantiles(between[~same]),
    }
    profiles = {name: radial_energy(part) for name, part in maps.items()}
    arrays = {
        f"profile of {name}": profile.share.mean(1).numpy() for name, profile in profiles.items()
    }
    return found, {"frequency": profiles[IMAGES].frequency.numpy(), **arrays}


def _quantiles(numbers: Tensor) -> dict[str, float]:
    """The quantiles of some numbers as JSON-compatible values."""
    return asdict(Quantiles.of(numbers.numpy()))
