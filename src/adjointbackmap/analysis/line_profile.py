"""What changes along a segment: a unit, the class scores, its hyperplane, and gates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointbackmap.analysis.angles import angles
from adjointbackmap.analysis.lines import FLOAT64, RegionLine
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import OUTPUT, Layer
from adjointbackmap.engine.operators import pull
from adjointbackmap.engine.pattern import pattern_of
from adjointbackmap.engine.workspace import bytes_of_vector, held
from adjointbackmap.rules.base import laid_out

PLANES = 200  # hyperplanes that are compared with the first one
AT_ONCE = 64  # hyperplanes in one batch


@dataclass(frozen=True)
class ClassChange:
    """The first point of a segment where another class has a higher score than the first one.

    Attributes:
        t: Position of the point.
        region: Number of the region that the point ends or lies in.
        before: The class at the start.
        after: The class behind the point.
    """

    t: float
    region: int
    before: int
    after: int


@dataclass(frozen=True)
class LineProfile:
    """A unit and its hyperplane along a segment, made by :func:`line_profile`.

    Attributes:
        line: The segment.
        layer: Name of the layer.
        unit: Index of the unit in the layer's output.
        values: The unit at both ends of each region, ``(K, 2)``.
        scores: Scores of all classes at both ends of each region, ``(K, 2, classes)``; ``None``
            if the network's output is not one number per class.
        regions: Numbers of the regions whose hyperplanes are compared, in order, ``(P,)``.
        turned: Angle between the image parts of the hyperplane in these regions and in the first
            one, in degrees, ``(P,)``.
        stretched: Length of the image part in these regions divided by that in the first one.
    """

    line: RegionLine
    layer: str
    unit: tuple[int, ...]
    values: Tensor
    scores: Tensor | None
    regions: Tensor
    turned: Tensor
    stretched: Tensor

    @cached_property
    def change(self) -> ClassChange | None:
        """The first change of the predicted class; ``None`` if there is none."""
        return None if self.scores is None else class_change(self.line, self.scores)

    def turned_at(self, region: int) -> float:
        """Angle of the hyperplane in a region to that in the first one, in degrees.

        Raises:
            ValueError: If the hyperplane of this region was not compared.
        """
        found = (self.regions == region).nonzero().flatten()
        if not len(found):
            msg = f"region must be one of those in regions. Got {region}: compare more planes."
            raise ValueError(msg)
        return float(self.turned[found[0]])

    def numbers(self) -> dict[str, np.ndarray]:
        """The numbers of the figure, keyed by name."""
        found = {
            "t": self.line.t,
            "values": self.values,
            "planes_at": self.line.middles[self.regions],
            "turned": self.turned,
            "stretched": self.stretched,
        }
        if self.scores is not None:
            found["scores"] = self.scores
        arrays = {name: values.cpu().numpy() for name, values in found.items()}
        for name, places in self.line.flip_places().items():
            arrays[f"flips of {name}"] = places.cpu().numpy()
        return arrays

    def draw(self, names: Sequence[str] | None = None, title: str = "") -> Any:
        """Draw the profile, see :meth:`adjointbackmap.RegionLine.plot`."""
        from adjointbackmap.analysis.line_figures import draw

        return draw(self, names, title)


def line_profile(
    line: RegionLine,
    layer: str | nn.Module = OUTPUT,
    unit: tuple[int, ...] | int | None = None,
    planes: int = PLANES,
) -> LineProfile:
    """Follow a unit and its hyperplane along a segment.

    Args:
        line: The segment.
        layer: Name of a layer, or a module of the model.
        unit: Index in the layer's output; by default the largest one at the start.
        planes: Number of hyperplanes to compare with the first one. They are spread evenly over
            the regions. The last region, and those on both sides of the first change of the class,
            are always among them.

    Raises:
        ValueError: If there is no such layer or unit, or ``planes`` is less than 1.
    """
    if planes < 1:
        msg = f"planes must be at least 1. Got {planes}: give a number of hyperplanes."
        raise ValueError(msg)
    chosen = line.network.layer(layer)
    found = line.values(chosen.name)
    place = _unit(found[0, 0], unit)
    scores = line.values(OUTPUT) if len(line.network.layers[OUTPUT].out_shape) == 1 else None
    regions = _spread(line.regions, planes)
    change = None if scores is None else class_change(line, scores)
    if change is not None:
        beside = [change.region, min(change.region + 1, line.regions - 1)]
        regions = torch.cat([regions, torch.tensor(beside)]).unique()
    images = _image_parts(line, chosen, place, regions)
    sizes = images.flatten(1).norm(dim=1)
    return LineProfile(
        line,
        chosen.name,
        place,
        found.movedim((0, 1), (-2, -1))[place],
        scores,
        regions,
        angles(images[:1].expand_as(images), images, 1),
        sizes / sizes[0],
    )


def _unit(values: Tensor, unit: tuple[int, ...] | int | None) -> tuple[int, ...]:
    """The index of a unit.

    Raises:
        ValueError: If there is none.
    """
    if unit is None:
        flat = values.argmax()
        return tuple(int(i) for i in torch.unravel_index(flat, values.shape))
    place = (unit,) if isinstance(unit, int) else tuple(unit)
    fits = len(place) == values.dim() and all(
        -extent <= i < extent for i, extent in zip(place, values.shape, strict=True)
    )
    if not fits:
        msg = f"unit must be an index into {tuple(values.shape)}. Got {unit}: choose another."
        raise ValueError(msg)
    return tuple(i % extent for i, extent in zip(place, values.shape, strict=True))


def _spread(regions: int, count: int) -> Tensor:
    """Numbers of at most ``count + 1`` regions, evenly spread, the first and the last included."""
    return torch.linspace(0, regions - 1, min(count + 1, regions)).round().long().unique()


def _image_parts(line: RegionLine, layer: Layer, unit: tuple[int, ...], regions: Tensor) -> Tensor:
    """Image parts of a unit's hyperplane in some regions, ``(P, C, H, W)``."""
    seed = line.start.new_zeros(1, *layer.out_shape)
    seed[0][unit] = 1
    each = bytes_of_vector(held(line.network.program(FLOAT64).steps), seed.element_size())
    most = max(1, min(AT_ONCE, line.memory // each))
    found = []
    with exact(seed.device):
        for part in regions.split(most):
            pattern = pattern_of(line.network, line.at(line.middles[part]), 1.0)
            seeds = laid_out(seed.expand(len(part), *layer.out_shape))
            found.append(pull(pattern, {layer.value.slot: seeds})[0])
    return torch.cat(found)


def class_change(line: RegionLine, scores: Tensor) -> ClassChange | None:
    """The first point of a segment where the predicted class changes.

    Args:
        line: The segment.
        scores: Scores of all classes at both ends of each region, ``(K, 2, classes)``.
    """
    first = int(scores[0, 0].argmax())
    gaps = scores - scores[:, :, first : first + 1]
    wins = (gaps > 0).any(1)  # within a region scores are linear: a look at its ends is enough
    regions = wins.any(1).nonzero().flatten()
    if not len(regions):
        return None
    region = int(regions[0])
    left, right = gaps[region]
    # a class that wins at the left end already does so after a jump
    weight = torch.where(left > 0, 0.0, -left / (right - left))
    weight = torch.where(wins[region], weight, torch.inf)
    t = torch.lerp(line.t[region], line.t[region + 1], weight.min())
    return ClassChange(float(t), region, first, int(weight.argmin()))
