"""The errors of all units of a layer, as counts that can be added in any order."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.display import Shown, Summary
from adjointbackmap.planes.hyperplane import relative_error

# The study counts the units whose relative error is at most 1 %.
SHARE_LIMIT = 0.01
# From 1e-16, below the rounding of float64, to 100.
HISTOGRAM_EDGES = tuple(float(f"1e{e}") for e in range(-16, 3))
# Largest scale-aware error that counts as rounding, in machine epsilons of the network's dtype.
ROUNDING = 16

COUNTS = ("units", "within", "within_signed", "zero", "rounded", "flipped")

UnitOfImage = tuple[str, tuple[int, ...]]
"""Name of an image, and the index of a unit in the shape of the layer."""


@dataclass(repr=False)
class LayerCheck(Shown):
    """Errors of all units of a layer over some images.

    :meth:`merge` adds the checks of other images. Counts are summed, and the larger error is kept.
    So the same images give the same check in any order and from any number of workers.

    Attributes:
        layer: Name of the layer.
        units: Number of units checked, over all images.
        within: Number of units with |relative error| <= 1 %.
        within_signed: Number of units with a signed relative error <= 1 %, as published.
        zero: Number of units with a value of exactly zero.
        rounded: Number of units that are not within 1 % but have a scale-aware error of at most
            ``ROUNDING`` machine epsilons. Their terms nearly cancel, so ordinary rounding is a
            large part of their value.
        largest: Largest |relative error|.
        scaled: Largest scale-aware error: the error divided by sum |x h| + sum |b h|.
        outside: Largest |value| / (sum |x h| + sum |b h|) of the units that are not within 1 %.
        worst: Image and unit of the largest |relative error|. If there are several, the first by
            name and index.
        signed: Counts of the signed relative error. There is a bin for each of -100 to -1e-16, the
            negative powers of ten of ``HISTOGRAM_EDGES``, a bin around zero, and a bin for each of
            1e-16 to 100. The power of a bin is its end farther from zero and belongs to it.
        flipped: Number of gates before the layer that are not the same in the dtype of the values
            and in that of the hyperplanes, over all images; 0 if the two are one dtype.
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
    worst: UnitOfImage | None = None
    signed: list[int] = field(default_factory=lambda: [0] * (2 * len(HISTOGRAM_EDGES) + 1))
    flipped: int = 0

    def _summary(self) -> Summary:
        if not self.units:
            return Summary(f"LayerCheck {self.layer}: no units")
        facts = {
            "units": f"{self.units:,}, of them {self.zero:,} zero",
            "within 1 %": f"{100 * self.share:.5g} %",
            "largest relative error": f"{self.largest:.2g}",
            "largest scale-aware error": f"{self.scaled:.2g}",
        }
        return Summary(f"LayerCheck {self.layer}", facts)

    @property
    def share(self) -> float:
        """Share of units with |relative error| <= 1 %."""
        return self.within / self.units

    @property
    def histogram(self) -> list[int]:
        """Counts of |relative error| between the powers of ten of ``HISTOGRAM_EDGES``.

        NaN is in the last bin.
        """
        middle = len(HISTOGRAM_EDGES)  # the bin around zero; the bins of one size are around it
        pairs = zip(self.signed[middle + 1 :], self.signed[:middle][::-1], strict=True)
        return [self.signed[middle], *(above + below for above, below in pairs)]

    def merge(self, other: "LayerCheck") -> None:
        """Add the units of other images of the same layer."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = _worse(self, other)
        for name in ("largest", "scaled", "outside"):
            setattr(self, name, larger(getattr(self, name), getattr(other, name)))
        self.signed = [a + b for a, b in zip(self.signed, other.signed, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """The check as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "LayerCheck":
        """The check of a dict from :meth:`to_dict`. JSON may have made lists of its tuples.

        Example:
            >>> check = LayerCheck("fc", units=1, within=1, worst=("8a3f", (2,)))
            >>> LayerCheck.from_dict({**check.to_dict(), "worst": ["8a3f", [2]]}) == check
            True
        """
        worst = entry["worst"]
        return cls(**{**entry, "worst": worst and (worst[0], tuple(worst[1]))})

    @classmethod
    def of_image(cls, entry: Any, layer: str, image: str, shape: Sequence[int]) -> "LayerCheck":
        """The check of one image from a dict, if its numbers are consistent.

        Args:
            entry: The dict, as it was read.
            layer: Name of the layer.
            image: Name of the image.
            shape: Shape of the layer.

        Raises:
            ValueError: If they are not; the message says which number is wrong.
        """
        try:
            check = cls.from_dict(entry)
            conditions = _conditions(check, layer, image, shape)
            fault = next((fault for fault, holds in conditions if not holds), None)
        except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            msg = f"{layer} has no errors of units"
            raise ValueError(msg) from error
        if fault is not None:
            msg = f"{layer} has {fault}"
            raise ValueError(msg)
        return check


Conditions = Iterator[tuple[str, bool]]
"""What is wrong if a condition does not hold, and whether it holds."""


def _conditions(check: LayerCheck, layer: str, image: str, shape: Sequence[int]) -> Conditions:
    """Conditions on the check of one image, in an order in which each may rely on those before."""
    numbers = (*(getattr(check, name) for name in COUNTS), *check.signed)
    yield "counts that are no counts", all(type(n) is int and n >= 0 for n in numbers)
    is_whole = check.layer == layer and check.units == prod(shape)
    yield f"{check.units} units instead of {prod(shape)}", is_whole
    yield from _histogram_conditions(check)
    is_possible = max(check.zero, check.within + check.rounded) <= check.units
    yield "too many units of zero or of rounding", is_possible
    yield from _error_conditions(check)
    name, unit = check.worst or ("", ())
    fits = len(unit) == len(shape) and all(
        type(i) is int and 0 <= i < n for i, n in zip(unit, shape, strict=True)
    )
    yield "a worst unit that does not exist", name == image and fits


def _histogram_conditions(check: LayerCheck) -> Conditions:
    """Conditions on the histogram, and on the counts that follow from it."""
    middle = len(HISTOGRAM_EDGES)
    yield "a histogram with other bins", len(check.signed) == 2 * middle + 1
    total = sum(check.signed)
    yield f"a histogram of {total} units instead of {check.units}", total == check.units
    limit = HISTOGRAM_EDGES.index(SHARE_LIMIT) + 1  # bins on either side that are within 1 %
    inside = sum(check.signed[middle - limit + 1 : middle + limit])
    below = sum(check.signed[: middle + limit])
    fits = (inside, below) == (check.within, check.within_signed)
    yield "a histogram that does not fit the units within 1 %", fits


def _error_conditions(check: LayerCheck) -> Conditions:
    """Conditions on the largest errors."""
    errors = (check.largest, check.scaled, check.outside)
    are_errors = all(type(error) is float and not error < 0 for error in errors)
    yield "errors that are no errors", are_errors
    last = max(power for power, count in enumerate(check.histogram) if count)
    if check.largest == check.largest:
        expected = bisect_left(HISTOGRAM_EDGES, check.largest)
    else:  # NaN
        expected = len(HISTOGRAM_EDGES)
    yield "a largest error that does not fit the histogram", last == expected
    fits = check.outside == 0 or check.within < check.units
    yield "an outside value without a unit outside 1 %", fits


def larger(first: float, second: float) -> float:
    """The larger of two errors, where NaN is larger than any number."""
    return first if second <= first or first != first else second


def checks_of(
    layer: str, value: Tensor, reconstructed: Tensor, magnitude: Tensor, names: Sequence[str]
) -> list[LayerCheck]:
    """The check of a layer for each image.

    Args:
        layer: Name of the layer.
        value: Values of the network, ``(N, *units)``.
        reconstructed: Inner products with the hyperplanes.
        magnitude: Sums of |x h| and |b h|.
        names: Name of each image.
    """
    rows = _figures(value, reconstructed, magnitude).tolist()
    units = tuple(value.shape[1:])
    return [_check_of(row, layer, name, units) for row, name in zip(rows, names, strict=True)]


def _figures(value: Tensor, reconstructed: Tensor, magnitude: Tensor) -> Tensor:
    """The numbers of the check of each image, a row for each, in float64; see :func:`_check_of`.

    They are computed on the device of the tensors and leave it together.
    """
    error = relative_error(reconstructed, value).flatten(1)
    floor = torch.finfo(value.dtype).tiny
    sizes = value.abs().flatten(1)
    magnitudes = magnitude.flatten(1).clamp_min(floor)
    absolute = error.abs()
    scaled = (reconstructed - value).abs().flatten(1) / magnitudes
    outside = ~(absolute <= SHARE_LIMIT)  # with NaN
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
    return torch.stack([column.double() for column in columns], 1)


def _check_of(row: list[float], layer: str, image: str, shape: tuple[int, ...]) -> LayerCheck:
    """The check of one image from its row of :func:`_figures`."""
    worst, outside, within_signed, zero, rounded, largest, scaled, value_outside, *signed = row
    units = prod(shape)
    index = torch.unravel_index(torch.tensor(int(worst)), shape)
    return LayerCheck(
        layer=layer,
        units=units,
        within=units - int(outside),
        within_signed=int(within_signed),
        zero=int(zero),
        rounded=int(rounded),
        largest=largest,
        scaled=scaled,
        outside=value_outside,
        worst=(image, tuple(int(i) for i in index)),
        signed=[int(count) for count in signed],
    )


def _signed_counts(errors: Tensor) -> Tensor:
    """Counts of errors by sign and power of ten, ``(N, bins)``; NaN is in the last bin."""
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64, device=errors.device)
    power = torch.bucketize(errors.abs(), edges)
    bins = len(edges) + torch.where(errors < 0, -power, power)
    images = len(errors)
    size = 2 * len(edges) + 1
    # one count over all images: the bins of each image have their own numbers
    apart = bins + size * torch.arange(images, device=bins.device)[:, None]
    return torch.bincount(apart.flatten(), minlength=size * images).view(images, size)


def _worse(first: LayerCheck, second: LayerCheck) -> UnitOfImage | None:
    """Image and unit of the larger error of two checks.

    NaN is larger than any number. Of equal errors it is the first by name and index.
    """

    def rank(check: LayerCheck) -> tuple[bool, float, UnitOfImage | None]:
        known = check.largest == check.largest  # not NaN
        return known, -check.largest if known else 0.0, check.worst

    known = (check for check in (first, second) if check.worst is not None)
    return min(known, key=rank, default=first).worst
