"""Planes near an image in its linear region: distances, and outputs on both sides of a plane."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.display import ShownFields
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.pattern import check_images, record_pattern

NORMS = ("l2", "linf")
# The points "just before" and "just after" a plane are this share of the step away from it.
BESIDE = 1e-6

Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Plane(ShownFields):
    r"""The points :math:`z` with :math:`\langle z | weights \rangle + offset = 0`.

    The plane belongs to an image, from which distances are measured.

    Attributes:
        x: The image, ``(C, H, W)``.
        weights: Coefficients, in the shape of the image.
        offset: Contribution of the biases.

    Example:
        >>> plane = Plane(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]), -1.0)
        >>> plane.value, round(plane.distance("l2"), 4), plane.distance("linf")
        (2.0, 1.4142, 1.0)
        >>> plane.step("linf").tolist()
        [-1.0, -1.0]
    """

    x: Float[Tensor, "*in"]
    weights: Float[Tensor, "*in"]
    offset: float

    @property
    def value(self) -> float:
        """Value at the image; its sign says on which side of the plane the image lies."""
        return float((self.x * self.weights).sum()) + self.offset

    def distance(self, norm: str) -> float:
        """Length of the shortest step onto the plane; infinite where the weights are zero.

        Raises:
            ValueError: If the norm is neither ``"l2"`` nor ``"linf"``.
        """
        size = float(torch.linalg.vector_norm(self.weights, _dual(norm)))
        return abs(self.value) / size if size else float("inf")

    def step(self, norm: str) -> Float[Tensor, "*in"]:
        """The shortest step from the image onto the plane.

        In l2 it follows the weights, in linf their signs.

        Raises:
            ValueError: If the norm is neither ``"l2"`` nor ``"linf"``, or the plane cannot be
                reached.
        """
        if not self.weights.any():
            msg = (
                "A plane that can be reached must have weights. Got zeros: its distance is "
                "infinite."
            )
            raise ValueError(msg)
        along = self.weights if _dual(norm) == 2 else self.weights.sign()
        return -self.value * along / (self.weights * along).sum()


def _dual(norm: str) -> int:
    """Order of the dual norm: a distance is divided by this norm of the weights.

    Raises:
        ValueError: If the norm is unknown.
    """
    if norm not in NORMS:
        msg = f"norm must be one of {', '.join(NORMS)}. Got {norm!r}."
        raise ValueError(msg)
    return 2 if norm == "l2" else 1


P = TypeVar("P", bound=Plane)


@dataclass(frozen=True, repr=False)
class Side(ShownFields):
    """A point close to a plane.

    Attributes:
        same: Whether its activation pattern is that of the image.
        outputs: Outputs of the model itself at the point.
    """

    same: bool
    outputs: Tensor


@dataclass(frozen=True, repr=False)
class Reached(ShownFields, Generic[P]):
    """A plane, and the points just before and just after it on the shortest step.

    Attributes:
        plane: The plane.
        norm: ``"l2"`` or ``"linf"``.
        before: The point one millionth of the step before the plane.
        after: The point one millionth of the step after the plane.
    """

    plane: P
    norm: str
    before: Side
    after: Side

    @property
    def distance(self) -> float:
        """Length of the step."""
        return self.plane.distance(self.norm)

    @property
    def in_region(self) -> bool:
        """Whether the step ends in the image's linear region, where the plane is exact."""
        return self.before.same and self.after.same

    @property
    def ends_region(self) -> bool:
        """Whether the linear region ends at the plane.

        The activation pattern is then that of the image before the plane, and another one after it.
        """
        return self.before.same and not self.after.same


def reach(
    network: Network,
    planes: Sequence[P],
    norm: str,
    prepare: Prepare | None = None,
) -> list[Reached[P]]:
    """Evaluate the model just before and just after each plane.

    Args:
        network: Traced network.
        planes: Planes of one image; each of them can be reached.
        norm: ``"l2"`` or ``"linf"``.
        prepare: Map from the image's pixels to the network's input; the identity by default.

    Raises:
        ValueError: If a plane cannot be reached, or the norm is unknown.
    """
    if not planes:
        return []
    x = planes[0].x
    steps = torch.stack([plane.step(norm) for plane in planes])
    points = torch.cat([x[None], x + (1 - BESIDE) * steps, x + (1 + BESIDE) * steps])
    inputs = check_images(network, points if prepare is None else prepare(points), x.dtype)
    with exact(inputs.device):
        outputs = record(network, inputs, [network.layers[OUTPUT]]).outputs[OUTPUT].detach()
    sides = [
        Side(bool(same), out)
        for same, out in zip(_as_first(network, inputs), outputs[1:], strict=True)
    ]
    each = zip(planes, sides[: len(planes)], sides[len(planes) :], strict=True)
    return [Reached(plane, norm, before, after) for plane, before, after in each]


def _as_first(network: Network, images: Tensor) -> Tensor:
    """Which of the other images have the activation pattern of the first one."""
    pattern = record_pattern(network, images, dtype=images.dtype)
    same = torch.ones(len(images) - 1, dtype=torch.bool, device=images.device)
    # a constant mask has a single row for all images
    for gate in (g for gates in pattern.gates.values() for g in gates if len(g) > 1):
        same &= (gate[1:] == gate[:1]).flatten(1).all(1)
    return same
