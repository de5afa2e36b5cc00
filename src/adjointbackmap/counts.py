"""The errors of every unit of a layer, as counts that add up in any order."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.hyperplane import relative_error

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

    def add(self, value: Tensor, reconstructed: Tensor, magnitude: Tensor, names: list[str]) -> None:
        """Count the units of some images.

        Args:
            value: What the network computes, ``(N, *units)``.
            reconstructed: The inner products with the hyperplanes.
            magnitude: Sum of |x h| and |b h|.
            names: Name of each image.
        """
        for n, name in enumerate(names):
            self.merge(_counted(self.layer, value[n], reconstructed[n], magnitude[n], name))

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


def larger(first: float, second: float) -> float:
    """The larger of two errors, where NaN is larger than any number."""
    return first if second <= first or first != first else second


def _counted(layer: str, value: Tensor, reconstructed: Tensor, magnitude: Tensor, name: str) -> LayerCheck:
    """The check of one image's units ``(*units)``."""
    error = relative_error(reconstructed, value)
    absolute, floor = error.abs(), torch.finfo(value.dtype).tiny
    scaled = (reconstructed - value).abs() / magnitude.clamp_min(floor)
    outside = ~(absolute <= SHARE_LIMIT)
    worst = int(absolute.argmax())
    return LayerCheck(
        layer=layer,
        units=value.numel(),
        within=value.numel() - int(outside.sum()),
        within_signed=int((error <= SHARE_LIMIT).sum()),
        zero=int((value == 0).sum()),
        rounded=int((outside & (scaled <= ROUNDING * torch.finfo(value.dtype).eps)).sum()),
        largest=float(absolute.flatten()[worst]),
        scaled=float(scaled.max()),
        outside=float(torch.where(outside, value.abs() / magnitude.clamp_min(floor), 0).max()),
        worst=(name, tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))),
        signed=_signed_counts(error.double().flatten().cpu()),
    )


def _signed_counts(error: Tensor) -> list[int]:
    """Counts by sign and power of ten; NaN is the last bin's."""
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    power = torch.bucketize(error.abs(), edges)
    bins = len(edges) + torch.where(error < 0, -power, power)
    return torch.bincount(bins, minlength=2 * len(edges) + 1).tolist()


def _worse(first: LayerCheck, second: LayerCheck) -> Place | None:
    """The place of the larger error, NaN before any number; of equal ones the first by name and unit."""

    def rank(check: LayerCheck) -> tuple[bool, float, Place | None]:
        known = check.largest == check.largest
        return known, -check.largest if known else 0.0, check.worst

    return min((check for check in (first, second) if check.worst is not None), key=rank, default=first).worst
