"""The exact ways to the same hyperplanes, what each costs, and which is the cheapest."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.arithmetic import exact
from adjointbackmap.network import Layer, Network
from adjointbackmap.operators import CHUNK, basis, pull, push, reached
from adjointbackmap.patches import Patches
from adjointbackmap.pattern import ActivationPattern, record_pattern
from adjointbackmap.program import IMAGE, KernelCall, Program, Step
from adjointbackmap.recording import Recorded, record
from adjointbackmap.rules import Value, field_size
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.units import Selection, select, unit_dims
from adjointbackmap.windows import Group, Sweep, Tangents, Windows, strides_of

IMAGES_AT_ONCE = 64
METHODS = ("adjoint", "basis", "windowed")
STEP_COST = 2_000_000  # multiply-adds that fit into the time which a step takes before it computes
NUMBER_COST = 10  # and into the time that a number takes to be read and written


def with_own_bias(layer: Layer, mode: str, own_bias: bool | None) -> bool:
    """Whether a layer's own bias belongs to its units, as asked for or by default.

    Raises:
        ValueError: If the layer lacks the mode, or the mode cannot have it.
    """
    if mode not in layer.modes:
        msg = f"Layer {layer.name!r} has the modes {', '.join(layer.modes)}. Got {mode!r}: choose one of these."
        raise ValueError(msg)
    if mode in ("RM4", "RM3"):
        if own_bias:
            msg = f"own_bias must be False in {mode}, whose units are single kernels. Got True: leave it out."
            raise ValueError(msg)
        return False
    return own_bias is not False


def recorded_layer(network: Network, images: Tensor, layer: Layer) -> Recorded:
    """Input of the layer's kernel and the layer's output, from the untouched model."""
    with exact(images.device):
        found = [record(network, part, [layer]) for part in images.split(IMAGES_AT_ONCE)]
    inputs = {name: torch.cat([f.inputs[name] for f in found]) for name in found[0].inputs}
    return Recorded(inputs, {layer.name: torch.cat([f.outputs[layer.name] for f in found])})


@dataclass(frozen=True)
class Job:
    """Which hyperplanes: units of a layer in a mode."""

    network: Network
    layer: Layer
    mode: str
    own_bias: bool
    selection: Selection
    dtype: torch.dtype

    @property
    def program(self) -> Program:
        """The network's steps."""
        return self.network.program(self.dtype)

    @property
    def count(self) -> int:
        """Hyperplanes for each image."""
        return prod(self.selection.shape)

    def entries(self) -> Tensor:
        """The entries of ``b`` that the layer depends on."""
        known, start, kept = reached(self.program, [self.target]), 0, []
        for entry in self.program.entries:
            size = entry.value.numel()
            if entry.slot in known:
                kept.append(torch.arange(start, start + size))
            start += size
        return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)

    def by_columns(self, method: str) -> bool:
        """Whether a method that gives columns of all units can give these."""
        if self.mode not in ("RM2", "RM0") or len(self.selection.flat) > 1:
            return False
        maps = len(self.network.in_shape) == 3 and len(self.target.shape) == 3 and "out_channel" in self.selection.dims
        return method == "basis" or maps

    def patch(self) -> tuple[int, int]:
        """Rows and columns of the largest receptive field of the target's units."""
        rows, columns = field_size(self.program.fields()[self.target.slot], self.network.in_shape[1:])
        return rows, columns

    def corners(self) -> list[list[int]]:
        """First pixel of the receptive field of each of the target's rows, and of each column; 0 where it is the whole image."""
        field = self.program.fields()[self.target.slot]
        found = []
        for axis, (positions, size) in enumerate(zip(self.target.shape[1:], self.patch(), strict=True)):
            whole = not field or size == self.network.in_shape[1 + axis]
            first = [0 if whole else ceil(o * field[axis].step + field[axis].low) for o in range(positions)]  # type: ignore[index]
            found.append(first)
        return found

    def flat_of(self, start: int, images: int) -> Tensor:
        """Numbers of the units of some images, ``(images, units)``."""
        flat = self.selection.flat.reshape(len(self.selection.flat), -1).to(self.network.device)
        return (flat[start : start + images] if len(flat) > 1 else flat).expand(images, -1)

    def columns(self, out: Tensor, flat: Tensor, images: int) -> Tensor:
        """Tangents of the target, of the chosen units in their order: ``(images, K, units)``."""
        ordered = self.in_unit_order(out).flatten(1)
        chosen = ordered if self.selection.is_everything else ordered[:, flat[0]]
        return chosen.unflatten(0, (images, -1))

    @property
    def kernel(self) -> KernelCall:
        """The layer's convolution or linear call."""
        return self.network.kernel(self.layer, self.dtype)

    @property
    def target(self) -> Value:
        """The layer's output, or its weighted sum before its own bias."""
        return self.layer.value if self.own_bias else self.kernel.sum

    def cotangents(self, flat: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """A cotangent for each unit: one where the unit reads the layer, or its kernel where in-channels are apart."""
        places = torch.unravel_index(flat, tuple(self.selection.dims.values()))
        where = dict(zip(self.selection.dims, places, strict=True))
        seeds = torch.zeros(len(flat), *self.target.shape, dtype=dtype, device=flat.device)
        each = torch.arange(len(flat), device=flat.device)
        j = where.pop("in_channel", None)
        if self.mode in ("RM1", "RM3"):
            seeds[each, where["out_channel"]] = 1
        elif "out_channel" in where:
            *spatial, channel = where.values()
            seeds[(each, channel, *spatial)] = 1
        else:
            seeds[(each, *where.values())] = 1
        if seeds.dim() == 4:
            seeds = seeds.contiguous(memory_format=torch.channels_last)
        if j is None:
            return {self.target.slot: seeds}
        kernel = self.kernel
        back = kernel.rule.back(seeds, kernel.input.shape)
        mask = torch.zeros_like(back)
        mask[each, kernel.rule.in_channel_of(where["out_channel"], j)] = 1
        return {kernel.input.slot: back * mask}

    def values(self, recorded: Recorded) -> Tensor:
        """The units' values from what the untouched model computed, ``(N, K)``."""
        output = recorded.outputs[self.layer.name]
        with exact(output.device):
            everything = self._merged(output) if self.own_bias else self._without_bias(recorded.inputs[self.layer.name])
        flat = self.selection.flat.reshape(len(self.selection.flat), -1).to(output.device)
        return everything.flatten(1).gather(1, flat.expand(len(output), -1))

    def _without_bias(self, x: Tensor) -> Tensor:
        """The layer's kernel applied to its recorded input, to one in-channel at a time where the mode keeps them apart."""
        kernel = self.kernel
        if self.mode not in ("RM4", "RM3"):
            return self._merged(kernel.apply(x))
        mask = kernel.rule.in_channel_mask(x.shape[1]).to(x.device)
        apart = [self._merged(kernel.apply(x * m.view(-1, *(1,) * (x.dim() - 2)))) for m in mask]
        return torch.stack(apart, -2)

    def _merged(self, maps: Tensor) -> Tensor:
        """Maps in the order of the units, positions summed where the mode says so."""
        if self.mode in ("RM1", "RM3"):
            return maps.flatten(2).sum(2)
        return self.in_unit_order(maps)

    def in_unit_order(self, maps: Tensor) -> Tensor:
        """``(N, C, *positions)`` to ``(N, *positions, C)``."""
        return maps.movedim(1, -1) if "out_channel" in self.selection.dims else maps


# what each way costs


@dataclass(frozen=True)
class Plan:
    """How some hyperplanes are computed.

    Attributes:
        method: ``"adjoint"``, ``"basis"`` or ``"windowed"``.
        vectors: Cotangents or tangents.
        multiply_adds: Of the convolutions and products.
        bytes: Size of the result.
        cost: Multiply-adds, and what steps and numbers take beside them, in the same unit.
    """

    method: str
    vectors: int
    multiply_adds: int
    bytes: int
    cost: int

    def __str__(self) -> str:
        kind = "cotangents" if self.method == "adjoint" else "tangents"
        work = f"{self.multiply_adds / 1e9:.3g} GMAC, {self.bytes / 2**20:,.1f} MiB"
        return f"{self.method}: {self.vectors:,} {kind}, {work}"


def plan(
    network: Network, layer: str, mode: str, units: Any = None, own_bias: bool | None = None, method: str | None = None
) -> Plan:
    """How the hyperplanes of some units of one image are computed, see :func:`adjointbackmap.hyperplanes`.

    Raises:
        ValueError: If the layer, mode, units or method do not fit the network.
    """
    chosen = network.layer(layer)
    own_bias = with_own_bias(chosen, mode, own_bias)
    in_channels = 0 if own_bias else network.kernel(chosen).rule.in_channels
    selection = select(unit_dims(chosen, mode, in_channels), units, 1)
    return plan_job(Job(network, chosen, mode, own_bias, selection, network.dtype), 1, method)


def plan_job(job: Job, images: int, method: str | None = None) -> Plan:
    """The cheapest way, or the one that is asked for.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    able = {name: of for name, of in _PLANS.items() if name == "adjoint" or job.by_columns(name)}
    if method is not None and method not in able:
        what = f"layer {job.layer.name!r} in {job.mode}"
        msg = f"method must be one of {', '.join(able)} for {what}. Got {method!r}: choose one of these, or leave it out."
        raise ValueError(msg)
    return min((of(job, images) for name, of in able.items() if method in (None, name)), key=lambda p: p.cost)


def _work(steps: list[Step], shapes: dict[int, float] | None = None) -> tuple[float, float]:
    """Multiply-adds and numbers of one tangent through some steps; ``shapes`` has the share of each output that is computed."""
    products = numbers = 0.0
    for step in steps:
        size = prod(step.output.shape) * (1.0 if shapes is None else shapes[step.output.slot])
        numbers += size
        if isinstance(step.rule, Kernel):
            products += size * step.rule.weight[0].numel()
    return products, numbers


def _planned(job: Job, images: int, method: str, vectors: int, work: tuple[float, float], batches: float, part: int) -> Plan:
    products, numbers = (vectors * w for w in work)
    steps = len(job.program.upstream([job.target]))
    cost = products + NUMBER_COST * numbers + STEP_COST * batches * steps
    size = (part + job.entries().numel()) * job.count * job.dtype.itemsize
    return Plan(method, vectors, round(images * products), images * size, round(images * cost))


def _plan_adjoint(job: Job, images: int) -> Plan:
    pixels = prod(job.network.in_shape)
    return _planned(job, images, "adjoint", job.count, _work(job.program.upstream([job.target])), job.count / CHUNK, pixels)


def _plan_basis(job: Job, images: int) -> Plan:
    pixels, entries = prod(job.network.in_shape), job.entries().numel()
    work = _work(job.program.upstream([job.target]))
    return _planned(job, images, "basis", pixels + entries, work, (pixels + entries) / CHUNK, pixels)


def _plan_windowed(job: Job, images: int) -> Plan:
    """One pixel's windows stand for all; biases are counted as if each went through half of the network."""
    program, image = job.program, job.network.in_shape[1:]
    pixels, entries = prod(job.network.in_shape), job.entries().numel()
    steps, fields = program.upstream([job.target]), program.fields()
    shapes = [program.image.slot, *(s.output.slot for s in steps)]
    group = Group((0,) * len(image), (1,) * len(image), strides_of([fields[s] for s in shapes], len(image)))
    shares = {}
    for step in steps:
        spans, whole = group.spans(fields[step.output.slot]), prod(step.output.shape[1:])
        shares[step.output.slot] = 1.0 if spans is None else min(1.0, prod(max(0, s.size) for s in spans) / whole)
    on_windows, on_maps = _work(steps, shares), _work(steps)
    work = tuple((w * pixels + m * entries / 2) / (pixels + entries) for w, m in zip(on_windows, on_maps, strict=True))
    height, width = job.patch()
    batches = prod(group.stride) + entries / CHUNK
    return _planned(
        job, images, "windowed", pixels + entries, (work[0], work[1]), batches, job.network.in_shape[0] * height * width
    )


_PLANS = {"adjoint": _plan_adjoint, "basis": _plan_basis, "windowed": _plan_windowed}


# the ways


@dataclass(frozen=True)
class Parts:
    """Image parts, bias parts ``(N, *units, m)``, and which entries of ``b`` these are."""

    image: Tensor | Patches
    bias: Tensor
    entries: Tensor


def compute(job: Job, images: Tensor, scale: float, method: str) -> Parts:
    """The hyperplanes of a job at some images, by one of the methods."""
    parts: list[tuple[Tensor | Patches, Tensor]] = []
    step = 1 if method == "windowed" else IMAGES_AT_ONCE
    for part in images.split(step):
        pattern = record_pattern(job.network, part, scale, images.dtype)
        flat = job.flat_of(len(parts) * step, len(part))
        with exact(images.device):
            parts.append(_WAYS[method](job, pattern, flat))
    shape, first = job.selection.shape, parts[0][0]
    bias = _joined([b for _, b in parts])
    bias = bias.unflatten(1, shape) if shape else bias[:, 0]
    if isinstance(first, Patches):
        values = _joined([p.values for p, _ in parts if isinstance(p, Patches)])
        return Parts(Patches(values, first.corners, first.image), bias, job.entries())
    image = _joined([p for p, _ in parts if isinstance(p, Tensor)])
    return Parts(image.reshape(len(images), *shape, *images.shape[1:]), bias, job.entries())


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _adjoint(job: Job, pattern: ActivationPattern, flat: Tensor) -> tuple[Tensor, Tensor]:
    """One cotangent per unit gives its hyperplane."""
    entries, step = job.entries(), max(1, CHUNK // pattern.images)
    image = torch.zeros(*flat.shape, prod(job.network.in_shape), dtype=pattern.dtype, device=flat.device)
    bias = torch.zeros(*flat.shape, len(entries), dtype=pattern.dtype, device=flat.device)
    for k in range(0, flat.shape[1], step):
        chosen = flat[:, k : k + step]
        found = pull(pattern, job.cotangents(chosen.flatten(), pattern.dtype))
        image[:, k : k + step], every = (t.flatten(1).unflatten(0, (pattern.images, -1)) for t in found)
        bias[:, k : k + step] = every[:, :, entries]
    return image, bias


def _basis(job: Job, pattern: ActivationPattern, flat: Tensor) -> tuple[Tensor, Tensor]:
    """One tangent per scalar of [x; b] gives a column of every unit."""
    pixels = prod(job.network.in_shape)
    image = torch.zeros(pattern.images, pixels, flat.shape[1], dtype=pattern.dtype, device=flat.device)
    for b in basis(pattern, {IMAGE} & reached(pattern.program, [job.target])):
        out = push(pattern, b.tangents, [job.target])[job.target.slot]
        if out is not None:
            image[:, b.start : b.stop] = job.columns(out, flat, pattern.images)
    return image.transpose(1, 2), _bias_columns(job, pattern, flat)


def _bias_columns(job: Job, pattern: ActivationPattern, flat: Tensor) -> Tensor:
    """Bias parts of all units from one tangent per entry, which starts at its own layer: ``(N, units, m)``."""
    entries = job.entries()
    columns = torch.zeros(pattern.images, len(entries), flat.shape[1], dtype=pattern.dtype, device=flat.device)
    start = 0
    for b in basis(pattern, reached(pattern.program, [job.target]) - {IMAGE}):
        out = push(pattern, b.tangents, [job.target])[job.target.slot]
        count = b.stop - b.start
        if out is not None:
            columns[:, start : start + count] = job.columns(out, flat, pattern.images)
        start += count
    return columns.transpose(1, 2)


def _windowed(job: Job, pattern: ActivationPattern, flat: Tensor) -> tuple[Patches, Tensor]:
    """One tangent per pixel and in-channel, on the windows that it reaches: every unit's patch, then those that are asked for."""
    channels, *image = job.network.in_shape
    out_channels, *positions = job.target.shape
    patch, corners = job.patch(), [torch.tensor(c) for c in job.corners()]
    shape = (*positions, *patch, channels, out_channels)
    whole = torch.zeros(shape, dtype=pattern.dtype, device=flat.device)
    sweep = Sweep(pattern, [job.target])
    for group in sweep.groups():
        _put(whole, group, sweep.run(group)[job.target.slot], corners, patch)
    by_unit = whole.permute(0, 1, 5, 4, 2, 3)  # (row, column, out-channel, channel, patch row, patch column)
    grid = torch.stack(torch.meshgrid(*corners, indexing="ij"), -1)[:, :, None].expand(-1, -1, out_channels, -1)
    bias = _bias_columns(job, pattern, flat)
    if job.selection.is_everything:
        return Patches(by_unit[None], grid, (image[0], image[1])), bias
    places = torch.unravel_index(job.selection.flat[0], (*positions, out_channels))
    return Patches(by_unit[places][None], grid[places], (image[0], image[1])), bias


def _put(whole: Tensor, group: Group, tangents: Tangents, corners: list[Tensor], patch: tuple[int, int]) -> None:
    """Put a group's tangents of a target to the patches ``(row, column, *patch, channel, out-channel)`` that hold its pixels."""
    if tangents is None:
        return
    on_windows = isinstance(tangents, Windows)
    tensor = tangents.tensor if isinstance(tangents, Windows) else tangents
    rows = tensor.movedim(1, -1).unflatten(0, (*group.count, -1)).movedim(2, 4)  # (n, m, row, column, channel, out-channel)
    picks = []
    for axis, (corner, extent) in enumerate(zip(corners, patch, strict=True)):
        n = torch.arange(group.count[axis])[:, None]
        offset = torch.arange(rows.shape[2 + axis])[None]
        span = tangents.spans[axis] if isinstance(tangents, Windows) else None
        position = span.first + n * span.shift + offset if span is not None and on_windows else offset + 0 * n
        pixel = group.first[axis] + n * group.stride[axis] + 0 * offset
        inside = (position >= 0) & (position < len(corner))
        within = pixel - corner[position.clamp(0, len(corner) - 1)]
        kept = (inside & (within >= 0) & (within < extent)).nonzero(as_tuple=True)
        picks.append((kept[0], kept[1], position[kept], within[kept]))
    (n, u, row, i), (m, v, column, j) = picks
    whole[row[:, None], column[None], i[:, None], j[None]] = rows[n[:, None], m[None], u[:, None], v[None]]


Way = Callable[[Job, ActivationPattern, Tensor], tuple[Tensor | Patches, Tensor]]
_WAYS: dict[str, Way] = {"adjoint": _adjoint, "basis": _basis, "windowed": _windowed}
