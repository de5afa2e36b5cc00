"""Integrated gradients without sampling: the weighted hyperplanes of the regions on a segment."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adjointbackmap.analysis.lines import FLOAT64, RegionLine, region_line
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import Recorded, record
from adjointbackmap.engine.operators import pull
from adjointbackmap.engine.pattern import check_images, pattern_of
from adjointbackmap.engine.workspace import bytes_of_vector, held
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.units import Selection
from adjointbackmap.rules.base import laid_out

VECTORS = 128  # cotangents in one batch: 32 to 128 are the fastest on the CPU
SHARE = 4  # a batch takes this part of the memory at most


@dataclass(frozen=True)
class IntegratedGradients:
    r"""Exact integrated gradients of some units, made by :func:`integrated_gradients`.

    Attributes:
        image: :math:`(x - x') \int_0^1 H_I(x' + t (x - x'))\,dt`, ``(N, *units, C, H, W)``.
        jumps: Sum of the jumps of each unit on the segment, ``(N, *units)``. Zero for a network
            without comparisons and signs.
        change: :math:`c(x) - c(x')` from the untouched model, ``(N, *units)``.
        regions: Number of linear regions of each segment, ``(N,)``.
        x: The images, ``(N, C, H, W)``.
        baseline: The baselines, ``(N, C, H, W)``.
        layer: Name of the layer.
        mode: Reconstruction mode.
        units: Which units.
        rounding: Largest rounding error of a unit of the layer, ``(N,)``.
    """

    image: Float[Tensor, "n *units_in"]
    jumps: Float[Tensor, "n *units"]
    change: Float[Tensor, "n *units"]
    regions: Tensor
    x: Tensor
    baseline: Tensor
    layer: str
    mode: str
    units: Selection
    rounding: Tensor = field(default_factory=lambda: torch.zeros(1))

    @property
    def bias(self) -> Tensor:
        """Contributions of the biases, ``(N, *units)``: all zero.

        The biases are the same at both ends of the segment. So they add nothing to the change.
        """
        return torch.zeros_like(self.change)

    def total(self) -> Float[Tensor, "n *units"]:
        """Sum over pixels and jumps, which equals :attr:`change` to rounding."""
        return self._over_pixels(self.image) + self.jumps

    def error(self) -> Float[Tensor, "n *units"]:
        """Difference of sum and change, relative to the sum of absolute contributions.

        It is zero where all contributions are zero and the change is too.
        """
        size = self._over_pixels(self.image.abs()) + self.jumps.abs()
        gap = (self.total() - self.change).abs()
        return torch.where(gap == 0, gap, gap / size)

    def _over_pixels(self, values: Tensor) -> Tensor:
        return values.flatten(self.change.dim()).sum(-1)


def integrated_gradients(
    network: Network,
    x: Tensor,
    baseline: Tensor | float | int = 0.0,
    layer: str | nn.Module = OUTPUT,
    mode: str | None = None,
    units: Any = None,
    memory: str | float | int | None = "2GiB",
) -> IntegratedGradients:
    r"""Integrated gradients [Sundararajan2017] without sampling, for any unit of any layer.

    .. math:: (x - x')\,\int_0^1 H_I(x' + t (x - x'))\,dt
        = (x - x')\,\sum_r (t_{r+1} - t_r)\, H_I^{(r)}

    The sum goes over the linear regions of the segment, see :func:`region_line`. In each of them
    the hyperplane :math:`H^{(r)}` is constant. Pixels and jumps sum to :math:`c(x) - c(x')`. The
    biases are the same at both ends, so that their part is zero. All numbers are float64.

    Args:
        network: Traced piecewise-affine network.
        x: One image ``(C, H, W)`` or a batch ``(N, C, H, W)``.
        baseline: The baseline :math:`x'`: one for all images, one for each, or a number.
        layer: Name of a layer, or a module of the model.
        mode: Reconstruction mode; by default RM2, or RM0 where the layer has no positions.
        units: Which units, see :func:`adjointbackmap.hyperplanes`.
        memory: Bytes for the result and for the values along the segment, each.

    Returns:
        The contributions of all pixels.

    Raises:
        UnsupportedOperation: If the kinks of an operation are unknown.
        ValueError: If an argument does not fit the network, or the result is larger than
            ``memory``.
        RuntimeError: If the model has changed since the trace.

    Example:
        >>> from adjointbackmap import trace
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()).eval()
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0]]))
        >>> network = trace(model, torch.zeros(1, 2))
        >>> x, baseline = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> found = integrated_gradients(network, x, baseline)
        >>> found.image.tolist(), found.total().tolist(), found.regions.tolist()
        ([[[2.0, 1.0]]], [[3.0]], [2])
    """
    query = Query.of(network, x, layer, mode, units, dtype=FLOAT64, memory=memory)
    images = query.images
    start = baselines(network, baseline, images)
    bytes_each = query.units.count * images[0].numel() * images.element_size()
    if len(images) * bytes_each > query.memory:
        msg = (
            f"The result must fit in memory={memory}. It needs {len(images) * bytes_each:,} bytes "
            f"for {len(images)} x {query.units.count:,} units: choose fewer, or raise memory."
        )
        raise ValueError(msg)
    found = [_of_image(_of_one(query, n), start[n], memory) for n in range(len(images))]
    image, jumps, change, regions, rounding = (
        torch.stack(part) for part in zip(*found, strict=True)
    )
    return IntegratedGradients(
        image,
        jumps,
        change,
        regions,
        images,
        start,
        query.layer.name,
        query.mode,
        query.units,
        rounding,
    )


def baselines(network: Network, baseline: Tensor | float | int, images: Tensor) -> Tensor:
    """Baselines as a batch as long as the images.

    Raises:
        ValueError: If they do not fit.
    """
    if not isinstance(baseline, Tensor) or not baseline.dim():
        return torch.full_like(images, float(baseline))
    found = check_images(network, baseline, FLOAT64)
    if len(found) not in (1, len(images)):
        msg = (
            f"baseline must be one image, or {len(images)} as the images. Got {len(found)}: "
            "give one for each image, or a number."
        )
        raise ValueError(msg)
    return found.expand(len(images), *found.shape[1:])


def _of_one(query: Query, n: int) -> Query:
    """The query of one of the images."""
    return query.part((slice(n, n + 1), *(slice(0, extent) for extent in query.units.shape)))


def _of_image(
    query: Query, start: Tensor, memory: str | float | int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contributions, jumps, change, number of regions and rounding of one image."""
    line = region_line(query.network, start, query.images[0], memory)
    shape = query.units.shape
    flat = query.units.numbers(slice(0, 1), 1, start.device)[0]
    slopes = start.new_empty(len(flat), *query.network.in_shape)
    done = 0
    for those in flat.split(VECTORS):
        seeds = query.readout.cotangents(those, FLOAT64)
        slopes[done : done + len(those)] = mean_hyperplane(line, seeds)
        done += len(those)
    image = ((query.images[0] - start) * slopes).reshape(*shape, *query.network.in_shape)
    both = record(query.network, torch.stack([start, query.images[0]]), [query.layer])
    ends = query.values(both)
    return (
        image,
        _jumps(query, line, both),
        ends[1] - ends[0],
        torch.tensor(line.regions),
        torch.tensor(line.walk.rounding_of([query.target])[query.target.slot], dtype=FLOAT64),
    )


def mean_hyperplane(line: RegionLine, seeds: dict[int, Tensor]) -> Tensor:
    r"""Mean image part over the regions of a line, :math:`\sum_r (t_{r+1} - t_r) H_I^{(r)}`.

    Args:
        line: A complete line.
        seeds: Cotangents of some units, keyed by slot, each ``(U, *shape)``.

    Returns:
        ``(U, C, H, W)``.
    """
    count = len(next(iter(seeds.values())))
    program = line.network.program(FLOAT64)
    each = bytes_of_vector(held(program.steps), line.t.element_size())
    most = max(1, min(max(VECTORS, program.chunk), line.memory // SHARE // each))
    total = line.start.new_zeros(count, prod(line.start.shape))
    regions = torch.arange(line.regions, device=line.t.device)
    with exact(line.t.device):
        for part in regions.split(max(1, most // count)):
            pattern = pattern_of(line.network, line.at(line.middles[part]), 1.0)
            given = {
                slot: laid_out(seed.expand(len(part), *seed.shape).flatten(0, 1))
                for slot, seed in seeds.items()
            }
            image, _ = pull(pattern, given)
            weighted = torch.tensordot(line.widths[part], image.reshape(len(part), count, -1), 1)
            total += weighted
    return total.view(count, *line.start.shape)


def _jumps(query: Query, line: RegionLine, ends: Recorded) -> Tensor:
    """Sum of the jumps of each unit, which are linear in those of the layer's input and output."""
    if not line.jumps_anywhere:
        return torch.zeros(query.units.shape, dtype=FLOAT64, device=line.t.device)
    layer = query.layer
    outputs = {layer.name: _sum_of_jumps(line.values(layer.name), ends.outputs[layer.name])}
    inputs = {}
    if layer.name in ends.inputs:
        kernel = query.network.kernel(layer, FLOAT64)
        inputs = {layer.name: _sum_of_jumps(line.limits(kernel.input), ends.inputs[layer.name])}
    return query.values(Recorded(inputs, outputs))[0]


def _sum_of_jumps(limits: Tensor, ends: Tensor) -> Tensor:
    """Sum of the jumps at all points, ``(1, *shape)``, from the limits ``(K, 2, *shape)``."""
    before = torch.cat([ends[:1], limits[:, 1]])
    after = torch.cat([limits[:, 0], ends[1:]])
    return (after - before).sum(0, keepdim=True)
