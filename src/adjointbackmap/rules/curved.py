"""How curved operations become steps that are linear in [x; b]: what their rules share.

A curved operation is not piecewise affine, such as GELU, a norm, or a product of two values that
depend on the image. It has no rule unless a trace asks for one with ``curved=``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Gates,
    Operation,
    Rule,
    Shape,
    Signs,
    Value,
    gated,
)
from adjointbackmap.rules.field import Field

C = TypeVar("C", bound="CurvedOperation")

REFUSE = "refuse"
FROZEN = "frozen"
TANGENT = "tangent"
NOTE = "frozen gates: not the derivative"
"""What must be said of hyperplanes with frozen gates."""
READINGS = (REFUSE, FROZEN, TANGENT)
"""What a trace may do with curved operations."""

GATE = "gate"
HALF = "half"
PRODUCTS = (GATE, HALF)
"""What a frozen product of two values may freeze."""


@dataclass(frozen=True)
class CurvedCall:
    """One call of a curved operation.

    Attributes:
        name: Name of the module's call with the operation, such as ``"layer1.act.gelu"``.
        operation: Name of the operation.
        frozen: What is held constant, such as ``"the quotient gelu(u) / u"``.
    """

    name: str
    operation: str
    frozen: str


class CurvedOperation(Operation):
    """How a curved ATen operation becomes steps."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        """Whether this use of the operation is curved; if not, its ordinary rule takes it."""
        return True


CURVED: dict[str, type[CurvedOperation]] = {}
"""ATen operation -> the rule of its curved uses."""


def curved_rule_for(*ops: str) -> Callable[[type[C]], type[C]]:
    """Make a class the rule of curved uses of ATen operations."""

    def register(rule: type[C]) -> type[C]:
        CURVED.update(dict.fromkeys(ops, rule))
        return rule

    return register


class Computed(Rule):
    """A value that gates alone read, such as the scores of attention.

    It has no tangent. If it reaches the output other than through gates, the trace refuses it.

    Args:
        function: Gives the value from the inputs.
        shape: Shape of the value without the batch.
        which: Which of several outputs of the function; ``None`` if it has one.
    """

    takes_infinities = True

    def __init__(
        self, function: Callable[..., Any], shape: Shape, which: int | None = None
    ) -> None:
        self.function = function
        self.shape = shape
        self.which = which

    def linear_inputs(self, count: int) -> int:
        return 0

    def output(self, gates: Gates, *inputs: Tensor) -> Tensor:
        made = self.function(*inputs)
        return made if self.which is None else made[self.which]

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        like = tangents[0]
        return like.new_zeros(()).expand(len(like), *self.shape)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        return (None,) * len(shapes)

    def kinks(self) -> None:
        """Unknown."""

    def infinities(self, *inputs: Signs) -> Signs:
        return frozenset()


class Linearized(Rule):
    """The derivative of a function at the pattern, plus the rest as an intercept.

    :math:`f(u) = J u + (f(u) - J u)`. The intercept is the coefficient of the entry 1, which is
    the last input.

    Args:
        function: A function of batches whose images are independent.
        held: Number of its last arguments that are constant, such as masks. They are the inputs
            after the entry.
    """

    takes_infinities = True

    def __init__(self, function: Callable[..., Tensor], held: int = 0) -> None:
        self.function = function
        self.held = held

    def linear_inputs(self, count: int) -> int:
        return count - self.held

    def output(self, gates: Gates, *inputs: Tensor) -> Tensor:
        moving, held = self._parts(inputs)
        return self.function(*moving, *held)

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        data, held = self._parts(inputs)
        finite = tuple(t.masked_fill(t.isinf(), 0) for t in data)
        value, through = torch.func.jvp(self._at(held), tuple(data), finite)[:2]
        return (*data, *held, value - through)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        *known, intercept = gates
        count = len(known) - self.held
        moving = tangents[:count]
        one = tangents[count]
        at = tuple(repeated(t, len(moving[0])) for t in known)
        function = self._at(at[count:])
        through = torch.func.jvp(function, at[:count], tuple(t.contiguous() for t in moving))[1]
        return through + gated(intercept, one)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        *known, intercept = gates
        count = len(known) - self.held
        at = tuple(repeated(t, len(cotangent)) for t in known)
        of_data = torch.func.vjp(self._at(at[count:]), *at[:count])[1](cotangent)
        of_one = gated(intercept, cotangent).sum_to_size(len(cotangent), *shapes[count])
        return (*of_data, of_one, *[None] * self.held)

    def _parts(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The inputs with tangents, without the entry; and those that are held."""
        count = len(inputs) - self.held
        return inputs[: count - 1], inputs[count:]

    def _at(self, held: Sequence[Tensor]) -> Callable[..., Tensor]:
        """The function of the arguments with tangents."""
        return lambda *moving: self.function(*moving, *held)

    def kinks(self) -> None:
        """Unknown."""

    def infinities(self, *inputs: Signs) -> Signs:
        return frozenset()


class Held(Rule):
    """A function that is linear in its first input, while the others are held constant.

    Args:
        function: ``function(first, *held)``, linear in ``first``; images are independent.
        hold: Gives what is held from all inputs; by default the inputs after the first.
    """

    def __init__(
        self, function: Callable[..., Tensor], hold: Callable[..., Gates] | None = None
    ) -> None:
        self.function = function
        self.hold = hold

    def linear_inputs(self, count: int) -> int:
        return 1

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        return tuple(inputs[1:]) if self.hold is None else self.hold(*inputs)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return self.function(tangents[0], *(repeated(g, len(tangents[0])) for g in gates))

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        at = [repeated(g, len(cotangent)) for g in gates]
        zeros = cotangent.new_zeros(len(cotangent), *shapes[0])
        pull_back = torch.func.vjp(lambda t: self.function(t, *at), zeros)[1]
        return (*pull_back(cotangent), *[None] * (len(shapes) - 1))

    def kinks(self) -> None:
        """Unknown."""

    def field(self, *fields: Field) -> Field:
        return None

    def infinities(self, *inputs: Signs) -> Signs:
        return inputs[0]


def repeated(gate: Tensor, count: int) -> Tensor:
    """Gates ``(N, *shape)`` for ``count = N * K`` tangents, each K times."""
    times = count // len(gate)
    return gate if times == 1 else gate.repeat_interleave(times, 0)


def linearized(
    builder: Builder,
    function: Callable[..., Tensor],
    *inputs: Value,
    shape: Shape | None = None,
    held: Sequence[Value] = (),
) -> Value:
    """Append the derivative of a function, with its intercept as an entry of ``b``.

    Args:
        builder: The trace.
        function: A function of batches whose images are independent.
        *inputs: Its arguments with tangents.
        shape: Shape of its value; by default that of the operation.
        held: Its last arguments, which are constant.
    """
    shape = builder.shape if shape is None else shape
    one = builder.number("intercept", 1.0)
    rule = Linearized(function, len(held))
    made = builder.apply(rule, *inputs, one, *held, shape=shape)
    return builder.note(made, "the derivative")
