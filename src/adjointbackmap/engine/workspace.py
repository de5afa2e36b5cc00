"""The work and the memory of a batch of vectors in a network, and how many vectors fit."""

from collections.abc import Callable, Collection, Sequence
from math import prod

from adjointbackmap.engine.program import Step
from adjointbackmap.engine.windows import Group
from adjointbackmap.rules import Field, Value
from adjointbackmap.rules.kernels import Kernel

# An operation copies its inputs and its output: padded, in another layout, or times a gate.
# Measured as the peak memory of a process: two copies of everything, see tests/test_memory.py.
COPIES_OF_VALUES = 2

Size = Callable[[Value], int]
"""Value -> count of numbers that one vector has there."""


def whole(value: Value) -> int:
    """Count of numbers in a whole map."""
    return prod(value.shape)


def on_windows(fields: dict[int, Field], strides: Sequence[int]) -> Size:
    """Count of numbers in the window of one pixel on each map.

    Args:
        fields: Receptive field of every value.
        strides: Distance of the pixels of one group along each axis.
    """
    pixel = Group.of_one(strides)

    def size(value: Value) -> int:
        field = fields.get(value.slot, ())
        if field == ():  # no pixel changes a constant
            return 0
        spans = pixel.spans(field)
        if spans is None:
            return whole(value)
        return min(whole(value), value.shape[0] * prod(max(0, span.size) for span in spans))

    return size


def held(steps: Sequence[Step], size: Size = whole, kept: Collection[int] = ()) -> int:
    """Largest count of numbers that one vector has in memory.

    Values are freed after their last use.

    Args:
        steps: The steps that the vector takes, in order.
        size: Value -> count of numbers.
        kept: Slots of values that are not freed.

    Example:
        >>> from adjointbackmap.rules.piecewise import ReLU
        >>> image, gated = Value(0, (4,)), Value(1, (4,))
        >>> held([Step(ReLU(), (image,), gated, "relu")])
        8
    """
    last = {value.slot: n for n, step in enumerate(steps) for value in step.inputs}
    sizes: dict[int, int] = {}
    most = 1
    for n, step in enumerate(steps):
        sizes |= {value.slot: size(value) for value in (*step.inputs, step.output)}
        most = max(most, sum(sizes.values()))
        for value in step.inputs:
            if last[value.slot] == n and value.slot not in kept:
                sizes.pop(value.slot, None)
    return most


def work_of(steps: Sequence[Step], shares: dict[int, float] | None = None) -> tuple[float, float]:
    """Multiply-adds of one tangent through some steps, and numbers that it writes.

    Args:
        steps: The steps.
        shares: Slot of an output -> share of its elements that is computed; by default all.
    """
    products = numbers = 0.0
    for step in steps:
        size = prod(step.output.shape) * (1.0 if shares is None else shares[step.output.slot])
        numbers += size
        if isinstance(step.rule, Kernel):
            products += size * step.rule.weight[0].numel()
    return products, numbers


def bytes_of_vector(numbers: int, itemsize: int) -> int:
    """Bytes that one vector of a batch takes, from :func:`held`."""
    return COPIES_OF_VALUES * numbers * itemsize


def vectors_within(room: int | None, numbers: int, itemsize: int) -> int | None:
    """Largest batch that fits into ``room`` bytes, at least one; ``None`` without a bound."""
    return None if room is None else max(1, room // bytes_of_vector(numbers, itemsize))


def block_shape(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """The largest block of at most ``most`` elements; it takes whole last dimensions first.

    Example:
        >>> block_shape((32, 32, 4), 300), block_shape((32, 32, 4), 10), block_shape((2, 3), 1)
        ((2, 32, 4), (1, 2, 4), (1, 1))
    """
    block: tuple[int, ...] = ()
    for extent in reversed(shape):
        block = (max(1, min(extent, most // prod(block))), *block)
    return block
