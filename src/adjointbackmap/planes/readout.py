"""How units read a network: the tangents that give their values, and their cotangents."""

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

    # tangents: each gives a number for every unit

    @cached_property
    def apart(self) -> Step | None:
        """In RM4 the kernel's step with an output for each pair of in-channel and out-channel.

        ``None`` in other modes, and for kernels that have no such step.
        """
        if self.mode != "RM4" or self.kernel is None:
            return None
        kernel = self.kernel
        rule = kernel.rule.apart()
        if rule is None:
            return None
        channels = kernel.rule.in_channels * kernel.sum.shape[0]  # in-channels x out-channels
        output = Value(kernel.sum.slot, (channels, *kernel.sum.shape[1:]))
        return Step(rule, (kernel.input,), output, "apart")

    @property
    def source(self) -> Value:
        """The value whose tangents are computed: the target, or in RM4 the kernel's input."""
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
        """Most numbers that one tangent has in memory at a time."""
        key = ("held by a tangent", self.source.slot, self.elements)
        return self.program.once(key, lambda: held(self.steps(), kept={self.source.slot}))

    @cached_property
    def numbers_of_cotangent(self) -> int:
        """Most numbers that one cotangent has in memory at a time."""
        if self.mode not in ("RM3", "RM4"):
            key = ("held by a cotangent", self.target.slot)
            return self.program.once(key, lambda: held(self.program.upstream([self.target])))
        into = self._kernel.input
        # A seed is a map of the layer, or one map of positions for each tap of the kernel. Two maps
        # of the kernel's input are next to it: the seed read back, and its product with a mask.
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
        """Tangents of the chosen units in their order, ``(images, K, units)``.

        Args:
            tangents: K tangents of the source for each image, ``(images * K, ...)``.
            flat: Numbers of the units, the same for all images, ``(images, units)``.
            images: Number of images.
        """
        ordered = self.units.in_order(self.of_source(tangents)).flatten(1)
        chosen = ordered if self.units.is_everything else ordered[:, flat[0]]
        return chosen.unflatten(0, (images, -1))

    # cotangents: each gives a hyperplane at [x; b]

    def cotangents(self, flat: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """A cotangent for each unit, keyed by the slot of the value that it belongs to.

        It is 1 at the elements of the layer that the unit sums. For a unit of one in-channel it is
        the kernel's weights at the elements of that in-channel of the kernel's input.
        """
        where = self.units.places(flat)
        seeds = torch.zeros(len(flat), *self.target.shape, dtype=dtype, device=flat.device)
        each = torch.arange(len(flat), device=flat.device)
        j = where.pop("in_channel", None)
        if self.mode in ("RM1", "RM3"):
            seeds[each, where["out_channel"]] = 1  # (K, C, *positions), at all positions
        elif "out_channel" in where:
            *spatial, channel = where.values()
            seeds[(each, channel, *spatial)] = 1  # units have the channel last, maps have it first
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
        """Number of distinct rows of the units in RM4 and RM3; ``None`` if rows save no work.

        A row is one in-channel at one position, or in RM3 at all positions. Units that differ only
        in the out-channel share a row. The hyperplane of a unit is a sum over the taps of its row,
        weighted by its kernel (Algorithms 1 and 2 of [Wan2022]).
        """
        if self.mode not in ("RM4", "RM3") or not self.units.is_shared:
            return None
        if self._kernel.rule.tap() is None:
            return None
        *dims, channels = self.units.dims.values()  # the out-channel is the last dimension
        seen = torch.zeros(prod(dims), dtype=torch.bool)
        for numbers in self.units.parts():
            seen[numbers // channels] = True
        count = int(seen.sum())
        # a row needs one cotangent per tap, a unit needs one
        return count if count * self.taps < self.units.count else None

    @property
    def rows(self) -> Tensor | None:
        """The number of each unit's row, see :attr:`row_count`."""
        if self.row_count is None:
            return None
        # the out-channel is the last dimension of a unit's number
        return self.units.flat.flatten() // self.units.dims["out_channel"]

    @property
    def taps(self) -> int:
        """Number of weights of the kernel of one in-channel."""
        return prod(self._kernel.weight.shape[2:])

    def row_cotangents(self, rows: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """A cotangent of the kernel's input for each row and tap, ``(rows * taps, ...)``.

        It is 1 at the elements that the tap reads.
        """
        kernel = self._kernel
        dims = list(self.units.dims.values())[:-1]  # all but the out-channel
        tap = cast("Kernel", kernel.rule.tap())
        *spatial, j = torch.unravel_index(rows, tuple(dims))
        each = torch.arange(len(rows), device=rows.device)
        every = torch.arange(self.taps, device=rows.device)
        # (rows, taps, out-channels of the tap's rule: one for each tap, *positions)
        shape = (len(rows), self.taps, self.taps, *self.target.shape[1:])
        seeds = torch.zeros(shape, dtype=dtype, device=rows.device)
        seeds[(each[:, None], every, every, *(p[:, None] for p in spatial))] = 1
        # the tap's rule reads a map of one channel
        read = tap.back(seeds.flatten(0, 1), (1, *kernel.input.shape[1:]))
        read = read.unflatten(0, (len(rows), self.taps))
        # (rows, taps, channels of the kernel's input, *positions)
        shape = (len(rows), self.taps, *kernel.input.shape)
        cotangents = torch.zeros(shape, dtype=dtype, device=rows.device)
        cotangents[each, :, j] = read[:, :, 0]
        return {kernel.input.slot: cotangents.flatten(0, 1)}

    @property
    def _kernel(self) -> KernelCall:
        """The kernel. RM4 and RM3, the modes that need it, always have one."""
        return cast("KernelCall", self.kernel)
