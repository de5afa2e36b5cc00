"""Effective receptive fields of units, and the sparsity of RM4 hyperplanes per layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, prod
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adjointbackmap.capture.precision import exact
from adjointbackmap.display import ShownFields
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network, check_network, several
from adjointbackmap.engine.patches import Patches
from adjointbackmap.engine.pattern import ActivationPattern, pattern_of
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.engine.windows import Group, Windows
from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.streaming import stream
from adjointbackmap.planes.units import is_position
from adjointbackmap.rules.base import Shape


@dataclass(frozen=True, repr=False)
class EffectiveFields(ShownFields):
    """The pixels that units use, and the pixels that they could depend on.

    Attributes:
        theoretical: Extent of each unit's receptive field inside the image, ``(*units, axes)``.
        effective: Extent of the bounding box of the pixels that the hyperplane uses,
            ``(N, *units, axes)``; 0 if it uses none.
        used: Share of the theoretical field's pixels that the hyperplane uses, ``(N, *units)``.
    """

    theoretical: Int[Tensor, "*units axes"]
    effective: Int[Tensor, "n *units axes"]
    used: Float[Tensor, "n *units"]


def effective_fields(planes: Hyperplanes) -> EffectiveFields:
    """Effective and theoretical receptive fields of units, from their hyperplanes [Luo2016].

    A pixel is used if the image part is not zero in at least one channel. The theoretical field
    follows from the geometry of the layers and is cut to the image.

    Args:
        planes: Hyperplanes of a layer, on images with positions.

    Raises:
        ValueError: If the images have no positions.

    Example:
        >>> from adjointbackmap import hyperplanes, trace
        >>> model = torch.nn.Conv2d(1, 1, 3, padding=1).eval()
        >>> network = trace(model, torch.zeros(1, 1, 5, 5))
        >>> planes = hyperplanes(network, torch.rand(1, 5, 5), "output", "RM2")
        >>> fields = effective_fields(planes)
        >>> fields.theoretical[0, 0, 0].tolist(), fields.effective[0, 0, 0, 0].tolist()
        ([2, 2], [2, 2])
        >>> float(fields.used.min())
        1.0
    """
    theoretical = _theoretical(planes)
    used = _used(planes)
    axes = theoretical.shape[-1]
    along = [used.movedim(a - axes, -1) for a in range(axes)]
    extents = [_extent(m.flatten(-axes, -2).any(-2) if axes > 1 else m) for m in along]
    share = used.flatten(-axes).sum(-1, dtype=planes.value.dtype) / theoretical.prod(-1).clamp_min(
        1
    )
    return EffectiveFields(theoretical, torch.stack(extents, -1), share)


def _extent(used: Tensor) -> Tensor:
    """Distance from the first to the last true element of ``(..., places)``, both included."""
    places = torch.arange(1, used.shape[-1] + 1, device=used.device)
    last = (used * places).amax(-1)
    first = torch.where(used, places, used.shape[-1] + 1).amin(-1)
    return torch.where(last > 0, last - first + 1, 0)


def _used(planes: Hyperplanes) -> Tensor:
    """Which pixels the units use, ``(N, *units, *pixels)``.

    If image parts are patches, the pixels are those of the patch.
    """
    part = planes.image_part
    axes = planes.x.dim() - 2
    return ((part.values if isinstance(part, Patches) else part) != 0).any(-1 - axes)


def _theoretical(planes: Hyperplanes) -> Tensor:
    """Extent of each unit's receptive field inside the image, ``(*units, axes)``.

    Raises:
        ValueError: If the images have no positions.
    """
    image = planes.network.in_shape[1:]
    if not image:
        msg = (
            "Receptive fields must be those of images with positions. Got images of shape "
            f"{planes.network.in_shape}."
        )
        raise ValueError(msg)
    extents = torch.tensor(image).expand(*planes.units.shape, len(image)).clone()
    places = planes.units.coordinates()
    positions = [place[0] for name, place in places.items() if is_position(name)]
    for a, inside in enumerate(
        _inside(planes.network, planes.network.layer(planes.layer)) if positions else [],
    ):
        extents[..., a] = inside[positions[a]]
    return extents.to(planes.value.device)


def _inside(network: Network, layer: Layer) -> list[Tensor]:
    """Extent of each position's receptive field inside the image, one tensor per axis.

    The list is empty if the layer has no field.
    """
    field = network.program().fields[layer.value.slot]
    image = network.in_shape[1:]
    if field == ():  # the layer does not depend on the image
        return [torch.zeros(count, dtype=torch.int64) for count in layer.out_shape[1:]]
    extents = []
    for axis, count, extent in zip(field or (), layer.out_shape[1:], image, strict=False):
        ends = [
            (ceil(p * axis.step + axis.low), floor(p * axis.step + axis.high)) for p in range(count)
        ]
        extents.append(
            torch.tensor(
                [max(0, min(extent - 1, last) - max(0, first) + 1) for first, last in ends],
            )
        )
    return extents


@dataclass(repr=False)
class Sparsity(ShownFields):
    """How many of a layer's RM4 hyperplanes are zero, and how much of their field the others use.

    :meth:`merge` adds the counts of other images.

    Attributes:
        layer: Name of the layer.
        hyperplanes: Number of RM4 hyperplanes, over all images.
        zero: Number of hyperplanes whose image part is zero.
        full: Number of hyperplanes that use every pixel of their receptive field.
        pixels: Number of pixels of all receptive fields, inside the image.
        used: Number of these pixels that are used: not zero in at least one channel.
    """

    layer: str
    hyperplanes: int = 0
    zero: int = 0
    full: int = 0
    pixels: int = 0
    used: int = 0

    @property
    def zero_share(self) -> float:
        """Share of the hyperplanes that are zero."""
        return self.zero / self.hyperplanes

    @property
    def used_share(self) -> float:
        """Share of the receptive fields that is used."""
        return self.used / self.pixels

    @property
    def full_share(self) -> float:
        """Share of the hyperplanes that use their whole receptive field."""
        return self.full / self.hyperplanes

    def add(self, used: Tensor, pixels: Tensor) -> None:
        """Count some hyperplanes.

        ``used`` holds used pixels ``(N, *units)``; ``pixels`` holds the sizes of the receptive
        fields and broadcasts to it.
        """
        pixels = pixels.expand_as(used)
        self.hyperplanes += used.numel()
        self.zero += int((used == 0).sum())
        self.full += int((used == pixels).sum())
        self.pixels += int(pixels.sum())
        self.used += int(used.sum())

    def merge(self, other: "Sparsity") -> None:
        """Add the counts of other images."""
        for name in ("hyperplanes", "zero", "full", "pixels", "used"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def sparsity(
    network: Network,
    x: Tensor,
    layers: str | nn.Module | Sequence[str | nn.Module] | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> dict[str, Sparsity]:
    """Sparsity of the RM4 hyperplanes per layer [Wan2022, section 2.5.3].

    One sweep per image serves all layers.

    Args:
        network: Traced network.
        x: Image or batch.
        layers: Names or modules of convolutions; by default all.
        report: Called with the share of the sweeps that are done.

    Returns:
        Name of a layer -> its counts.

    Raises:
        ValueError: If a layer or ``x`` does not fit the network, or a layer has no RM4.

    Example:
        >>> from adjointbackmap import trace
        >>> layers = torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Conv2d(2, 2, 3)
        >>> model = torch.nn.Sequential(*layers).eval()
        >>> _ = model[0].bias.data.fill_(-100.0)
        >>> found = sparsity(trace(model, torch.zeros(1, 1, 6, 6)), torch.rand(1, 6, 6))
        >>> {name: (layer.zero_share, layer.used_share) for name, layer in found.items()}
        {'0': (0.0, 1.0), '2': (1.0, 0.0)}
    """
    queries = _queries(network, x, layers)
    counts = {query.layer.name: Sparsity(query.layer.name) for query in queries}
    swept = [query for query in queries if _is_swept(query)]
    images = swept[0].images.split(1) if swept else ()
    for n, image in enumerate(images):
        pattern = pattern_of(network, image, 1.0)

        def report_image(share: float, n: int = n) -> None:
            report((n + share) / len(images))

        found = _used_by_sweep(swept, pattern, report_image)
        for query, used in zip(swept, found, strict=True):
            counts[query.layer.name].add(used, _pixels(query))
    for query in queries:
        if not _is_swept(query):
            work = stream(query)
            for planes in map(work.compute, work.blocks):
                used = _used(planes).flatten(1 + len(planes.units.shape)).sum(-1)
                counts[query.layer.name].add(used, _theoretical(planes).prod(-1))
    return counts


def _queries(
    network: Network,
    x: Tensor,
    layers: str | nn.Module | Sequence[str | nn.Module] | None,
) -> list[Query]:
    """One query for the RM4 hyperplanes of each layer.

    Raises:
        ValueError: If a layer has no RM4 hyperplanes, or no layer is given.
    """
    check_network(network)
    every = [layer.name for layer in network.distinct_layers() if "RM4" in layer.modes]
    wanted = every if layers is None else several(layers)
    if not wanted:
        return []
    first = Query.of(network, x, wanted[0], "RM4")
    return [first, *(first.at_layer(layer, "RM4") for layer in wanted[1:])]


def _is_swept(query: Query) -> bool:
    """Whether a sweep of window tangents computes a layer's hyperplanes."""
    return query.readout.apart is not None and len(query.network.in_shape) > 1


def _pixels(query: Query) -> Tensor:
    """Number of pixels of each position's receptive field inside the image."""
    inside = _inside(query.network, query.layer)
    if not inside:
        return torch.tensor(prod(query.network.in_shape[1:]), device=query.network.device)
    return torch.stack(torch.meshgrid(*inside, indexing="ij")).prod(0).to(query.network.device)


def _used_by_sweep(
    queries: Sequence[Query],
    pattern: ActivationPattern,
    report: Callable[[float], None],
) -> list[Tensor]:
    """How many pixels each RM4 hyperplane uses at one image.

    Each layer has counts ``(in-channels * out-channels, *positions)``.
    """
    readouts = [query.readout for query in queries]
    sweep = Sweep(pattern, [r.source for r in readouts], [r.apart for r in readouts if r.apart])
    device = pattern.network.device
    counts = [torch.zeros(r.elements.shape, dtype=pattern.dtype, device=device) for r in readouts]
    with exact(device):
        groups = list(sweep.groups())
        for done, group in enumerate(groups, start=1):
            tangents = sweep.run(group)
            for readout, count in zip(readouts, counts, strict=True):
                apart = (
                    sweep.step(group, readout.apart, [tangents[readout.source.slot]])
                    if readout.apart
                    else None
                )
                if apart is not None:
                    count += _pixels_used(sweep, group, apart, readout.elements.shape)
            report(done / len(groups))
    return counts


def _pixels_used(sweep: Sweep, group: Group, tangents: Windows | Tensor, shape: Shape) -> Tensor:
    """How many of a group's pixels move each unit in at least one channel."""
    pixels = prod(group.count)
    tensor = tangents.tensor if isinstance(tangents, Windows) else tangents
    moved = (tensor != 0).unflatten(0, (pixels, -1)).any(1).to(tensor.dtype)
    marked = (
        Windows(moved, tangents.spans, tangents.clean) if isinstance(tangents, Windows) else moved
    )
    return cast("Tensor", sweep.inner(group, marked, moved.new_ones(1, pixels, 1), shape))[0, 0]
