"""One hyperplane of several: the unit of one image that a picture or a receipt is about."""

from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from adjointbackmap.display import Shown, Summary, png_of
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes.thumbnails import map_png, over_png, unit_interval

if TYPE_CHECKING:
    from adjointbackmap.planes.hyperplane import Hyperplanes

Box = tuple[int, int, int, int]
MOST_BIASES = 5  # shown in a notebook


@dataclass(frozen=True, repr=False, eq=False)
class SingleHyperplane(Shown):
    """The hyperplane of one unit at one image.

    Attributes:
        image: Image part ``(C, H, W)``, in activation per unit of input.
        bias: Bias part ``(M,)``, in activation per unit of bias.
        value: What the untouched model computes for the unit.
        x: The image ``(C, H, W)``.
        place: The unit's place along each dimension of its mode.
        entries: Which of the M entries of ``b`` the layer depends on.
        network: The network.
        layer: Name of the layer.
        mode: Reconstruction mode.
        field: The receptive field, cut to the image: first row, first column, rows and columns.
            ``None`` for images without rows and columns.
    """

    image: Tensor
    bias: Float[Tensor, " m"]
    value: float
    x: Tensor
    place: dict[str, int]
    entries: Tensor
    network: Network
    layer: str
    mode: str
    field: Box | None

    @property
    def name(self) -> str:
        """The unit in words.

        Example:
            ``"conv5, row 4, column 1, channel 2"``
        """
        places = (f"{dimension_words(name)} {place}" for name, place in self.place.items())
        return ", ".join([self.layer, *places])

    def contributions(self) -> Float[Tensor, "*shape"]:
        """What each number of the image adds to the value: ``x * H_I`` in float64."""
        return self.x.double() * self.image.double()

    def bias_contributions(self) -> dict[str, float]:
        """What each part of ``b`` that the layer depends on adds to the value.

        The sums over the entries of a part are in float64.
        """
        reached = set(self.entries.tolist())
        parts = self.network.biases_in(self.bias.dtype)
        found = {}
        for name, part in parts.items():
            if not reached.isdisjoint(range(part.slice.start, part.slice.stop)):
                terms = self.bias[part.slice].double() * part.value.flatten().double()
                found[name] = float(terms.sum())
        return found

    def sum(self) -> float:
        """Inner product of [x; b] and the hyperplane, in float64."""
        return float(self.contributions().sum()) + sum(self.bias_contributions().values())

    def _summary(self) -> Summary:
        total = self.sum()
        facts = {
            "unit": f"{self.name} ({self.mode})",
            "value of the model": f"{self.value:.6g}",
            "sum of the contributions": f"{total:.6g}",
            "difference": f"{total - self.value:.1e}",
            "pixels add": f"{float(self.contributions().sum()):.4g}",
        }
        largest = sorted(self.bias_contributions().items(), key=lambda item: -abs(item[1]))
        if largest:
            biases = (f"{name} {amount:+.3g}" for name, amount in largest[:MOST_BIASES])
            facts["largest biases add"] = ", ".join(biases)
        if self.network.note:
            facts["gates"] = self.network.note
        return Summary("SingleHyperplane", facts)

    def _pictures(self) -> list[tuple[str, bytes]]:
        if self.field is None:
            return []
        over = over_png(unit_interval(self.x), self.image.sum(0), self.field)
        words = "summed over the channels, over the image"
        return [
            ("the image", png_of(unit_interval(self.x))),
            (f"hyperplane, {words}: red raises the value, blue lowers it", over),
            ("hyperplane, grey is zero", map_png(self.image)),
        ]


def single(planes: "Hyperplanes", unit: Any = None, image: int = 0) -> SingleHyperplane:
    """One hyperplane of several.

    Args:
        planes: The hyperplanes.
        unit: Index of the unit among those of the hyperplanes, an int or a tuple of ints. It may be
            left out if there is one unit.
        image: Index of the image.

    Raises:
        ValueError: If the index does not choose one unit.
    """
    key = () if unit is None else unit if isinstance(unit, tuple) else (unit,)
    shape = planes.units.shape
    if unit is None and planes.units.count == 1:
        key = (0,) * len(shape)
    number = _number(shape, key, planes.units.count)
    if not -len(planes.x) <= image < len(planes.x):
        msg = f"image must be from 0 to {len(planes.x) - 1}. Got {image}: choose one of these."
        raise ValueError(msg)
    fields = None
    if len(planes.network.in_shape) == 3:
        fields = receptive_fields(planes, np.array([number]), image)[0].tolist()
    at = 0 if planes.units.is_shared else image
    places = planes.units.coordinates()
    return SingleHyperplane(
        image=_image_part(planes, number, image),
        bias=_bias_part(planes, number, image),
        value=float(planes.value[image].reshape(-1)[number]),
        x=planes.x[image],
        place={name: int(p[at].reshape(-1)[number]) for name, p in places.items()},
        entries=planes.entries,
        network=planes.network,
        layer=planes.layer,
        mode=planes.mode,
        field=None if fields is None else tuple(fields),
    )


def receptive_fields(
    planes: "Hyperplanes",
    chosen: np.ndarray,
    image: int = 0,
) -> np.ndarray:
    """Receptive fields of some units, cut to the image, ``(k, 4)``.

    The columns are the first row, the first column, the number of rows and the number of columns.

    A field follows from the geometry of the layers. For a unit without a position it is the whole
    image.

    Args:
        planes: Hyperplanes on images with rows and columns.
        chosen: Flat indices of the units.
        image: Which image, if each has its own units.

    Raises:
        ValueError: If the images have no rows and columns.
    """
    extents = planes.network.in_shape[1:]
    if len(extents) != 2:
        msg = (
            "Receptive fields are drawn on images with rows and columns. "
            f"Got images of shape {planes.network.in_shape}."
        )
        raise ValueError(msg)
    places = planes.units.coordinates()
    own = 0 if planes.units.is_shared else image
    field = planes.network.program().fields[planes.network.layer(planes.layer).value.slot]
    first = np.zeros((len(chosen), 2), int)
    last = np.tile(np.array(extents) - 1, (len(chosen), 1))
    for a, (name, axis) in enumerate(zip(("out_row", "out_col"), field or (), strict=False)):
        if name in places:
            at = places[name][own].reshape(-1)[chosen].tolist()
            first[:, a] = [max(0, ceil(p * axis.step + axis.low)) for p in at]
            last[:, a] = [min(extents[a] - 1, floor(p * axis.step + axis.high)) for p in at]
    return np.concatenate([first, last - first + 1], 1)


def dimension_words(dimension: str) -> str:
    """A dimension of the units in words.

    Example:
        >>> [dimension_words(name) for name in ("out_col", "in_channel", "out_feature")]
        ['column', 'in-channel', 'unit']
    """
    named = dimension.removeprefix("out_").replace("col", "column").replace("_", "-")
    return "unit" if named == "feature" else named


def _number(shape: tuple[int, ...], key: tuple[Any, ...], count: int) -> int:
    """Flat index of a unit.

    Raises:
        ValueError: If the key is not one unit.
    """
    fits = len(key) == len(shape) and all(
        isinstance(k, int | np.integer) and -n <= k < n for k, n in zip(key, shape, strict=True)
    )
    if not fits:
        of = f"one of the {count} units, an index into {tuple(shape)}"
        got = key[0] if len(key) == 1 else key or "none"
        msg = f"unit must be {of}. Got {got}: choose one, as in unit={(0,) * len(shape)}."
        raise ValueError(msg)
    return int(np.arange(count).reshape(shape)[key])


def _image_part(planes: "Hyperplanes", number: int, image: int) -> Tensor:
    """Image part ``(C, H, W)`` of one unit."""
    part = planes.image_part
    units = len(planes.units.shape)
    if not isinstance(part, Patches):
        return part[image].reshape(-1, *part.shape[1 + units :])[number]
    values = part.values[image].reshape(-1, *part.values.shape[1 + units :])[number]
    corner = part.corners.reshape(-1, 2)[number]
    return Patches(values[None, None], corner[None], part.image).dense()[0, 0]


def _bias_part(planes: "Hyperplanes", number: int, image: int) -> Tensor:
    """Bias part ``(M,)`` of one unit."""
    compact = planes.bias_part[image]
    row = compact.reshape(planes.units.count, compact.shape[-1])[number]
    whole = row.new_zeros(len(planes.network.biases))
    whole[planes.entries] = row
    return whole
