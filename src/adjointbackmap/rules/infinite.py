"""Infinite constants: what always loses a maximum, or always wins one, has no entry in ``b`` and no tangent.

Only the forward pass that records the pattern sees them. An operation that removes them, such as a maximum with
something finite, gives numbers again; what may still hold one is no layer and no output.
"""

from collections.abc import Sequence

from torch import Tensor

from adjointbackmap.rules.base import Gates, Rule, Shape, Signs
from adjointbackmap.rules.field import Field


class Infinite(Rule):
    """A constant that is infinite somewhere and zero elsewhere; a step without inputs.

    Args:
        value: ``(1, *shape)``.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Refuse: without inputs there is no tangent.

        Raises:
            RuntimeError: Always.
        """
        msg = "An infinite constant must stay out of sums of tangents. Got one: please report this network."
        raise RuntimeError(msg)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """No input has a cotangent."""
        return ()

    def field(self, *fields: Field) -> Field:
        """No pixel."""
        return ()

    def infinities(self, *inputs: Signs) -> Signs:
        """Those of the constant."""
        values = self.value[self.value != 0].sign().unique()
        return frozenset(int(v) for v in values)


def is_infinite(tensor: Tensor) -> bool:
    """Whether a constant holds an infinity."""
    return tensor.is_floating_point() and bool(tensor.isinf().any())


def finite(tensor: Tensor) -> Tensor:
    """A constant with zeros where it is infinite."""
    return tensor.masked_fill(tensor.isinf(), 0)
