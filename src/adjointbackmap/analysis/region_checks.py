"""Tests of exactness for lines, maps and integrals: each gives its figures, or raises with them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from adjointbackmap.analysis.integrals import IntegratedGradients
from adjointbackmap.analysis.lines import FLOAT64, REGIONS_AT_ONCE, RegionLine
from adjointbackmap.analysis.maps import RegionMap
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.pattern import ActivationPattern, pattern_of

MARGIN = 64  # uncertainties: a region must be wider than this, or it is skipped
SKIPPED = 0.01  # largest share of regions that may be skipped
INSIDE = 0.98  # random points are in this middle share of a region
COMPLETENESS = 1e-11  # of the sum of absolute contributions
AREA = 1e-12  # share of the window


def line_test(line: RegionLine, points: int = 16, seed: int = 0) -> dict[str, float]:
    """Test that gates are constant inside every region of a line, and differ across breakpoints.

    The activation pattern of the network at random points of each region is compared with that of
    its middle. The middles of neighbouring regions are compared too.

    Args:
        line: The line.
        points: Random points of each region.
        seed: Seed of the points.

    Returns:
        ``regions``, and ``skipped``: the share of regions that are too narrow for their
        uncertainty.

    Raises:
        RuntimeError: If a gate changes inside a region, no gate changes across a breakpoint, or
            more than 1 % of the regions are skipped.

    Example:
        >>> from torch import nn
        >>> from adjointbackmap import region_line, trace
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> line = region_line(trace(model, torch.zeros(1, 3)), -torch.ones(3), torch.ones(3))
        >>> line_test(line)["skipped"]
        0.0
    """
    generator = torch.Generator().manual_seed(seed)
    wide = line.widths > MARGIN * (line.uncertainty[:-1] + line.uncertainty[1:])
    kept = wide.nonzero().flatten()
    skipped = 1 - len(kept) / line.regions
    _require(skipped <= SKIPPED, f"at most 1 % of regions too narrow to test. Got {skipped:.1%}")
    for part in kept.split(REGIONS_AT_ONCE):
        pattern = _pattern(line, line.middles[part])
        for _ in range(points):
            share = torch.rand(len(part), generator=generator, dtype=FLOAT64).to(line.t.device)
            places = line.t[part] + ((1 - INSIDE) / 2 + INSIDE * share) * line.widths[part]
            same = equal_gates(pattern, _pattern(line, places))
            where = part[~same].tolist()[:5]
            _require(bool(same.all()), f"constant gates inside every region. Got others in {where}")
    pairs = torch.arange(line.regions - 1, device=line.t.device)
    for part in pairs.split(REGIONS_AT_ONCE) if len(pairs) else ():
        before, after = (_pattern(line, line.middles[part + side]) for side in (0, 1))
        both = wide[part] & wide[part + 1]
        same = equal_gates(before, after) & both
        where = line.t[1:][part[same]].tolist()[:5]
        _require(not bool(same.any()), f"other gates across every breakpoint. Got none at {where}")
    return {"regions": float(line.regions), "skipped": skipped}


def map_test(found: RegionMap, points: int = 4, seed: int = 0) -> dict[str, float]:
    """Test that areas sum to the window, gates are constant inside polygons, and values are exact.

    Args:
        found: A complete map.
        points: Random points of each polygon.
        seed: Seed of the points.

    Returns:
        ``polygons``, ``skipped`` (share of polygons that are too small to test), ``area`` (error of
        the sum of areas, relative to the window) and ``value`` (largest error of the output,
        relative to its largest value).

    Raises:
        RuntimeError: If one of these does not hold.

    Example:
        >>> from torch import nn
        >>> from adjointbackmap import region_map, trace
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> images = torch.eye(3)
        >>> found = region_map(trace(model, torch.zeros(1, 3)), *images)
        >>> map_test(found)["area"] < 1e-12
        True
    """
    area = abs(found.covered - 1)
    _require(area <= AREA, f"areas that sum to the window's. Got {found.covered:.15f} of it")
    generator = torch.Generator().manual_seed(seed)
    polygons = found.polygons
    centres = polygons.centres()
    # a polygon is skipped if its area is that of a strip as narrow as vertices are uncertain
    wide = found.areas > MARGIN * MARGIN * torch.finfo(FLOAT64).eps * found.window_area
    kept = wide.nonzero().flatten()
    skipped = 1 - len(kept) / len(polygons)
    _require(skipped <= SKIPPED, f"at most 1 % of polygons too small to test. Got {skipped:.1%}")
    worst = 0.0
    largest = float(found.coefficients[:, 0].abs().max()) or 1.0
    for part in kept.split(REGIONS_AT_ONCE):
        middle = _pattern(found, centres[part])
        for _ in range(points):
            weights = torch.rand(len(part), polygons.vertices.shape[1], generator=generator)
            weights = weights.to(centres) * polygons.inside[part]
            weights = weights / weights.sum(1, keepdim=True)
            mean = (polygons.vertices[part] * weights[..., None]).sum(1)
            places = centres[part] + INSIDE * (mean - centres[part])
            pattern = _pattern(found, places)
            same = equal_gates(middle, pattern)
            where = part[~same].tolist()[:5]
            _require(bool(same.all()), f"constant gates inside polygons. Got others in {where}")
            own = _outputs(found, places)
            gap = float((found.values(places, part) - own).abs().max())
            if gap > found.rounding:
                worst = max(worst, gap / largest)
    _require(worst <= COMPLETENESS, f"values of the network to {COMPLETENESS}. Got {worst:.1e}")
    return {
        "polygons": float(len(polygons)),
        "skipped": skipped,
        "area": area,
        "value": worst,
    }


def integral_test(found: IntegratedGradients) -> dict[str, float]:
    """Test that pixels and jumps sum to the change of every unit.

    Args:
        found: Exact integrated gradients.

    Returns:
        ``error``: the largest difference, relative to the sum of absolute contributions. A
        difference that is no more than the rounding of the unit counts as zero.

    Raises:
        RuntimeError: If it is larger than 1e-11.

    Example:
        >>> from torch import nn
        >>> from adjointbackmap import integrated_gradients, trace
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> found = integrated_gradients(trace(model, torch.zeros(1, 3)), torch.ones(3))
        >>> integral_test(found)["error"] < 1e-11
        True
    """
    gap = (found.total() - found.change).abs().flatten(1)
    # where all contributions vanish, the change is a rounding error too
    counts = gap > found.rounding.to(gap.device)[:, None]
    error = float(torch.where(counts, found.error().flatten(1), 0.0).max())
    _require(error <= COMPLETENESS, f"a sum that is the change to {COMPLETENESS}. Got {error:.1e}")
    return {"error": error}


def _require(holds: bool, what: str) -> None:
    """Raise if something does not hold.

    Raises:
        RuntimeError: If it does not.
    """
    if not holds:
        msg = f"Regions must have {what}: please report this network."
        raise RuntimeError(msg)


def _pattern(found: RegionLine | RegionMap, places: Tensor) -> ActivationPattern:
    with exact(places.device):
        return pattern_of(found.network, found.at(places), 1.0)


def _outputs(found: RegionMap, places: Tensor) -> Tensor:
    layer = found.network.layers[OUTPUT]
    return record(found.network, found.at(places), [layer]).outputs[OUTPUT].detach()


def equal_gates(one: ActivationPattern, other: ActivationPattern) -> Tensor:
    """Which images have the same gates in two patterns, ``(N,)``."""
    same = torch.ones(one.images, dtype=torch.bool, device=one.network.device)
    for first, second in _pairs(one, other):
        if len(first) > 1 or one.images == 1:  # a constant mask has one row for all images
            same &= (first == second).flatten(1).all(1)
    return same


def _pairs(one: ActivationPattern, other: ActivationPattern) -> Iterator[tuple[Tensor, Tensor]]:
    for slot, gates in one.gates.items():
        yield from zip(gates, other.gates[slot], strict=True)
