"""Windowed cotangents: cotangents of units at some positions, only where they are not zero.

A unit depends on its receptive field. So its cotangent is zero outside a window of each map. Units
at neighbouring positions share their windows: the smallest ones that have the fields of all of
them. A batch then has one window on each map, and gates are cut from the pattern of the whole
image. A window is never larger than its map.
"""

from collections.abc import Sequence
from math import ceil, floor, prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import Program, Step
from adjointbackmap.engine.windows import Span, Windows, fitted, needed, padding
from adjointbackmap.rules import Value
from adjointbackmap.rules.base import Gates, Local, gated_in_place, laid_out
from adjointbackmap.rules.field import Number
from adjointbackmap.rules.kernels import Convolution
from adjointbackmap.rules.piecewise import Gate
from adjointbackmap.rules.pooling import AveragePooling, MaxPooling

Window = tuple[Span, ...]
"""The part of a map that is computed: an interval along each axis, with step 0."""


def window_of(ranges: Sequence[range]) -> Window:
    """A window from a range along each axis."""
    return tuple(Span(r.start, len(r), 0) for r in ranges)


def whole_window(value: Value) -> Window:
    """The window of all positions of a value."""
    return tuple(Span(0, n, 0) for n in value.shape[1:])


def size_of(value: Value, window: Window) -> int:
    """Count of numbers in a window."""
    return prod(_shape(value, window))


def _shape(value: Value, window: Window) -> tuple[int, ...]:
    """Shape of a window, without the batch."""
    return (*value.shape[:1], *(span.size for span in window))


def windows_before(program: Program, target: Value, window: Window) -> dict[int, Window]:
    """The windows of all values on which a window of a target depends.

    A value has its whole map if an operation after it has no spatial rule. A value that depends on
    no pixel has it too, because its bias entries are summed over all positions.

    Args:
        program: The network's steps.
        target: The target.
        window: The window of the target.

    Returns:
        Slot -> window.
    """
    is_constant = program.fields[target.slot] == ()
    found = {target.slot: whole_window(target) if is_constant else window}
    for step in reversed(program.upstream([target])):
        if step.output.slot not in found:  # only gates read it
            continue
        for value in step.linear_inputs:
            read = _read(program, step, value, found[step.output.slot])
            known = found.get(value.slot)
            found[value.slot] = read if known is None else _hull(known, read)
    return found


def _read(program: Program, step: Step, value: Value, window: Window) -> Window:
    """The window of one of its inputs that a step reads for a window of its output."""
    whole = whole_window(value)
    if program.fields[value.slot] == ():
        return whole
    if step.rule.positional():
        return _same_positions(value, step.output, window)
    reach = step.rule.reach()
    if reach is None or len(reach[0]) != len(window) or len(whole) != len(window):
        return whole
    read = zip(window, whole, *reach, strict=True)
    return tuple(_read_along(span, all_.size, *along) for span, all_, *along in read)


def _read_along(span: Span, extent: int, stride: Number, low: Number, high: Number) -> Span:
    """The positions along an axis that an interval reads, at least one of them inside the map."""
    first = min(max(0, ceil(span.first * stride + low)), extent - 1)
    last = min(floor(span.last * stride + high), extent - 1)
    return Span(first, max(first, last) - first + 1, 0)


def _same_positions(value: Value, output: Value, window: Window) -> Window:
    """The window of an input of a rule that works position by position.

    An axis of another extent than the output's is repeated, and is needed as a whole.
    """
    axes = zip(window, value.shape[1:], output.shape[1:], strict=True)
    return tuple(span if n == m else Span(0, n, 0) for span, n, m in axes)


def _hull(first: Window, second: Window) -> Window:
    """The smallest window that has two windows."""
    hull = []
    for a, b in zip(first, second, strict=True):
        start = min(a.first, b.first)
        hull.append(Span(start, max(a.last, b.last) - start + 1, 0))
    return tuple(hull)


def moved_to(part: Tensor, have: Sequence[Span], want: Sequence[Span]) -> Tensor:
    """Cotangents on one window of a map, cut or padded with zeros to another one.

    Args:
        part: ``(batch, channels, *sizes)``.
        have: Its window, which may be partly or wholly outside of the map.
        want: The wanted window.
    """
    if _are_apart(have, want):
        return part.new_zeros(*part.shape[:2], *(span.size for span in want))
    return fitted(Windows(part, list(have), True), list(want))


def _are_apart(first: Sequence[Span], second: Sequence[Span]) -> bool:
    """Whether two windows have no position in common, as one in the padding and one in the map."""
    return any(a.last < b.first or b.last < a.first for a, b in zip(first, second, strict=True))


class CotangentWindows:
    """The steps of :func:`adjointbackmap.engine.operators.pull` on windows.

    Attributes:
        pattern: The activation pattern.
        windows: Slot -> window, from :func:`windows_before`.
    """

    def __init__(self, pattern: ActivationPattern, target: Value, window: Window) -> None:
        self.pattern = pattern
        self.windows = windows_before(pattern.program, target, window)

    def window(self, value: Value) -> Window:
        """The window of a value; the whole map for a value that only gates read."""
        return self.windows.get(value.slot, whole_window(value))

    def shape(self, value: Value) -> tuple[int, ...]:
        """Shape of the window of a value, without the batch."""
        return _shape(value, self.window(value))

    def back(self, step: Step, cotangent: Tensor, is_owned: bool) -> tuple[Tensor | None, ...]:
        """Cotangents of a step's inputs on their windows, from that of its output.

        Args:
            step: The step.
            cotangent: The cotangent of its output, on its window.
            is_owned: Whether it may be changed.
        """
        values = (*step.inputs, step.output)
        gates = self.pattern.gates.get(step.output.slot, ())
        is_constant = self.pattern.program.fields[step.output.slot] == ()
        if is_constant or all(self.window(v) == whole_window(v) for v in values):
            shapes = [i.shape for i in step.inputs]
            return step.rule.adjoint(gates, laid_out(cotangent), shapes)
        if is_owned and isinstance(step.rule, Gate):
            same = gated_in_place(self._cut(step.output, gates[0]), cotangent)
            return (moved_to(same, self.window(step.output), self.window(step.inputs[0])),)
        if step.rule.positional():
            return self._by_position(step, gates, cotangent)
        if isinstance(step.rule, MaxPooling):
            return (self._to_winners(step, gates[0], cotangent),)
        if isinstance(step.rule, Convolution):
            return (self._convolved(step, step.rule, cotangent),)
        if isinstance(step.rule, Local) and step.rule.reach() is not None:
            return (self._spread(step, step.rule, cotangent),)
        return self._on_whole_maps(step, gates, cotangent)

    def _by_position(
        self, step: Step, gates: Gates, cotangent: Tensor
    ) -> tuple[Tensor | None, ...]:
        """A rule that works position by position, with the gates of the window."""
        window = self.window(step.output)
        linear = len(step.linear_inputs)
        made = [_same_positions(i, step.output, window) for i in step.linear_inputs]
        made += [whole_window(i) for i in step.inputs[linear:]]
        shapes = [_shape(i, spans) for i, spans in zip(step.inputs, made, strict=True)]
        seen = tuple(self._cut(step.output, gate) for gate in gates)
        parts = step.rule.adjoint(seen, cotangent, shapes)
        return tuple(
            None if part is None else moved_to(part, spans, self.window(value))
            for value, part, spans in zip(step.inputs, parts, made, strict=True)
        )

    def _cut(self, value: Value, maps: Tensor) -> Tensor:
        """The window of a value, from maps ``(N, channels, *positions)`` or of extent 1."""
        whole = maps.expand(*maps.shape[:2], *value.shape[1:])
        places = (slice(span.first, span.last + 1) for span in self.window(value))
        return whole[(slice(None), slice(None), *places)]

    def _to_winners(self, step: Step, winners: Tensor, cotangent: Tensor) -> Tensor:
        """Max pooling: to the winners, whose places are counted inside of the input's window."""
        (value,) = step.inputs
        places = torch.unravel_index(self._cut(step.output, winners), value.shape[1:])
        flat = torch.zeros_like(places[0])
        for place, span in zip(places, self.window(value), strict=True):
            flat = flat * span.size + place - span.first
        (part,) = step.rule.adjoint((flat,), laid_out(cotangent), [self.shape(value)])
        return cast("Tensor", part)

    def _convolved(self, step: Step, rule: Convolution, cotangent: Tensor) -> Tensor:
        """A convolution: to all positions that it reads, also those in its padding."""
        (value,) = step.inputs
        read = needed(rule, list(self.window(step.output)))
        unpadded = Convolution(rule.weight, rule.stride, (0,), rule.dilation, rule.groups)
        shape = (value.shape[0], *(span.size for span in read))
        return moved_to(unpadded.back(laid_out(cotangent), shape), read, self.window(value))

    def _spread(self, step: Step, rule: Local, cotangent: Tensor) -> Tensor:
        """Another rule that reads a window around each position: the adjoint is derived."""
        (value,) = step.inputs
        of_output = list(self.window(step.output))
        of_input = list(self.window(value))
        read = needed(rule, of_output)
        if _are_apart(of_input, read):
            return cotangent.new_zeros(len(cotangent), *self.shape(value))
        pad = padding(of_input, read)
        if isinstance(rule, AveragePooling):
            correction = rule.border_correction(value.shape, cotangent)
            cotangent = cotangent * self._cut(step.output, correction)

        def forward(window: Tensor) -> Tensor:
            out = rule.valid(window, pad)
            firsts = rule.origin([span.first for span in read])
            if firsts is None:
                return out
            made = [Span(f, n, 0) for f, n in zip(firsts, out.shape[2:], strict=True)]
            return fitted(Windows(out, made, False), of_output)

        zeros = cotangent.new_zeros(len(cotangent), *self.shape(value))
        (part,) = torch.func.vjp(forward, zeros)[1](cotangent)
        return cast("Tensor", part)

    def _on_whole_maps(
        self, step: Step, gates: Gates, cotangent: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Any other rule, with zeros around the window of its output."""
        window = list(self.window(step.output))
        pad = padding(window, list(whole_window(step.output)))
        whole = laid_out(F.pad(cotangent, pad))
        parts = step.rule.adjoint(gates, whole, [i.shape for i in step.inputs])
        return tuple(
            None if part is None else moved_to(part, whole_window(value), self.window(value))
            for value, part in zip(step.inputs, parts, strict=True)
        )
