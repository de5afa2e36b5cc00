"""Windowed tangents: a unit tangent at one pixel, processed only on the part of each map that it can reach.

Pixels that are congruent modulo the network's total stride have windows of one geometry, so a group of them is one
ordinary batch: convolutions pad by their whole reach and the windows grow, gates are gathered to the windows, strides
move the windows' corners. What has no spatial rule, and a window that is as large as its map, goes on as whole maps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.engine.gated_convolution import SMALLEST_BATCH, AliveConvolution, mostly_dead
from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import IMAGE, Program, Step
from adjointbackmap.engine.windows import (
    Group,
    Span,
    Tangents,
    Windows,
    covers,
    fitted,
    needed,
    padding,
    seen_by,
    strides_of,
)
from adjointbackmap.engine.workspace import block_shape, bytes_of_vector, held, on_windows
from adjointbackmap.rules import Value
from adjointbackmap.rules.base import Local, gated, laid_out, unfilled
from adjointbackmap.rules.kernels import Convolution
from adjointbackmap.rules.linear import Add, Masked
from adjointbackmap.rules.piecewise import Gate, PiecewiseAffine
from adjointbackmap.rules.pooling import AveragePooling, MaxPooling

BATCH = 2**22  # numbers in the largest window of a batch on the CPU: what its caches hold
BATCH_ON_DEVICE = (
    2**26
)  # on another device: each operation costs its start, however few numbers it has

Sums = Callable[[Tensor, Tensor], Tensor]


def sums_of_products(factors: Tensor, rows: Tensor) -> Tensor:
    """Sums over ``K`` of factors ``(*batch, K)`` times rows ``(*batch, K, n)``, and of absolute values: ``(2, *batch, n)``."""
    return torch.stack(
        [factors[..., None, :] @ rows, factors.abs()[..., None, :] @ rows.abs()]
    ).squeeze(-2)


@dataclass(frozen=True)
class Batches:
    """How many pixels go into a batch of windows.

    Attributes:
        strides: Distance of the pixels of one batch along each axis.
        fast: Pixels of a batch that is fast.
        within: Pixels of the largest batch that fits into the memory; ``None`` without a bound.
        bytes_of_pixel: Bytes that a pixel takes, of all images and in-channels.
    """

    strides: tuple[int, ...]
    fast: int
    within: int | None
    bytes_of_pixel: int

    @classmethod
    def of(
        cls,
        program: Program,
        targets: Sequence[Value],
        after: Sequence[Step],
        images: int,
        dtype: torch.dtype,
        room: int | None,
    ) -> "Batches":
        """The batches of a sweep, see :class:`Sweep` for targets, steps after them, and room."""
        steps = [*program.upstream(targets), *after]
        channels, *image = program.image.shape
        values = [program.image, *(step.output for step in steps)]
        strides = strides_of([program.fields[value.slot] for value in values], len(image))
        size = on_windows(program.fields, strides)
        vectors = images * channels  # of one pixel
        fast = _batch(program) // (vectors * max(1, *map(size, values)))
        numbers = held(steps, size, {target.slot for target in targets})
        each = vectors * bytes_of_vector(numbers, dtype.itemsize)
        return cls(strides, fast, None if room is None else max(1, room // each), each)

    def pixels(self, count: Sequence[int]) -> int:
        """Pixels of a batch: those of a row at least, if the memory has room for them.

        Args:
            count: Pixels of one geometry along each axis.
        """
        most = max(1, self.fast, prod(count[1:]))
        return most if self.within is None else min(most, self.within)


class Sweep:
    """Tangents of every pixel of some images, and what they reach of some values.

    Attributes:
        pattern: The activation pattern of the images.
        targets: The values.
        after: Steps that are taken from these by :meth:`step`: batches leave room for them.
        room: Bytes that a batch may take; ``None`` for the batch that is fast.
    """

    def __init__(
        self,
        pattern: ActivationPattern,
        targets: Iterable[Value],
        after: Iterable[Step] = (),
        room: int | None = None,
    ) -> None:
        self.pattern = pattern
        self.targets = list(targets)
        self.after = list(after)
        self.room = room
        program = pattern.program
        self.steps = program.upstream(self.targets)
        self.fields = program.fields
        self.values = [program.image, *(s.output for s in (*self.steps, *self.after))]
        self.dead = mostly_dead(pattern, self.steps)
        self.alive: dict[int, AliveConvolution] = {}
        self.last = {i.slot: n for n, step in enumerate(self.steps) for i in step.inputs}
        self.weights: dict[int, Tensor | None] = {}

    def groups(self, pixels: Sequence[range] | None = None) -> Iterator[Group]:
        """The image's pixels, or those of a range of rows and of columns, in groups small enough for a batch."""
        _, *image = self.values[IMAGE].shape
        pixels = pixels or [range(n) for n in image]
        pattern = self.pattern
        batches = Batches.of(
            pattern.program, self.targets, self.after, pattern.images, pattern.dtype, self.room
        )
        strides = batches.strides
        for first in product(*(p[:s] for p, s in zip(pixels, strides, strict=True))):
            axes = [range(f, p.stop, s) for p, f, s in zip(pixels, first, strides, strict=True)]
            count = [len(axis) for axis in axes]
            sizes = block_shape(count, batches.pixels(count))
            starts = (range(0, n, size) for n, size in zip(count, sizes, strict=True))
            for start in product(*starts):
                parts = zip(axes, start, sizes, strict=True)
                yield Group(tuple(axis[at : at + size] for axis, at, size in parts))

    def run(self, group: Group) -> dict[int, Tangents]:
        """The tangents of a group's pixels at every target, by slot."""
        kept = {t.slot for t in self.targets}
        values: dict[int, Tangents] = {IMAGE: self._pixels(group)}
        for n, step in enumerate(self.steps):
            values[step.output.slot] = self.step(
                group, step, [values.get(i.slot) for i in step.inputs]
            )
            for i in step.inputs:
                if self.last[i.slot] == n and i.slot not in kept:
                    values[i.slot] = None  # free it
        return {t.slot: values.get(t.slot) for t in self.targets}

    def _pixels(self, group: Group) -> Windows:
        """A unit tangent for each pixel and in-channel."""
        channels, *image = self.values[IMAGE].shape
        eye = torch.eye(channels, dtype=self.pattern.dtype, device=self.pattern.network.device)
        times = self.pattern.images * prod(group.count)
        tensor = eye.view(channels, channels, *(1,) * len(image)).repeat(
            times, *(1,) * (len(image) + 1)
        )
        spans = group.spans(self.fields[IMAGE]) or []
        return Windows(laid_out(tensor), spans, True)

    def step(self, group: Group, step: Step, inputs: list[Tangents]) -> Tangents:
        """The tangents of a group's pixels after a step, from those of its inputs."""
        given = [v for v in inputs if v is not None]
        if not given:
            return None
        if (
            isinstance(step.rule, Add)
            and len(given) == 1
            and step.inputs[inputs.index(given[0])].shape == step.output.shape
        ):
            return given[0]
        spans = group.spans(self.fields[step.output.slot])
        if spans is not None and any(s.size <= 0 for s in spans):
            return None
        whole = (
            spans is None
            or any(isinstance(v, Tensor) for v in inputs)
            or covers(spans, step.output.shape)
        )
        if whole or not (step.rule.positional() or step.rule.reach()):
            return self._on_maps(group, step, inputs)
        return self._on_windows(group, step, inputs, spans or [])

    def _on_maps(self, group: Group, step: Step, inputs: list[Tangents]) -> Tensor:
        maps = [self.whole(group, v, i) for v, i in zip(inputs, step.inputs, strict=True)]
        like = next(m for m in maps if m is not None)
        if step.output.slot in self.dead and len(like) >= SMALLEST_BATCH:
            return self._alive(step).forward(like)
        zero = like.new_zeros(())
        full = [
            zero.expand(len(like), *i.shape) if m is None else m
            for m, i in zip(maps, step.inputs, strict=True)
        ]
        return step.rule.forward(self.pattern.gates.get(step.output.slot, ()), *full)

    def _alive(self, step: Step) -> AliveConvolution:
        slot = step.output.slot
        if slot not in self.alive:
            self.alive[slot] = AliveConvolution(cast("Convolution", step.rule), self.dead[slot])
        return self.alive[slot]

    def whole(self, group: Group, value: Tangents, place: Value) -> Tensor | None:
        """Tangents on whole maps: the windows put into zeros."""
        if not isinstance(value, Windows):
            return value
        tensor = value.tensor
        folded = (self.pattern.images, prod(group.count), -1)
        maps, parts = (
            t.unflatten(0, folded) for t in (unfilled(tensor, place.shape).zero_(), tensor)
        )
        for p, steps in enumerate(product(*map(range, group.count))):
            inside = []
            taken = []
            for span, step, extent in zip(value.spans, steps, place.shape[1:], strict=True):
                first = span.first + step * span.step
                start = max(0, first)
                stop = min(extent, first + span.size)
                inside.append(slice(start, max(start, stop)))
                taken.append(slice(start - first, max(start, stop) - first))
            maps[:, p, :, :, *inside] = parts[:, p, :, :, *taken]
        return maps.flatten(0, 2)

    def _on_windows(
        self, group: Group, step: Step, inputs: list[Tangents], spans: list[Span]
    ) -> Windows:
        gates = self.pattern.gates.get(step.output.slot, ())
        if step.rule.positional():
            return self._by_position(group, step, gates, inputs, spans)
        (value,) = (v for v in inputs if isinstance(v, Windows))
        value = self._cleaned(group, value, step.inputs[0])
        if isinstance(step.rule, MaxPooling):
            return Windows(self._winners(group, step, gates[0], value, spans), spans, False)
        return Windows(self._windowed(group, step, value, spans), spans, False)

    def _by_position(
        self,
        group: Group,
        step: Step,
        gates: tuple[Tensor, ...],
        inputs: list[Tangents],
        spans: list[Span],
    ) -> Windows:
        """A rule that goes position by position: the windows take the place of images, each with its own gates."""
        given = [v for v in inputs if isinstance(v, Windows)]
        like = given[0].tensor
        sizes = [s.size for s in spans]
        parts = [
            like.new_zeros(()).expand(len(like), i.shape[0], *sizes)
            if not isinstance(v, Windows)
            else fitted(v, spans)
            for v, i in zip(inputs, step.inputs, strict=True)
        ]
        seen = tuple(
            seen_by(group, g.expand(*g.shape[:2], *step.output.shape[1:]), spans) for g in gates
        )
        closes = isinstance(
            step.rule, Gate | PiecewiseAffine | Masked
        )  # gates are zero outside the map
        return Windows(
            step.rule.forward(seen, *parts), spans, closes or all(v.clean for v in given)
        )

    def _windowed(self, group: Group, step: Step, value: Windows, spans: list[Span]) -> Tensor:
        """A rule that reads a window around each position."""
        rule = cast("Local", step.rule)
        read = needed(rule, spans)
        pad = padding(value.spans, read)
        out = rule.valid(value.tensor, pad)
        firsts = rule.origin([r.first for r in read])
        if firsts is not None:
            made = [
                Span(f, n, s.step) for f, n, s in zip(firsts, out.shape[2:], spans, strict=True)
            ]
            out = fitted(Windows(out, made, False), spans)
        if isinstance(rule, AveragePooling):
            weight = self._edge_weight(step, rule, value.tensor)
            if weight is not None:
                out = gated(seen_by(group, weight, spans), out)
        return out

    def _edge_weight(self, step: Step, rule: AveragePooling, like: Tensor) -> Tensor | None:
        """What averages at the edges count more; ``None`` where they do not. Looked at once, for it waits for the device."""
        slot = step.output.slot
        if slot not in self.weights:
            weight = rule.border_correction(step.inputs[0].shape, like)
            self.weights[slot] = self._for_images(weight) if bool((weight != 1).any()) else None
        return self.weights[slot]

    def _winners(
        self, group: Group, step: Step, winners: Tensor, value: Windows, spans: list[Span]
    ) -> Tensor:
        """Max pooling: each window's winner, where it lies in the part of the input that is there."""
        seen = seen_by(group, winners + 1, spans) - 1  # -1 outside the map
        extents = step.inputs[0].shape[1:]
        places = torch.unravel_index(seen.clamp_min(0), extents)
        axes = len(extents)
        inside = seen >= 0
        flat = torch.zeros_like(seen)
        steps = group.numbers().to(seen.device).repeat(self.pattern.images, 1)
        for a, (place, span) in enumerate(zip(places, value.spans, strict=True)):
            local = place - (span.first + steps[:, a] * span.step).view(-1, *(1,) * (axes + 1))
            inside = inside & (local >= 0) & (local < span.size)
            flat = flat * span.size + local.clamp(0, span.size - 1)
        parts = value.tensor.unflatten(0, (len(seen), -1)).flatten(3)
        index = flat.flatten(2)[:, None].expand(-1, parts.shape[1], -1, -1)
        taken = parts.gather(3, index) * inside.flatten(2)[:, None]
        return laid_out(taken.unflatten(3, seen.shape[2:]).flatten(0, 1))

    def _cleaned(self, group: Group, value: Windows, place: Value) -> Windows:
        """Zeros where a window is outside the map."""
        edges = zip(value.spans, group.count, place.shape[1:], strict=True)
        if value.clean or all(
            s.first >= 0 and s.last + (n - 1) * s.step < extent for s, n, extent in edges
        ):
            return value
        ones = self._for_images(value.tensor.new_ones(1, 1, *place.shape[1:]))
        return Windows(gated(seen_by(group, ones, value.spans), value.tensor), value.spans, True)

    def _for_images(self, maps: Tensor) -> Tensor:
        """Maps ``(1, channels, *shape)`` that are the same for all images."""
        return maps.expand(self.pattern.images, *maps.shape[1:])

    def inner(
        self,
        group: Group,
        value: Tangents,
        factors: Tensor,
        shape: tuple[int, ...],
        sums: Sums = sums_of_products,
    ) -> Tensor | None:
        """Two sums over the tangents of one target: ``(2, images, *shape)``.

        Args:
            group: The pixels.
            value: What :meth:`run` gave for the target.
            factors: ``(images, pixels, in-channels)``; the sums are accumulated in their dtype.
            shape: Shape of the target.
            sums: What is summed of factors ``(*batch, K)`` and tangents ``(*batch, K, n)``.
        """
        if value is None:
            return None
        if not isinstance(value, Windows) or len(value.spans) != 2:
            maps = cast("Tensor", self.whole(group, value, Value(-1, shape)))
            rows = (
                maps.movedim(1, -1).unflatten(0, (len(factors), -1)).to(factors.dtype)
            )  # channels last is how maps lie
            both = sums(factors.flatten(1), rows.flatten(2))
            return both.unflatten(2, rows.shape[2:]).movedim(-1, 2)
        rows = value.tensor.movedim(1, -1).unflatten(
            0, factors.shape
        )  # (images, pixels, in-channels, h, w, channels)
        both = sums(factors, rows.flatten(3).to(factors.dtype))
        parts = both.unflatten(3, rows.shape[3:])
        sizes = tuple(s.size for s in value.spans)
        shifts = tuple(s.step for s in value.spans)
        extent = tuple(
            (n - 1) * s.step + s.size for n, s in zip(group.count, value.spans, strict=True)
        )
        columns = parts.permute(0, 1, 5, 3, 4, 2).flatten(
            2, 4
        )  # (2, images, channels * h * w, pixels)
        summed = F.fold(columns.flatten(0, 1), extent, sizes, stride=shifts).unflatten(
            0, columns.shape[:2]
        )
        everywhere = [Span(0, n, 0) for n in shape[1:]]
        made = [Span(s.first, n, 0) for s, n in zip(value.spans, extent, strict=True)]
        return F.pad(summed, padding(made, everywhere))


def images_at_once(program: Program, room: int | None = None, itemsize: int = 4) -> int:
    """Images whose tangents of one group are a batch.

    On the CPU it is one image: larger batches gain nothing there.

    Args:
        program: The network's steps.
        room: Bytes that a batch may take; ``None`` for the batch that is fast.
        itemsize: Bytes of a number.
    """
    if program.device.type == "cpu":
        return 1
    channels, *image = program.image.shape
    strides = strides_of(program.fields.values(), len(image))
    # of one group of pixels of one image
    vectors = channels * prod(-(-n // s) for n, s in zip(image, strides, strict=True))
    fast = _batch(program) // (program.largest * vectors)
    each = vectors * bytes_of_vector(held(program.steps), itemsize)
    return max(1, fast if room is None else min(fast, room // each))


def _batch(program: Program) -> int:
    return BATCH if program.device.type == "cpu" else BATCH_ON_DEVICE
