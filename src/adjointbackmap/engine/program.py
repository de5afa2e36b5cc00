"""The steps of a network in one dtype, which are linear in the image and the bias vector."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from adjointbackmap.rules import Axis, Entry, Field, Rule, Value
from adjointbackmap.rules.base import Signs
from adjointbackmap.rules.curved import CurvedCall
from adjointbackmap.rules.infinite import Infinite
from adjointbackmap.rules.kernels import Kernel

T = TypeVar("T")

IMAGE = 0  # slot of the image
# Largest batch of tangents or cotangents on the CPU. Measured: 32 to 128 are the fastest.
CHUNK = 128
# Largest count of numbers in a batch's largest map on the CPU, and on another device. There each
# operation has a fixed cost, so larger batches are faster.
CHUNK_NUMBERS = 2**24
CHUNK_NUMBERS_ON_DEVICE = 2**26


class UnsupportedOperation(ValueError):
    """The network has operations that are not piecewise affine, or that have no rule.

    The message names all of them.
    """


@dataclass(frozen=True)
class Step:
    """One rule applied to earlier values.

    Attributes:
        rule: The rule.
        inputs: Its inputs.
        output: Its output.
        op: Name of the ATen operation that it belongs to.
    """

    rule: Rule
    inputs: tuple[Value, ...]
    output: Value
    op: str

    @property
    def linear_inputs(self) -> tuple[Value, ...]:
        """The inputs that have tangents; gates alone read the others."""
        return self.inputs[: self.rule.linear_inputs(len(self.inputs))]


@dataclass(frozen=True)
class KernelCall:
    """A convolution or linear call.

    Attributes:
        op: The ATen operation.
        weight: The kernel.
        rest: The arguments after input, kernel and bias.
        rule: The rule of the kernel.
        input: The input.
        sum: The weighted sum, without bias.
    """

    op: Any
    weight: Tensor
    rest: tuple[Any, ...]
    rule: Kernel
    input: Value
    sum: Value

    def apply(self, x: Tensor) -> Tensor:
        """The weighted sum of an input ``(N, ...)``, without bias, from PyTorch's operation."""
        return self.op(x, self.weight, None, *self.rest)


@dataclass
class Program:
    """The steps of a network on a device.

    Attributes:
        image: The image.
        device: The device of the steps.
        steps: The steps in the order of execution.
        entries: Entries of the bias vector.
        values: Name of a node of the graph -> its value.
        kernels: Name of a node -> its convolution or linear call.
        curved: Slot of a value -> the curved call that makes it.
        constants: Additive constants that gates alone read; they are no part of ``b``.
        given: Number of an input of the model -> its value, which gates alone read, if the image
            enters after one of the model's modules.
    """

    image: Value
    device: torch.device
    steps: list[Step] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    kernels: dict[str, KernelCall] = field(default_factory=dict)
    curved: dict[int, CurvedCall] = field(default_factory=dict)
    constants: list[Entry] = field(default_factory=list)
    given: dict[int, Value] = field(default_factory=dict)

    @cached_property
    def chunk(self) -> int:
        """Number of tangents or cotangents of one image that are computed as one batch."""
        return self.chunk_of(self.largest)

    def chunk_of(self, largest: int) -> int:
        """The same where the largest part of a map that is computed has so many numbers."""
        if self.device.type == "cpu":
            return max(1, min(CHUNK, CHUNK_NUMBERS // largest))
        return max(1, CHUNK_NUMBERS_ON_DEVICE // largest)

    @cached_property
    def largest(self) -> int:
        """Count of numbers in the largest map of one image."""
        values = (self.image, *(step.output for step in self.steps))
        return max(prod(value.shape) for value in values)

    @cached_property
    def bias_length(self) -> int:
        """Length M of the bias vector."""
        return sum(entry.value.numel() for entry in self.entries)

    @property
    def outline(self) -> tuple[list[Any], ...]:
        """Operations, slots and shapes; equal for the programs of a network in two dtypes."""
        steps = [(step.op, step.inputs, step.output) for step in self.steps]
        return steps, [(e.slot, e.value.shape) for e in self.entries], list(self.kernels)

    def upstream(self, targets: Iterable[Value]) -> list[Step]:
        """The steps that the targets depend on, in order."""
        slots = frozenset(target.slot for target in targets)
        if slots not in self._upstream:
            self._upstream[slots] = self._leading_to(slots)
        return list(self._upstream[slots])

    @cached_property
    def _upstream(self) -> dict[frozenset[int], list[Step]]:
        """Cache of :meth:`upstream`, which is called many times with the same targets."""
        return {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """A figure that follows from the steps, computed at the first call with its key.

        A query of one unit would otherwise count the steps for longer than it computes.
        """
        if key not in self._figures:
            self._figures[key] = compute()
        return cast("T", self._figures[key])

    @cached_property
    def _figures(self) -> dict[Hashable, Any]:
        """Cache of :meth:`once`."""
        return {}

    def _leading_to(self, slots: frozenset[int]) -> list[Step]:
        needed = set(slots)
        kept = []
        for step in reversed(self.steps):
            if step.output.slot in needed:
                # what only frozen gates read has no tangents
                has_gates_apart = self.curved or self.given
                linear = step.linear_inputs if has_gates_apart else step.inputs
                needed.update(i.slot for i in linear)
                kept.append(step)
        return kept[::-1]

    def with_tangents(self, targets: Iterable[Value]) -> set[int]:
        """Slots from which tangents reach the targets; not those that gates alone read."""
        needed = {target.slot for target in targets}
        for step in reversed(self.steps):
            if step.output.slot in needed:
                needed.update(i.slot for i in step.linear_inputs)
        return needed

    @cached_property
    def infinite(self) -> dict[int, Signs]:
        """Slot -> infinities that the value can hold; empty if no constant is infinite."""
        return infinities_in(self.steps)

    @cached_property
    def fields(self) -> dict[int, Field]:
        """Slot -> receptive field; to be read once all steps are there."""
        spatial = max(len(self.image.shape) - 1, 0)  # axes of the image without its channels
        fields: dict[int, Field] = {e.slot: () for e in (*self.entries, *self.constants)}
        fields |= {value.slot: () for value in self.given.values()}
        fields[IMAGE] = (Axis(),) * spatial if spatial else None
        for step in self.steps:
            known = [_field_in(fields[i.slot], i, step) for i in step.inputs]
            is_constant = all(f == () for f in known)
            fields[step.output.slot] = () if is_constant else step.rule.field(*known)
        return fields


def infinities_in(steps: Sequence[Step]) -> dict[int, Signs]:
    """Slot -> infinities that the value can hold; empty if no constant is infinite."""
    held: dict[int, Signs] = {}
    if not any(isinstance(step.rule, Infinite) for step in steps):
        return held
    for step in steps:
        of_inputs = [held.get(i.slot, frozenset()) for i in step.inputs]
        held[step.output.slot] = step.rule.infinities(*of_inputs)
    return {slot: signs for slot, signs in held.items() if signs}


def _field_in(field: Field, value: Value, step: Step) -> Field:
    """The field of an input, as a step may use it.

    It is the whole image if the rule works position by position but the input is broadcast from
    other positions.
    """
    is_broadcast = step.rule.positional() and value.shape[1:] != step.output.shape[1:]
    return None if is_broadcast and field != () else field
