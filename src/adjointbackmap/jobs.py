"""Which hyperplanes are wanted: units of a layer in a mode, what they read, and what the model says they are."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import cast

import torch
from torch import Tensor

from adjointbackmap.arithmetic import exact
from adjointbackmap.network import Layer, Network
from adjointbackmap.operators import reached
from adjointbackmap.patches import Side
from adjointbackmap.program import KernelCall, Program, Step
from adjointbackmap.recording import Recorded, record
from adjointbackmap.rules import Value, field_size
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.units import Selection

IMAGES_AT_ONCE = 64


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


def recorded_layers(network: Network, images: Tensor, layers: list[Layer]) -> Recorded:
    """Inputs of the layers' kernels and the layers' outputs, from the untouched model."""
    with exact(images.device):
        found = [record(network, part, layers) for part in images.split(IMAGES_AT_ONCE)]
    if len(found) == 1:
        return found[0]
    inputs = {name: torch.cat([f.inputs[name] for f in found]) for name in found[0].inputs}
    return Recorded(inputs, {name: torch.cat([f.outputs[name] for f in found]) for name in found[0].outputs})


@dataclass(frozen=True)
class Job:
    """Which hyperplanes: units of a layer in a mode."""

    network: Network
    layer: Layer
    mode: str
    own_bias: bool
    selection: Selection
    dtype: torch.dtype

    @cached_property
    def program(self) -> Program:
        """The network's steps."""
        return self.network.program(self.dtype)

    @property
    def count(self) -> int:
        """Hyperplanes for each image."""
        return prod(self.selection.shape)

    @cached_property
    def kernel(self) -> KernelCall:
        """The layer's convolution or linear call."""
        return self.network.kernel(self.layer, self.dtype)

    @property
    def target(self) -> Value:
        """The layer's output, or its weighted sum before its own bias."""
        return self.layer.value if self.own_bias else self.kernel.sum

    # columns: what a tangent leaves at every unit

    @cached_property
    def last(self) -> Step | None:
        """In RM4 the step that keeps in-channels apart, in the place of the kernel's own; ``None`` without one."""
        apart = self.kernel.rule.apart() if self.mode == "RM4" else None
        if apart is None:
            return None
        kernel = self.kernel
        channels = kernel.rule.in_channels * kernel.sum.shape[0]
        return Step(apart, (kernel.input,), Value(kernel.sum.slot, (channels, *kernel.sum.shape[1:])), "apart")

    @property
    def source(self) -> Value:
        """The value whose tangents give the units': the target, or in RM4 the kernel's input."""
        return self.last.inputs[0] if self.last else self.target

    @property
    def end(self) -> Value:
        """The value whose elements are the units."""
        return self.last.output if self.last else self.target

    def steps(self) -> list[Step]:
        """The steps from the image and the biases to the units."""
        return [*self.program.upstream([self.source]), *([self.last] if self.last else [])]

    def finished(self, tangents: Tensor) -> Tensor:
        """Tangents of the units from those of the source."""
        return self.last.rule.forward((), tangents) if self.last else tangents

    def by_columns(self, maps: bool = False) -> bool:
        """Whether tangents give these units; ``maps``: whether they are the positions of a map over an image."""
        if len(self.selection.flat) > 1 or not (self.mode in ("RM2", "RM0") or self.last):
            return False
        return not maps or self._on_maps

    @property
    def _on_maps(self) -> bool:
        return len(self.network.in_shape) == len(self.target.shape) == 3 and "out_channel" in self.selection.dims

    def columns(self, out: Tensor, flat: Tensor, images: int) -> Tensor:
        """Tangents of the source as those of the chosen units in their order: ``(images, K, units)``."""
        ordered = self.in_unit_order(self.finished(out)).flatten(1)
        chosen = ordered if self.selection.is_everything else ordered[:, flat[0]]
        return chosen.unflatten(0, (images, -1))

    @cached_property
    def entries(self) -> Tensor:
        """The entries of ``b`` that the layer depends on."""
        known, start, kept = reached(self.program, [self.target]), 0, []
        for entry in self.program.entries:
            size = entry.value.numel()
            if entry.slot in known:
                kept.append(torch.arange(start, start + size))
            start += size
        return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def sides(self) -> list[Side]:
        """The patches of the chosen units' positions along each axis of a map; whole images where fields are not regular."""
        field, extents = self.program.fields[self.target.slot], self.network.in_shape[1:]
        sides = []
        for a, (size, extent) in enumerate(zip(field_size(field, extents), extents, strict=True)):
            first, last = self._box[a]
            axis = field[a] if field else None
            if axis is not None and size < extent and int(axis.step) == axis.step:
                sides.append(Side(first, last - first + 1, ceil(axis.low), int(axis.step), size))
            else:
                sides.append(Side(first, last - first + 1, 0, 0, extent if axis is not None or field is None else 0))
        return sides

    @property
    def is_box(self) -> bool:
        """Whether the units are all of those at the positions between the outermost, in order."""
        dims = self.selection.dims
        ranges = [slice(first, last + 1) for first, last in self._box]
        box = torch.arange(prod(dims.values())).view(*dims.values())[tuple(ranges)]
        return self.selection.shape == tuple(box.shape) and torch.equal(self.selection.flat[0], box)

    @property
    def _box(self) -> list[tuple[int, int]]:
        """First and last position of the chosen units along each axis."""
        if self.selection.is_everything:
            return [(0, n - 1) for n in self.end.shape[1:]]
        places = [p for name, p in self.selection.coordinates().items() if name in ("out_row", "out_col")]
        return [(int(p.min()), int(p.max())) for p in places]

    @property
    def in_patches(self) -> bool:
        """Whether the units' image parts are kept on their receptive fields."""
        return self.by_columns(maps=True) or (self._on_maps and self.mode == "RM4" and len(self.selection.flat) == 1)

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of one unit's image part as it is kept."""
        shape = self.network.in_shape
        return (shape[0], *(side.size for side in self.sides)) if self.in_patches else shape

    def corners(self) -> Tensor:
        """First pixel of each chosen unit's patch, ``(*units, 2)``."""
        u, v = self._positions(self.selection.flat[0])
        return torch.stack([side.start + side.step * p for side, p in zip(self.sides, (u, v), strict=True)], -1)

    def pixels_of(self, flat: Tensor) -> Tensor:
        """Numbers of the pixels of some units' patches ``(K, pixels)``; one past the last for those outside the image."""
        axes = []
        for side, p, extent in zip(self.sides, self._positions(flat), self.network.in_shape[1:], strict=True):
            place = (side.start + side.step * p)[:, None] + torch.arange(side.size, device=flat.device)
            axes.append(torch.where((place >= 0) & (place < extent), place, extent))
        (rows, columns), (height, width) = axes, self.network.in_shape[1:]
        outside = (rows[:, :, None] >= height) | (columns[:, None] >= width)
        return torch.where(outside, height * width, rows[:, :, None] * width + columns[:, None]).flatten(1)

    def _positions(self, flat: Tensor) -> list[Tensor]:
        return [p for name, p in self.places(flat).items() if name in ("out_row", "out_col")]

    # rows: what a cotangent leaves at [x; b]

    def flat_of(self, start: int, images: int) -> Tensor:
        """Numbers of the units of some images, ``(images, units)``."""
        flat = self.selection.flat.reshape(len(self.selection.flat), -1).to(self.network.device)
        return (flat[start : start + images] if len(flat) > 1 else flat).expand(images, -1)

    def places(self, flat: Tensor) -> dict[str, Tensor]:
        """Where units are along the mode's dimensions."""
        return dict(zip(self.selection.dims, torch.unravel_index(flat, tuple(self.selection.dims.values())), strict=True))

    def cotangents(self, flat: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """A cotangent for each unit: one where the unit reads the layer, or its kernel where in-channels are apart."""
        where = self.places(flat)
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
        if j is None:
            return {self.target.slot: seeds}
        kernel = self.kernel
        back = kernel.rule.back(seeds, kernel.input.shape)
        mask = torch.zeros_like(back)
        mask[each, kernel.rule.in_channel_of(where["out_channel"], j)] = 1
        return {kernel.input.slot: back * mask}

    @cached_property
    def rows(self) -> Tensor | None:
        """In RM4 and RM3 the number of each unit's row, where rows of the kernel's input are fewer than the units.

        A row is one in-channel at one position of a unit, or at all of them in RM3: units that differ in the
        out-channel share it, and each is its taps weighted by a kernel (Algorithms 1 and 2 of [Wan2022]).
        """
        if self.mode not in ("RM4", "RM3") or len(self.selection.flat) > 1 or self.kernel.rule.tap() is None:
            return None
        flat = self.selection.flat.flatten()
        rows = flat // self.selection.dims["out_channel"]
        return rows if len(rows.unique()) * self.taps < len(flat) else None

    @property
    def taps(self) -> int:
        """Weights of the kernel of one in-channel."""
        return prod(self.kernel.weight.shape[2:])

    def row_cotangents(self, rows: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """For each row and tap of the kernel, one where it reads the kernel's input: ``(rows * taps, ...)``."""
        kernel, dims = self.kernel, list(self.selection.dims.values())[:-1]
        tap = cast("Kernel", kernel.rule.tap())
        *spatial, j = torch.unravel_index(rows, tuple(dims))
        each = torch.arange(len(rows), device=rows.device)
        seeds = torch.zeros(len(rows), self.taps, self.taps, *self.target.shape[1:], dtype=dtype, device=rows.device)
        every = torch.arange(self.taps, device=rows.device)
        seeds[(each[:, None], every, every, *(p[:, None] for p in spatial))] = 1
        read = tap.back(seeds.flatten(0, 1), (1, *kernel.input.shape[1:])).unflatten(0, (len(rows), self.taps))
        cotangents = torch.zeros(len(rows), self.taps, *kernel.input.shape, dtype=dtype, device=rows.device)
        cotangents[each, :, j] = read[:, :, 0]
        return {kernel.input.slot: cotangents.flatten(0, 1)}

    # values

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
