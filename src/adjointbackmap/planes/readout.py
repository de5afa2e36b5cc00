"""How units read a network: which value's tangents give theirs, and which cotangents they are."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import Tensor

from adjointbackmap.engine.operators import reached
from adjointbackmap.engine.program import KernelCall, Program, Step
from adjointbackmap.engine.workspace import held, whole
from adjointbackmap.planes.units import Selection
from adjointbackmap.rules import Value
from adjointbackmap.rules.kernels import Kernel


@dataclass(frozen=True)
class Readout:
    """How some units of a layer read the network.

    Attributes:
        program: The network's steps.
        target: The layer's output, or its weighted sum before its own bias.
        kernel: The layer's convolution or linear call; ``None`` without one.
        mode: The reconstruction mode.
        units: The units.
    """

    program: Program
    target: Value
    kernel: KernelCall | None
    mode: str
    units: Selection

    @cached_property
    def entries(self) -> Tensor:
        """The entries of ``b`` that the layer depends on."""
        known = reached(self.program, [self.target])
        start = 0
        kept = []
        for entry in self.program.entries:
            size = entry.value.numel()
            if entry.slot in known:
                kept.append(torch.arange(start, start + size))
            start += size
        return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)

    # tangents: what each of them leaves at every unit

    @cached_property
    def apart(self) -> Step | None:
        """In RM4 the step that keeps in-channels apart, in the place of the kernel's own; ``None`` without one."""
        if self.mode != "RM4" or self.kernel is None:
            return None
        kernel = self.kernel
        rule = kernel.rule.apart()
        if rule is None:
            return None
        channels = kernel.rule.in_channels * kernel.sum.shape[0]
        output = Value(kernel.sum.slot, (channels, *kernel.sum.shape[1:]))
        return Step(rule, (kernel.input,), output, "apart")

    @property
    def source(self) -> Value:
        """The value whose tangents give the units': the target, or in RM4 the kernel's input."""
        return self.apart.inputs[0] if self.apart else self.target

    @property
    def elements(self) -> Value:
        """The value whose elements are the units."""
        return self.apart.output if self.apart else self.target

    def steps(self) -> list[Step]:
        """The steps from the image and the biases to the units."""
        return [*self.program.upstream([self.source]), *([self.apart] if self.apart else [])]

    @cached_property
    def numbers_of_tangent(self) -> int:
        """Largest count of numbers that one tangent has in memory on its way."""
        return held(self.steps(), kept={self.source.slot})

    @cached_property
    def numbers_of_cotangent(self) -> int:
        """Largest count of numbers that one cotangent has in memory on its way."""
        if self.mode not in ("RM3", "RM4"):
            return held(self.program.upstream([self.target]))
        into = self._kernel.input
        # A seed is a map of the layer, or one for each tap of the kernel; it is then read and masked.
        taps = 0 if self.row_count is None else self.taps
        seeds = max(taps * prod(self.target.shape[1:]), whole(self.target))
        return max(held(self.program.upstream([into])), seeds + 2 * whole(into))

    @property
    def takes_tangents(self) -> bool:
        """Whether tangents give the units, in one pass for all of them."""
        return self.units.is_shared and (self.mode in ("RM2", "RM0") or self.apart is not None)

    def of_source(self, tangents: Tensor) -> Tensor:
        """Tangents of :attr:`elements` from those of :attr:`source`."""
        return self.apart.rule.forward((), tangents) if self.apart else tangents

    def columns(self, tangents: Tensor, flat: Tensor, images: int) -> Tensor:
        """Tangents of the source as those of the chosen units in their order: ``(images, K, units)``."""
        ordered = self.units.in_order(self.of_source(tangents)).flatten(1)
        chosen = ordered if self.units.is_everything else ordered[:, flat[0]]
        return chosen.unflatten(0, (images, -1))

    # cotangents: what each of them leaves at [x; b]

    def cotangents(self, flat: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """A cotangent for each unit: one where the unit reads the layer, or its kernel where in-channels are apart."""
        where = self.units.places(flat)
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
        kernel = self._kernel
        back = kernel.rule.back(seeds, kernel.input.shape)
        mask = torch.zeros_like(back)
        mask[each, kernel.rule.in_channel_of(where["out_channel"], j)] = 1
        return {kernel.input.slot: back * mask}

    @cached_property
    def row_count(self) -> int | None:
        """In RM4 and RM3 the number of rows of the kernel's input, where these are fewer than the units.

        A row is one in-channel at one position of a unit, or at all of them in RM3: units that differ in the
        out-channel share it, and each is its taps weighted by a kernel (Algorithms 1 and 2 of [Wan2022]).
        """
        if (
            self.mode not in ("RM4", "RM3")
            or not self.units.is_shared
            or self._kernel.rule.tap() is None
        ):
            return None
        *dims, channels = self.units.dims.values()  # the out-channel is the last dimension
        seen = torch.zeros(prod(dims), dtype=torch.bool)
        for numbers in self.units.parts():
            seen[numbers // channels] = True
        count = int(seen.sum())
        return count if count * self.taps < self.units.count else None

    @property
    def rows(self) -> Tensor | None:
        """The number of each unit's row, see :attr:`row_count`."""
        if self.row_count is None:
            return None
        return self.units.flat.flatten() // self.units.dims["out_channel"]

    @property
    def taps(self) -> int:
        """Weights of the kernel of one in-channel."""
        return prod(self._kernel.weight.shape[2:])

    def row_cotangents(self, rows: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """For each row and tap of the kernel, one where it reads the kernel's input: ``(rows * taps, ...)``."""
        kernel = self._kernel
        dims = list(self.units.dims.values())[:-1]
        tap = cast("Kernel", kernel.rule.tap())
        *spatial, j = torch.unravel_index(rows, tuple(dims))
        each = torch.arange(len(rows), device=rows.device)
        every = torch.arange(self.taps, device=rows.device)
        # (rows, taps, out-channels of the tap's rule: one for each tap, *positions)
        shape = (len(rows), self.taps, self.taps, *self.target.shape[1:])
        seeds = torch.zeros(shape, dtype=dtype, device=rows.device)
        seeds[(each[:, None], every, every, *(p[:, None] for p in spatial))] = 1
        read = tap.back(seeds.flatten(0, 1), (1, *kernel.input.shape[1:])).unflatten(
            0, (len(rows), self.taps)
        )
        cotangents = torch.zeros(
            len(rows), self.taps, *kernel.input.shape, dtype=dtype, device=rows.device
        )
        cotangents[each, :, j] = read[:, :, 0]
        return {kernel.input.slot: cotangents.flatten(0, 1)}

    @property
    def _kernel(self) -> KernelCall:
        """The kernel, where the mode has one: RM4 and RM3."""
        return cast("KernelCall", self.kernel)
