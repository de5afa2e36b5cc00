"""Infinite constants, which always lose or always win a maximum.

They have no entry in ``b`` and no tangent. Only the forward pass that records the pattern sees
them. A maximum with something finite removes minus infinity, so its output is finite again. A value
that may still hold an infinity cannot be a layer or an output.
"""

from collections.abc import Sequence

from torch import Tensor

from adjointbackmap.rules.base import Gates, Rule, Shape, Signs
from adjointbackmap.rules.field import Field


class InfiniteValue(ValueError):
    """A value that must be finite is infinite at these images."""


class Infinite(Rule):
    """A step without inputs, for a constant that is infinite at some places and zero elsewhere.

    Args:
        value: The constant, ``(1, *shape)``.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Refuse, because a step without inputs has no tangent.

        Raises:
            RuntimeError: Always.
        """
        msg = (
            "An infinite constant must stay out of sums of tangents. "
            "Got one: please report this network."
        )
        raise RuntimeError(msg)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        return ()

    def field(self, *fields: Field) -> Field:
        return ()

    def infinities(self, *inputs: Signs) -> Signs:
        values = self.value[self.value != 0].sign().unique()
        return frozenset(int(v) for v in values)


def is_infinite(tensor: Tensor) -> bool:
    """Whether a constant holds an infinity."""
    return tensor.is_floating_point() and bool(tensor.isinf().any())


def finite(tensor: Tensor) -> Tensor:
    """The constant with its infinities replaced by zeros."""
    return tensor.masked_fill(tensor.isinf(), 0)
