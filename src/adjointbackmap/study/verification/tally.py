"""Counts of units over images, and the confidence interval of their share."""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from adjointbackmap.exactness.layer_check import LayerCheck

Z = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass
class Tally:
    """The errors of a layer over some images, and how much the images differ.

    Attributes:
        check: Errors of all units.
        images: Number of images.
        squares: Sum over the images of the squared number of units with an error above 1 %.
        squares_signed: The same for the signed error.
    """

    check: LayerCheck
    images: int = 0
    squares: int = 0
    squares_signed: int = 0

    def add(self, image: LayerCheck) -> None:
        """Add the units of one image."""
        self.check.merge(image)
        self.images += 1
        self.squares += (image.units - image.within) ** 2
        self.squares_signed += (image.units - image.within_signed) ** 2

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "Tally":
        """The tally that :meth:`to_dict` has converted."""
        check = LayerCheck.from_dict(entry["check"])
        return cls(check, entry["images"], entry["squares"], entry["squares_signed"])

    def to_dict(self) -> dict[str, Any]:
        """The counts and their intervals as JSON-compatible values."""
        check = self.check
        outside = check.units - check.within
        outside_signed = check.units - check.within_signed
        return {
            **asdict(self),
            "interval": interval(check.units, outside, self.images, self.squares),
            "interval_signed": interval(
                check.units, outside_signed, self.images, self.squares_signed
            ),
        }


def interval(units: int, outside: int, images: int, squares: int) -> tuple[float, float]:
    r"""95 % interval of the share of units that are not outside.

    Units outside may be concentrated in a few images. Therefore the interval is Wilson's for a
    smaller number of units: the number of units divided by the design effect. The design effect is
    the variance of the count per image, divided by the variance for independent units. It is at
    least 1. If no unit is outside, it cannot be estimated and is set to 1. The lower end is then
    :math:`1 / (1 + 3.84 / \text{units})`, slightly below the rule of three.

    Args:
        units: Units of all images, the same number in each.
        outside: Number of units outside.
        images: Number of images.
        squares: Sum over the images of the squared number of units outside.

    Example:
        >>> low, high = interval(1_000_000, 0, 100, 0)
        >>> f"{low:.7f} {high:.7f}"
        '0.9999962 1.0000000'
        >>> in_one_image = interval(1_000_000, 100, 100, 10_000)
        >>> one_in_each = interval(1_000_000, 100, 100, 100)
        >>> in_one_image[0] < one_in_each[0]
        True
    """
    share = 1 - outside / units
    count = units / design_effect(units, outside, images, squares)
    spread = Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return centre - half, min(centre + half, 1.0)


def design_effect(units: int, outside: int, images: int, squares: int) -> float:
    """Variance of the count of units outside per image, relative to independent units.

    It is at least 1.

    Example:
        >>> design_effect(units=2000, outside=20, images=2, squares=400)  # all in one image
        20.2...
    """
    if images < 2 or not 0 < outside < units:
        return 1.0
    variance = (squares - outside**2 / images) / (images - 1)
    independent = units / images * (outside / units) * (1 - outside / units)
    return max(1.0, variance / independent)
