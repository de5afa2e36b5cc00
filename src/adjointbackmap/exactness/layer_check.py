"""The errors of every unit of a layer, as counts that add up in any order."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.planes.hyperplane import relative_error

SHARE_LIMIT = 0.01  # the study counts the units whose relative error is at most 1 %
HISTOGRAM_EDGES = tuple(float(f"1e{e}") for e in range(-16, 3))
ROUNDING = 16  # in machine epsilons of the network's dtype: scale-aware errors up to it are what rounding does

Place = tuple[str, tuple[int, ...]]
"""Name of an image, and a unit of it in the layer's own shape."""


@dataclass
class LayerCheck:
    """Errors of every unit of a layer over some images.

    Checks of other images are added by :meth:`merge`: counts are summed and errors go through a maximum, so that the same
    images give the same check in any order and from any number of workers.

    Attributes:
        layer: Name of the layer.
        units: Units checked, over all images.
        within: How many have |relative error| <= 1 %.
        within_signed: How many have a signed relative error <= 1 %, as published.
        zero: How many have a value of exactly zero.
        rounded: How many are not within 1 %, though their scale-aware error is at most ``ROUNDING`` machine epsilons: what
            their terms sum to is nearly zero, so that ordinary rounding is a large part of it.
        largest: Largest |relative error|.
        scaled: Largest scale-aware error, which is divided by sum |x h| + sum |b h|.
        outside: Largest |value| / (sum |x h| + sum |b h|) of the units that are not within 1 %.
        worst: Image and unit of the largest |relative error|; of several, the first by name and place.
        signed: Counts of the signed relative error: a bin for each of the powers of ten in ``HISTOGRAM_EDGES``, from -100 to
            -1e-16, one between these, and those from 1e-16 to 100; a bin has the edge that is farther from zero.
    """

    layer: str
    units: int = 0
    within: int = 0
    within_signed: int = 0
    zero: int = 0
    rounded: int = 0
    largest: float = 0.0
    scaled: float = 0.0
    outside: float = 0.0
    worst: Place | None = None
    signed: list[int] = field(default_factory=lambda: [0] * (2 * len(HISTOGRAM_EDGES) + 1))

    @property
    def share(self) -> float:
        """Share of units with |relative error| <= 1 %."""
        return self.within / self.units

    @property
    def histogram(self) -> list[int]:
        """Counts of |relative error| between the powers of ten of ``HISTOGRAM_EDGES``; NaN is in the last."""
        middle = len(HISTOGRAM_EDGES)
        pairs = zip(self.signed[middle + 1 :], self.signed[:middle][::-1], strict=True)
        return [self.signed[middle], *(above + below for above, below in pairs)]

    def merge(self, other: "LayerCheck") -> None:
        """Add the units of other images of the same layer."""
        for name in ("units", "within", "within_signed", "zero", "rounded"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = _worse(self, other)
        for name in ("largest", "scaled", "outside"):
            setattr(self, name, larger(getattr(self, name), getattr(other, name)))
        self.signed = [a + b for a, b in zip(self.signed, other.signed, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "LayerCheck":
        """What :meth:`to_dict` gave, also after JSON made lists of its tuples.

        Example:
            >>> check = LayerCheck("fc", units=1, within=1, worst=("8a3f", (2,)))
            >>> LayerCheck.from_dict({**check.to_dict(), "worst": ["8a3f", [2]]}) == check
            True
        """
        worst = entry["worst"]
        return cls(**{**entry, "worst": worst and (worst[0], tuple(worst[1]))})

    @classmethod
    def of_image(cls, entry: Any, layer: str, image: str, shape: Sequence[int]) -> "LayerCheck":
        """What :meth:`to_dict` gave for one image, where every number in it fits the others.

        Args:
            entry: What was read.
            layer: Name of the layer.
            image: Name of the image.
            shape: The layer's units.

        Raises:
            ValueError: If a number cannot be: the message says which.
        """
        try:
            check = cls.from_dict(entry)
            fault = next(
                (what for what, holds in _conditions(check, layer, image, shape) if not holds), None
            )
        except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            msg = f"{layer} has no errors of units"
            raise ValueError(msg) from error
        if fault is not None:
            msg = f"{layer} has {fault}"
            raise ValueError(msg)
        return check


def _conditions(
    check: LayerCheck, layer: str, image: str, shape: Sequence[int]
) -> Iterator[tuple[str, bool]]:
    """What is wrong where a condition on the errors of one image does not hold, and whether it holds."""
    counts = (
        check.units,
        check.within,
        check.within_signed,
        check.zero,
        check.rounded,
        *check.signed,
    )
    yield "counts that are none", all(type(count) is int and count >= 0 for count in counts)
    yield (
        f"{check.units} units in place of {prod(shape)}",
        check.layer == layer and check.units == prod(shape),
    )
    edges = len(check.signed)
    middle = len(HISTOGRAM_EDGES)
    yield "a histogram of other bins", edges == 2 * middle + 1
    yield (
        f"a histogram of {sum(check.signed)} units in place of {check.units}",
        sum(check.signed) == check.units,
    )
    limit = (
        HISTOGRAM_EDGES.index(SHARE_LIMIT) + 1
    )  # the bins up to it, on either side of the middle
    inside = sum(check.signed[middle - limit + 1 : middle + limit])
    below = sum(check.signed[: middle + limit])
    yield (
        "another histogram than units within 1 %",
        (inside, below) == (check.within, check.within_signed),
    )
    yield (
        "too many units of zero or of rounding",
        max(check.zero, check.within + check.rounded) <= check.units,
    )
    errors = (check.largest, check.scaled, check.outside)
    yield "errors that are none", all(type(error) is float and not error < 0 for error in errors)
    known = check.largest == check.largest
    top = max(power for power, count in enumerate(check.histogram) if count)
    yield (
        "a largest error beside the histogram",
        top == (bisect_left(HISTOGRAM_EDGES, check.largest) if known else middle),
    )
    yield "an outside value of none", check.outside == 0 or check.within < check.units
    place = check.worst or ("", ())
    fits = len(place[1]) == len(shape) and all(
        type(i) is int and 0 <= i < n for i, n in zip(place[1], shape, strict=True)
    )
    yield "a worst unit that is none", place[0] == image and fits


def larger(first: float, second: float) -> float:
    """The larger of two errors, where NaN is larger than any number."""
    return first if second <= first or first != first else second


def checks_of(
    layer: str, value: Tensor, reconstructed: Tensor, magnitude: Tensor, names: Sequence[str]
) -> "list[LayerCheck]":
    """The errors of a layer's units for each image; all is counted on the device that the tensors are on.

    Args:
        layer: Name of the layer.
        value: What the network computes, ``(N, *units)``.
        reconstructed: The inner products with the hyperplanes.
        magnitude: Sum of |x h| and |b h|.
        names: Name of each image.
    """
    error = relative_error(reconstructed, value).flatten(1)
    floor = torch.finfo(value.dtype).tiny
    sizes = value.abs().flatten(1)
    magnitudes = magnitude.flatten(1).clamp_min(floor)
    absolute = error.abs()
    scaled = (reconstructed - value).abs().flatten(1) / magnitudes
    outside = ~(absolute <= SHARE_LIMIT)
    worst = absolute.argmax(1, keepdim=True)
    columns = [
        worst[:, 0],
        outside.sum(1),
        (error <= SHARE_LIMIT).sum(1),
        (sizes == 0).sum(1),
        (outside & (scaled <= ROUNDING * torch.finfo(value.dtype).eps)).sum(1),
        absolute.gather(1, worst)[:, 0],
        scaled.amax(1),
        torch.where(outside, sizes / magnitudes, 0).amax(1),
        *_signed_counts(error.double()).T,
    ]
    units = sizes.shape[1]
    shape = value.shape[1:]
    return [
        LayerCheck(
            layer=layer,
            units=units,
            within=units - int(out),
            within_signed=int(within_signed),
            zero=int(zero),
            rounded=int(rounded),
            largest=largest,
            scaled=scaled_error,
            outside=value_outside,
            worst=(
                name,
                tuple(int(i) for i in torch.unravel_index(torch.tensor(int(place)), shape)),
            ),
            signed=[int(count) for count in signed],
        )
        for name, (
            place,
            out,
            within_signed,
            zero,
            rounded,
            largest,
            scaled_error,
            value_outside,
            *signed,
        ) in zip(names, torch.stack([c.double() for c in columns], 1).tolist(), strict=True)
    ]


def _signed_counts(errors: Tensor) -> Tensor:
    """Counts by sign and power of ten, ``(N, bins)``; NaN is the last bin's."""
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64, device=errors.device)
    power = torch.bucketize(errors.abs(), edges)
    bins = len(edges) + torch.where(errors < 0, -power, power)
    images = len(errors)
    size = 2 * len(edges) + 1
    apart = bins + size * torch.arange(images, device=bins.device)[:, None]
    return torch.bincount(apart.flatten(), minlength=size * images).view(images, size)


def _worse(first: LayerCheck, second: LayerCheck) -> Place | None:
    """The place of the larger error, NaN before any number; of equal ones the first by name and unit."""

    def rank(check: LayerCheck) -> tuple[bool, float, Place | None]:
        known = check.largest == check.largest
        return known, -check.largest if known else 0.0, check.worst

    return min(
        (check for check in (first, second) if check.worst is not None), key=rank, default=first
    ).worst
