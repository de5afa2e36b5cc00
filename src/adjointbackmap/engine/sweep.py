"""Windowed tangents: unit tangents at pixels, computed only on the part of a map that they reach.

Pixels that are congruent modulo the network's total stride have windows of one geometry, so a group
of them is one ordinary batch. A convolution pads by its whole reach, so its windows grow. Gates are
gathered at the windows. Strides move the windows' corners. Whole maps take the place of windows
after an operation without a spatial rule, and as soon as a window is as large as its map.
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
from adjointbackmap.engine.threads import threads_for
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

# Count of numbers in a batch's largest windows on the CPU, where they should fit into the caches,
# and on another device, where each operation has a fixed cost.
BATCH_NUMBERS = 2**22
BATCH_NUMBERS_ON_DEVICE = 2**26

Sums = Callable[[Tensor, Tensor], Tensor]
"""Sums of factors ``(*batch, K)`` and rows ``(*batch, K, n)``, such as :func:`sums_of_products`."""


def sums_of_products(factors: Tensor, rows: Tensor) -> Tensor:
    """Sums of products over ``K``, and sums of their absolute values.

    Args:
        factors: ``(*batch, K)``.
        rows: ``(*batch, K, n)``.

    Returns:
        ``(2, *batch, n)``.
    """
    products = factors[..., None, :] @ rows
    sizes = factors.abs()[..., None, :] @ rows.abs()
    return torch.stack([products, sizes]).squeeze(-2)


@dataclass(frozen=True)
class Batches:
    """The size of batches of windows.

    Attributes:
        strides: Distance of the pixels of one batch along each axis.
        fast: Number of pixels in a fast batch.
        within: Number of pixels in the largest batch that fits into the memory; ``None`` without a
            bound.
        bytes_of_pixel: Bytes that a pixel takes for all images and in-channels.
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
        """The batches of a sweep; see :class:`Sweep` for the arguments."""
        channels = program.image.shape[0]
        slots = tuple(value.slot for value in (*targets, *(step.output for step in after)))
        found = program.once(
            ("windows", slots, len(after)), lambda: _on_windows_of(program, targets, after)
        )
        strides, largest, numbers = found
        vectors = images * channels  # per pixel
        fast = _batch_numbers(program) // (vectors * largest)
        each = vectors * bytes_of_vector(numbers, dtype.itemsize)
        return cls(strides, fast, None if room is None else max(1, room // each), each)

    def pixels(self, count: Sequence[int]) -> int:
        """Number of pixels in a batch: at least a row of them, if the memory allows it.

        Args:
            count: Number of pixels of one geometry along each axis.
        """
        most = max(1, self.fast, prod(count[1:]))
        return most if self.within is None else min(most, self.within)


class Sweep:
    """Tangents of some values for every pixel of some images.

    Attributes:
        pattern: The activation pattern of the images.
        targets: The values.
        after: Steps after the targets that the caller takes with :meth:`step`. Batches leave memory
            for them.
        room: Bytes that a batch may take; ``None`` for a fast batch.
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
        self.corrections: dict[int, Tensor | None] = {}

    @property
    def threads(self) -> int:
        """Number of groups that are computed at the same time, each in one thread."""
        extents = self.values[IMAGE].shape[1:]
        batches = self._batches()
        pixels = [-(-n // stride) for n, stride in zip(extents, batches.strides, strict=True)]
        each = min(batches.pixels(pixels), prod(pixels)) * batches.bytes_of_pixel
        return threads_for(self.pattern.network.device, self.room, each)

    def _batches(self) -> Batches:
        pattern = self.pattern
        return Batches.of(
            pattern.program, self.targets, self.after, pattern.images, pattern.dtype, self.room
        )

    def groups(self, pixels: Sequence[range] | None = None) -> Iterator[Group]:
        """The image's pixels in groups that are small enough for a batch.

        Args:
            pixels: A range of rows and one of columns; by default the whole image.
        """
        _, *image = self.values[IMAGE].shape
        pixels = pixels or [range(n) for n in image]
        batches = self._batches()
        strides = batches.strides
        # one geometry for each residue of the pixels modulo the strides
        for first in product(*(p[:s] for p, s in zip(pixels, strides, strict=True))):
            axes = [range(f, p.stop, s) for p, f, s in zip(pixels, first, strides, strict=True)]
            count = [len(axis) for axis in axes]
            sizes = block_shape(count, batches.pixels(count))
            starts = (range(0, n, size) for n, size in zip(count, sizes, strict=True))
            for start in product(*starts):
                parts = zip(axes, start, sizes, strict=True)
                yield Group(tuple(axis[at : at + size] for axis, at, size in parts))

    def run(self, group: Group) -> dict[int, Tangents]:
        """The tangents of a group's pixels: slot of a target -> tangents."""
        kept = {t.slot for t in self.targets}
        values: dict[int, Tangents] = {IMAGE: self._pixels(group)}
        for n, step in enumerate(self.steps):
            inputs = [values.get(i.slot) for i in step.inputs]
            values[step.output.slot] = self.step(group, step, inputs)
            for i in step.inputs:
                if self.last[i.slot] == n and i.slot not in kept:
                    values[i.slot] = None  # free it
        return {t.slot: values.get(t.slot) for t in self.targets}

    def _pixels(self, group: Group) -> Windows:
        """A unit tangent for each pixel and in-channel."""
        channels, *image = self.values[IMAGE].shape
        eye = torch.eye(channels, dtype=self.pattern.dtype, device=self.pattern.network.device)
        times = self.pattern.images * prod(group.count)
        # (in-channels, channels, 1, 1), repeated for each image and pixel
        ones = (1,) * len(image)
        tensor = eye.view(channels, channels, *ones).repeat(times, 1, *ones)
        spans = group.spans(self.fields[IMAGE]) or []
        return Windows(laid_out(tensor), spans, True)

    def step(self, group: Group, step: Step, inputs: list[Tangents]) -> Tangents:
        """The tangents of a group's pixels after a step, from those of its inputs."""
        given = [n for n, value in enumerate(inputs) if value is not None]
        if not given:
            return None
        only = given[0]
        is_kept = step.inputs[only].shape == step.output.shape
        if isinstance(step.rule, Add) and len(given) == 1 and is_kept:
            return inputs[only]  # plus zero
        spans = group.spans(self.fields[step.output.slot])
        if spans is not None and any(s.size <= 0 for s in spans):
            return None  # the pixels reach nothing of this map
        has_map = any(isinstance(value, Tensor) for value in inputs)
        has_no_rule = not (step.rule.positional() or step.rule.reach())
        if spans is None or has_map or has_no_rule or covers(spans, step.output.shape):
            return self._on_maps(group, step, inputs)
        return self._on_windows(group, step, inputs, spans)

    def _on_maps(self, group: Group, step: Step, inputs: list[Tangents]) -> Tensor:
        """A step on whole maps."""
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
        """Tangents on whole maps: the windows, with zeros around them.

        Args:
            group: The pixels.
            value: The tangents.
            place: The value that they are tangents of.
        """
        if not isinstance(value, Windows):
            return value
        # (images, pixels, in-channels, channels, *positions)
        folded = (self.pattern.images, prod(group.count), -1)
        parts = value.tensor.unflatten(0, folded)
        maps = unfilled(value.tensor, place.shape).zero_().unflatten(0, folded)
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
        """A step on windows; ``spans`` are those of its output."""
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
        """A rule that works position by position.

        Each window is an image of its own, with the gates of its part of the map.
        """
        given = [v for v in inputs if isinstance(v, Windows)]
        like = given[0].tensor
        sizes = [s.size for s in spans]
        zero = like.new_zeros(())
        parts = [
            fitted(v, spans)
            if isinstance(v, Windows)
            else zero.expand(len(like), i.shape[0], *sizes)
            for v, i in zip(inputs, step.inputs, strict=True)
        ]
        maps = [g.expand(*g.shape[:2], *step.output.shape[1:]) for g in gates]
        seen = tuple(seen_by(group, m, spans) for m in maps)
        out = step.rule.forward(seen, *parts)
        # outside the map gates are zero, and so is a product with them
        is_gated = isinstance(step.rule, Gate | PiecewiseAffine | Masked)
        return Windows(out, spans, clean=is_gated or all(v.clean for v in given))

    def _windowed(self, group: Group, step: Step, value: Windows, spans: list[Span]) -> Tensor:
        """A rule that reads a window around each position."""
        rule = cast("Local", step.rule)
        read = needed(rule, spans)
        pad = padding(value.spans, read)
        out = rule.valid(value.tensor, pad)
        firsts = rule.origin([r.first for r in read])
        if firsts is not None:  # the output begins somewhere else than the windows
            sizes = out.shape[2:]
            made = [Span(f, n, s.step) for f, n, s in zip(firsts, sizes, spans, strict=True)]
            out = fitted(Windows(out, made, False), spans)
        if isinstance(rule, AveragePooling):
            correction = self._border_correction(step, rule, value.tensor)
            if correction is not None:
                out = gated(seen_by(group, correction, spans), out)
        return out

    def _border_correction(self, step: Step, rule: AveragePooling, like: Tensor) -> Tensor | None:
        """The correction of an average pooling; ``None`` if it is 1 everywhere.

        It is computed once, because the comparison with 1 waits for the device.
        """
        slot = step.output.slot
        if slot not in self.corrections:
            found = rule.border_correction(step.inputs[0].shape, like)
            self.corrections[slot] = self._for_images(found) if bool((found != 1).any()) else None
        return self.corrections[slot]

    def _winners(
        self, group: Group, step: Step, winners: Tensor, value: Windows, spans: list[Span]
    ) -> Tensor:
        """Max pooling: the winners of the output's windows, read from the input's windows.

        A winner outside of the input's window has a zero tangent.
        """
        seen = seen_by(group, winners + 1, spans) - 1  # -1 outside the map
        extents = step.inputs[0].shape[1:]
        places = torch.unravel_index(seen.clamp_min(0), extents)
        axes = len(extents)
        inside = seen >= 0
        flat = torch.zeros_like(seen)
        steps = group.numbers().to(seen.device).repeat(self.pattern.images, 1)
        for axis, (place, span) in enumerate(zip(places, value.spans, strict=True)):
            first = span.first + steps[:, axis] * span.step  # of each pixel's window
            local = place - first.view(-1, *(1,) * (axes + 1))
            inside = inside & (local >= 0) & (local < span.size)
            flat = flat * span.size + local.clamp(0, span.size - 1)
        # (images * pixels, in-channels, channels, positions)
        parts = value.tensor.unflatten(0, (len(seen), -1)).flatten(3)
        index = flat.flatten(2)[:, None].expand(-1, parts.shape[1], -1, -1)
        taken = parts.gather(3, index) * inside.flatten(2)[:, None]
        return laid_out(taken.unflatten(3, seen.shape[2:]).flatten(0, 1))

    def _cleaned(self, group: Group, value: Windows, place: Value) -> Windows:
        """Windows with zeros outside the map."""
        edges = zip(value.spans, group.count, place.shape[1:], strict=True)
        inside = (s.first >= 0 and s.last + (n - 1) * s.step < extent for s, n, extent in edges)
        if value.clean or all(inside):
            return value
        ones = self._for_images(value.tensor.new_ones(1, 1, *place.shape[1:]))
        return Windows(gated(seen_by(group, ones, value.spans), value.tensor), value.spans, True)

    def _for_images(self, maps: Tensor) -> Tensor:
        """Maps ``(1, channels, *shape)`` repeated for all images."""
        return maps.expand(self.pattern.images, *maps.shape[1:])

    def inner(
        self,
        group: Group,
        value: Tangents,
        factors: Tensor,
        shape: tuple[int, ...],
        sums: Sums = sums_of_products,
    ) -> Tensor | None:
        """Two sums over the pixels of a group, at every unit of one target.

        Args:
            group: The pixels.
            value: The target's tangents, from :meth:`run`.
            factors: ``(images, pixels, in-channels)``; the sums are accumulated in their dtype.
            shape: Shape of the target.
            sums: The sums of factors and tangents, see :func:`sums_of_products`.

        Returns:
            ``(2, images, *shape)``; ``None`` if the tangents are zero.
        """
        if value is None:
            return None
        if not isinstance(value, Windows) or len(value.spans) != 2:
            maps = cast("Tensor", self.whole(group, value, Value(-1, shape)))
            # (images, pixels * in-channels, *positions, channels): maps are laid out channels last
            rows = maps.movedim(1, -1).unflatten(0, (len(factors), -1)).to(factors.dtype)
            both = sums(factors.flatten(1), rows.flatten(2))
            return both.unflatten(2, rows.shape[2:]).movedim(-1, 2)
        # (images, pixels, in-channels, h, w, channels)
        rows = value.tensor.movedim(1, -1).unflatten(0, factors.shape)
        both = sums(factors, rows.flatten(3).to(factors.dtype))
        parts = both.unflatten(3, rows.shape[3:])  # (2, images, pixels, h, w, channels)
        return self._summed_on_map(group, value.spans, parts, shape)

    @staticmethod
    def _summed_on_map(
        group: Group, spans: list[Span], parts: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """The sum of overlapping windows ``(2, images, pixels, h, w, channels)`` on a map."""
        sizes = tuple(s.size for s in spans)
        steps = tuple(s.step for s in spans)
        # extent of the part of the map that all windows cover
        covered = tuple((n - 1) * s.step + s.size for n, s in zip(group.count, spans, strict=True))
        columns = parts.permute(0, 1, 5, 3, 4, 2).flatten(
            2, 4
        )  # (2, images, channels * h * w, pixels)
        summed = F.fold(columns.flatten(0, 1), covered, sizes, stride=steps)
        summed = summed.unflatten(0, columns.shape[:2])
        everywhere = [Span(0, n, 0) for n in shape[1:]]
        made = [Span(s.first, n, 0) for s, n in zip(spans, covered, strict=True)]
        return F.pad(summed, padding(made, everywhere))


def images_per_sweep(program: Program, room: int | None = None, itemsize: int = 4) -> int:
    """Number of images whose tangents of one group of pixels make a batch.

    On the CPU it is one image: larger batches gain nothing there.

    Args:
        program: The network's steps.
        room: Bytes that a batch may take; ``None`` for a fast batch.
        itemsize: Bytes of a number.
    """
    if program.device.type == "cpu":
        return 1
    channels, *image = program.image.shape
    strides = strides_of(program.fields.values(), len(image))
    # vectors of the pixels of one geometry in one image; -(-n // s) rounds up
    vectors = channels * prod(-(-n // s) for n, s in zip(image, strides, strict=True))
    fast = _batch_numbers(program) // (program.largest * vectors)
    each = vectors * bytes_of_vector(held(program.steps), itemsize)
    return max(1, fast if room is None else min(fast, room // each))


def _on_windows_of(
    program: Program, targets: Sequence[Value], after: Sequence[Step]
) -> tuple[tuple[int, ...], int, int]:
    """Strides of a sweep, and what a pixel and in-channel takes on its windows.

    Returns:
        The strides, the count of numbers in the largest window, and the largest count of numbers
        in memory at a time.
    """
    steps = [*program.upstream(targets), *after]
    values = [program.image, *(step.output for step in steps)]
    fields = [program.fields[value.slot] for value in values]
    strides = strides_of(fields, len(program.image.shape) - 1)
    size = on_windows(program.fields, strides)
    numbers = held(steps, size, {target.slot for target in targets})
    return strides, max(1, *map(size, values)), numbers


def _batch_numbers(program: Program) -> int:
    return BATCH_NUMBERS if program.device.type == "cpu" else BATCH_NUMBERS_ON_DEVICE
