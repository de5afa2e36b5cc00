"""A check that no receptive field of a network is too small.

Hyperplanes on patches and tangents on windows are compared with those on whole images.
"""

import random
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.auditing import AUDIT_TOLERANCE
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.operators import pull, push
from adjointbackmap.engine.pattern import ActivationPattern, pattern_of
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.engine.windows import Group, strides_of
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.units import unit_dims
from adjointbackmap.rules import Field

# Number of units whose whole hyperplane is computed, one in each of as many random layers.
TESTED_UNITS = 3
# Numbers on windows that a CPU computes in some milliseconds. A small network then has more tested
# pixels than cost one pass through it.
LEAST_NUMBERS = 2**21
# The choice of pixels, weights and units is random, and the same for every trace of a network.
SEED = 0


def check_patches(network: Network, x: Tensor) -> dict[str, float]:
    """Check that hyperplanes on patches are the whole hyperplanes.

    The audit sums over whole images and cannot see a receptive field that is too small. So tangents
    of some pixels go through the network twice: on the windows that they reach, and on whole maps.
    Both must agree at every layer. In addition, the hyperplane of one random unit in each of three
    random layers must be zero outside its patch.

    Args:
        network: Traced network.
        x: One image as a batch, in the network's dtype.

    Returns:
        Name of a layer whose receptive field is smaller than the image -> largest error, relative
        to the largest tangent or to the largest number of the hyperplane.

    Raises:
        RuntimeError: If an error is larger than the tolerance of the audit; the message names the
            layer.
    """
    layers = [layer for layer in network.distinct_layers() if _is_cut(network, layer)]
    errors: dict[str, float] = {}
    if layers:
        pattern = pattern_of(network, x, 1.0)
        with exact(x.device):
            errors = _pixel_errors(pattern, layers)
            for name, error in _unit_errors(pattern, layers).items():
                errors[name] = _larger(errors[name], error)
    limit = AUDIT_TOLERANCE[x.dtype]
    for name, error in errors.items():
        if not error <= limit:
            size = network.layer(name).receptive_field
            msg = (
                f"Hyperplanes on patches must be the whole ones to {limit:.0e}. "
                f"Got {error:.2e} first at layer {name!r}, "
                f"whose receptive field is said to be {size}: report this network."
            )
            raise RuntimeError(msg)
    return errors


def _is_cut(network: Network, layer: Layer) -> bool:
    """Whether a layer has positions and a receptive field smaller than the image."""
    field = network.program().fields[layer.value.slot]
    image = network.in_shape[1:]
    return bool(field) and any(
        n < extent for n, extent in zip(layer.receptive_field, image, strict=True)
    )


def _pixel_errors(pattern: ActivationPattern, layers: Sequence[Layer]) -> dict[str, float]:
    """Error of tangents on windows, by layer.

    Some pixels have random weights. Their tangents are summed from the windows, and compared with
    one tangent of all these pixels on whole maps.
    """
    network = pattern.network
    targets = [layer.value for layer in layers]
    sweep = Sweep(pattern, targets)
    groups = list(_tested_groups(sweep))
    draw = torch.Generator().manual_seed(SEED)
    seeds = torch.zeros(len(groups), *network.in_shape, dtype=pattern.dtype, device=network.device)
    weights = [
        torch.randn(prod(group.count), network.in_shape[0], generator=draw).to(seeds)
        for group in groups
    ]
    for seed, group, weight in zip(seeds, groups, weights, strict=True):
        seed[(slice(None), *group.places().T)] = weight.T
    whole = push(pattern, {IMAGE: seeds}, targets)
    errors = dict.fromkeys((layer.name for layer in layers), 0.0)
    for n, (group, weight) in enumerate(zip(groups, weights, strict=True)):
        windowed = sweep.run(group)
        for layer, value in zip(layers, targets, strict=True):
            tangents = windowed[value.slot]
            if isinstance(tangents, Tensor):
                tangents = _zero_outside(tangents, group, sweep.fields[value.slot])
            found = whole[value.slot]
            sums = sweep.inner(group, tangents, weight[None], value.shape)
            theirs = seeds.new_zeros(value.shape) if found is None else found[n]
            ours = seeds.new_zeros(value.shape) if sums is None else sums[0, 0]
            errors[layer.name] = _larger(errors[layer.name], _relative(ours - theirs, theirs))
    return errors


def _zero_outside(maps: Tensor, group: Group, field: Field) -> Tensor:
    """Whole maps, set to zero at positions that a pixel does not reach by its field.

    Args:
        maps: Tangents ``(pixels * in-channels, channels, *shape)``.
        group: The pixels.
        field: Receptive field of the positions.
    """
    inside = maps.new_ones(1, 1, *(1,) * (maps.dim() - 2))  # (pixels, channels, *shape)
    for a, (span, count) in enumerate(zip(group.spans(field) or [], group.count, strict=True)):
        first = span.first + span.step * torch.arange(count, device=maps.device)[:, None]
        place = torch.arange(maps.shape[2 + a], device=maps.device)
        along = (place >= first) & (place < first + span.size)  # (pixels of this axis, positions)
        shape = [along.shape[1] if b == a else 1 for b in range(len(group.count))]
        # pixels of all axes so far, the last axis fastest
        inside = (inside[:, None] * along.view(1, count, 1, *shape)).flatten(0, 1)
    # the in-channels of a pixel follow one another
    return maps * inside.repeat_interleave(len(maps) // len(inside), 0)


def _tested_groups(sweep: Sweep) -> Iterator[Group]:
    """Three groups of pixels: two at the far end of the image, one at a random place.

    At the far end a factor that is slightly wrong gives the largest error. Each group has at least
    one pixel, and as many as cost one pass through the network or some milliseconds.
    """
    channels, *image = sweep.pattern.network.in_shape
    strides = strides_of([sweep.fields[value.slot] for value in sweep.values], len(image))
    one = Group.of_one(strides)
    on_maps = on_windows = 0
    for value in sweep.values:
        spans = one.spans(sweep.fields[value.slot])
        size = prod(value.shape)
        on_maps += size
        if spans is None:
            on_windows += size
        else:
            window = value.shape[0] * prod(max(0, span.size) for span in spans)
            on_windows += min(size, window)
    pixels = max(on_maps, LEAST_NUMBERS) / (channels * on_windows)
    side = max(1, int(pixels ** (1 / len(image))))  # pixels along each axis
    draw = random.Random(SEED)
    ends = (
        tuple(n - 1 for n in image),
        tuple(max(0, n - 2) for n in image),
        tuple(draw.randrange(n) for n in image),
    )
    for last in ends:
        axes = zip(last, strides, strict=True)
        yield Group(tuple(_pixels_up_to(pixel, stride, side) for pixel, stride in axes))


def _pixels_up_to(last: int, stride: int, most: int) -> range:
    """At most ``most`` pixels along one axis, a stride apart, that end with ``last``."""
    count = min(most, last // stride + 1)
    return range(last - stride * (count - 1), last + stride, stride)


def _unit_errors(pattern: ActivationPattern, layers: Sequence[Layer]) -> dict[str, float]:
    """The largest number of a hyperplane outside its patch, for one unit of some random layers."""
    network = pattern.network
    draw = random.Random(SEED)
    chosen = draw.sample(list(layers), min(TESTED_UNITS, len(layers)))
    units = [tuple(draw.randrange(n) for n in unit_dims(layer, "RM2").values()) for layer in chosen]
    first = Query.of_any_image(network, chosen[0].name, "RM2", units[0])
    queries = [
        first.at_layer(layer.name, "RM2", unit) for layer, unit in zip(chosen, units, strict=True)
    ]
    outside = [_outside(query) for query in queries]
    seeds: dict[int, Tensor] = {}
    for n, query in enumerate(queries):
        slot = query.target.slot
        shape = query.target.shape
        if slot not in seeds:
            zeros = torch.zeros(len(chosen), *shape, dtype=pattern.dtype, device=network.device)
            seeds[slot] = zeros
        flat = query.units.flat.flatten().to(network.device)
        # all units in one pass: a cotangent for each, zero at the layers of the others
        seeds[slot][n] = query.readout.cotangents(flat, pattern.dtype)[slot][0]
    hyperplanes, _ = pull(pattern, seeds)
    errors = {}
    for layer, mask, hyperplane in zip(chosen, outside, hyperplanes, strict=True):
        errors[layer.name] = _relative(hyperplane.flatten(1) * mask, hyperplane)
    return errors


def _outside(query: Query) -> Tensor:
    """1 for each pixel outside the patch of a query's one unit, otherwise 0, ``(pixels,)``."""
    pixels = prod(query.network.in_shape[1:])
    # one more number, for the pixels of a patch that are outside the image
    outside = torch.ones(pixels + 1, dtype=query.dtype)
    if query.in_patches:
        positions = query.units.positions(query.units.flat.flatten())
        outside[query.patches.pixels(positions)[0]] = 0
    else:
        outside.zero_()
    return outside[:-1].to(query.network.device)


def _relative(difference: Tensor, to: Tensor) -> float:
    """The largest difference, relative to the largest number of ``to``."""
    return float(difference.abs().max()) / (float(to.abs().max()) or 1.0)


def _larger(first: float, second: float) -> float:
    """The larger of two errors; NaN is larger than any number."""
    return first if second <= first or first != first else second
