"""The receipt of a unit: the lines that sum to its value.

A line is what a region or a channel of the image, or the biases of a layer, add to the value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from adjointbackmap.display import Shown, Summary, Table
from adjointbackmap.planes.single import SingleHyperplane, single
from adjointbackmap.planes.units import input_names

if TYPE_CHECKING:
    from adjointbackmap.planes.hyperplane import Hyperplanes
    from adjointbackmap.plots import Drawing

MOST_BIASES = 12  # parts of b that are listed; the others are one line
# Regions along each axis of the receptive field: 9 regions, or 8 for volumes.
REGIONS = {0: (9,), 1: (9,), 2: (3, 3), 3: (2, 2, 2)}
COLOURS = ("red", "green", "blue")
PIXELS = "pixels"
BIASES = "biases"


@dataclass(frozen=True)
class ReceiptLine:
    """One line of a receipt.

    Attributes:
        name: What adds the amount.
        amount: What it adds to the value.
        kind: ``"pixels"`` or ``"biases"``.
        box: First place and extent of a region along each axis of the image, ``(2, axes)``.
    """

    name: str
    amount: float
    kind: str
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Receipt(Shown):
    """What pixels and biases add to the value of one unit. The lines sum to the value.

    Attributes:
        lines: Regions or channels of the image, then the parts of ``b`` in the order of execution.
        plane: The hyperplane.
        by: ``"region"`` or ``"channel"``.
    """

    lines: tuple[ReceiptLine, ...]
    plane: SingleHyperplane
    by: str

    @property
    def total(self) -> float:
        """Sum of the lines, in float64."""
        return sum(line.amount for line in self.lines)

    @property
    def value(self) -> float:
        """What the untouched model computes for the unit."""
        return self.plane.value

    @property
    def error(self) -> float:
        """The sum of the lines minus the model's value: rounding."""
        return self.total - self.value

    def of(self, kind: str) -> float:
        """Sum of the lines of one kind, ``"pixels"`` or ``"biases"``."""
        return sum(line.amount for line in self.lines if line.kind == kind)

    def plot(self, over: Any = None, title: str | None = None) -> "Drawing":
        """The receipt as a waterfall beside the image, see :func:`adjointbackmap.plots.receipt`.

        Args:
            over: What :func:`adjointbackmap.image` gave, to draw the photo itself; by default the
                image that the network took.
            title: Heading of the figure.
        """
        from adjointbackmap import plots

        return plots.receipt(self, over, title)

    def _summary(self) -> Summary:
        facts = {
            "unit": f"{self.plane.name} ({self.plane.mode})",
            "pixels + biases": f"{self.of(PIXELS):+.5g} {self.of(BIASES):+.5g} = {self.total:.5g}",
            "value of the model": f"{self.value:.5g}",
            "difference": f"{self.error:.1e}",
        }
        if self.plane.network.note:
            facts["gates"] = self.plane.network.note
        rows = [(line.name, line.kind, f"{line.amount:+.5g}") for line in self.lines]
        return Summary("Receipt", facts, {"": Table(("from", "kind", "adds"), rows)})

    def _pictures(self) -> list[tuple[str, bytes]]:
        return self.plane._pictures()


def receipt_of(
    planes: "Hyperplanes",
    unit: Any = None,
    image: int = 0,
    by: str = "region",
    most: int = MOST_BIASES,
) -> Receipt:
    """The receipt of one unit, see :meth:`adjointbackmap.Hyperplanes.receipt`.

    Raises:
        ValueError: If ``by`` is unknown, ``most`` is not positive, or the index does not choose one
            unit.
    """
    if by not in ("region", "channel"):
        msg = f"by must be region or channel. Got {by!r}: choose one of these."
        raise ValueError(msg)
    if most < 1:
        msg = f"most must be a positive number of lines. Got {most}: give such as {MOST_BIASES}."
        raise ValueError(msg)
    plane = single(planes, unit, image)
    added = plane.contributions()
    pixels = _regions(added, plane) if by == "region" else _channels(added)
    return Receipt((*pixels, *_biases(plane.bias_contributions(), most)), plane, by)


def _channels(added: Tensor) -> Iterator[ReceiptLine]:
    names = COLOURS if len(added) == 3 else tuple(f"channel {i}" for i in range(len(added)))
    for name, part in zip(names, added, strict=True):
        yield ReceiptLine(name, float(part.sum()), PIXELS)


def _regions(added: Tensor, plane: SingleHyperplane) -> Iterator[ReceiptLine]:
    """The receptive field in regions; what is outside adds nothing."""
    spatial = added.dim() - 1
    shape = tuple(added.shape[1:]) or tuple(added.shape)
    names = input_names(spatial)[1:] or ("feature",)
    field = plane.field
    first = field[:2] if field is not None else (0,) * len(shape)
    extent = field[2:] if field is not None else shape
    parts = REGIONS.get(spatial, (2,) * spatial)
    pieces = [
        [run + start for run in np.array_split(np.arange(n), min(n, k)) if len(run)]
        for start, n, k in zip(first, extent, parts, strict=True)
    ]
    for runs in product(*pieces):
        part = added
        for axis, run in enumerate(runs, start=min(spatial, 1)):
            part = part.narrow(axis, int(run[0]), len(run))
        box = tuple(int(run[0]) for run in runs), tuple(len(run) for run in runs)
        words = (_interval(name, run) for name, run in zip(names, runs, strict=True))
        yield ReceiptLine(", ".join(words), float(part.sum()), PIXELS, box)


def _interval(name: str, run: np.ndarray) -> str:
    """Places along an axis in words, such as ``rows 0-10``."""
    plural = {"col": "columns", "row": "rows"}.get(name, f"{name}s")
    return f"{plural} {run[0]}-{run[-1]}"


def _biases(parts: dict[str, float], most: int) -> Iterator[ReceiptLine]:
    """The parts that add most, in the order of execution, and the others in one line."""
    largest = sorted(parts, key=lambda name: -abs(parts[name]))[:most]
    if len(parts) <= most + 1:  # a last one may as well have its own name
        largest = list(parts)
    else:
        largest = [name for name in largest if parts[name] != 0]
    for name, amount in parts.items():
        if name in largest:
            yield ReceiptLine(name, amount, BIASES)
    others = [amount for name, amount in parts.items() if name not in largest]
    if others:
        yield ReceiptLine(f"{len(others)} other parts", sum(others), BIASES)
