"""Where an operation changes its piece: the kinks that each rule gives with its method ``kinks``.

The distances to kinks and the breakpoints on a line are computed from these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]
At = float | Tensor | Callable[..., Tensor]
"""A value: a number, a tensor that broadcasts with the input, or a function of all inputs that is
constant on their pieces."""


@dataclass(frozen=True)
class Levels:
    """Kinks where an input, or the difference of two inputs, takes one of some values.

    Attributes:
        at: The values.
        of: Which input; or two, whose difference counts. An input that a step lacks is zero.
        jumps: Whether the output jumps at the kinks.
        isolated: Whether the output differs at the kink alone, and is the same on both sides.
    """

    at: tuple[At, ...] = (0.0,)
    of: tuple[int, ...] = (0,)
    jumps: bool = False
    isolated: bool = False

    def moved(self, by: int) -> "Levels":
        """The same kinks, if ``by`` other inputs come first."""

        def behind(at: At) -> At:
            return (lambda *inputs: at(*inputs[by:])) if callable(at) else at

        return replace(self, of=tuple(i + by for i in self.of), at=tuple(map(behind, self.at)))


NOT_ZERO = Levels(jumps=True, isolated=True)  # of a mask that holds where its input is not zero


def winner(count: int) -> tuple[int, int]:
    """The first rank alone."""
    return 0, 0


def every_rank(count: int) -> tuple[int, int]:
    """All ranks."""
    return 0, count - 1


@dataclass(frozen=True)
class Order:
    """Kinks where two elements of a group are equal and change their order.

    Attributes:
        places: Shape of the input without the batch -> places of each group's elements in the
            flat input, ``(groups, elements)``; -1 for none.
        ranks: Number of elements -> the first and the last rank that the operation looks at, 0 for
            the winner. Two elements that change other ranks make no kink.
        largest: Whether the winner is the largest element.
        running: Whether the operation takes the winner up to each element.
        of: Which input.
        jumps: Whether the output jumps at the kinks.
    """

    places: Callable[[Shape], Tensor]
    ranks: Callable[[int], tuple[int, int]] = winner
    largest: bool = True
    running: bool = False
    of: int = 0
    jumps: bool = False

    def moved(self, by: int) -> "Order":
        """The same kinks, if ``by`` other inputs come first."""
        return replace(self, of=self.of + by)


Kinks = tuple[Levels | Order, ...]


def moved(kinks: Kinks | None, by: int) -> Kinks | None:
    """Kinks of an operation, if ``by`` other inputs come first."""
    return None if kinks is None else tuple(kink.moved(by) for kink in kinks)


def jumping(kinks: Kinks | None) -> Kinks | None:
    """The kinks of an operation whose output jumps at each of them."""
    return None if kinks is None else tuple(replace(kink, jumps=True) for kink in kinks)


def joined(parts: Sequence[tuple[Kinks | None, int]]) -> Kinks | None:
    """Kinks of several operations, each with its number of inputs; the inputs follow one another.

    The result is ``None`` if one operation does not give its kinks.
    """
    found: list[Levels | Order] = []
    before = 0
    for kinks, inputs in parts:
        if kinks is None:
            return None
        found += [kink.moved(before) for kink in kinks]
        before += inputs
    return tuple(found)


def along(*dims: int) -> Callable[[Shape], Tensor]:
    """Groups of the elements along some dimensions, counted with the batch.

    Example:
        >>> along(2)((2, 3)).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """

    def places(shape: Shape) -> Tensor:
        numbers = torch.arange(prod(shape)).view(shape)
        own = sorted(dim - 1 for dim in dims)
        last = list(range(numbers.dim() - len(own), numbers.dim()))
        return numbers.movedim(own, last).reshape(-1, prod(shape[axis] for axis in own))

    return places
