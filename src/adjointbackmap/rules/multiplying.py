r"""Products and quotients of two values that depend on the image.

Frozen, one factor is a gate: the factor that is a gate by nature, see
:class:`adjointbackmap.rules.curved.Nature`. If neither or both are, each factor is frozen in turn
with weight one half. The denominator of a quotient is always a gate. As tangent, a product is
:math:`[a]\,b + a\,[b] - [a b]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.activations import INVERSE, Quotient, curve
from adjointbackmap.rules.base import (
    Builder,
    Gates,
    Mask,
    Pointwise,
    Refused,
    Rule,
    Shape,
    SoftmaxValue,
    Value,
    gated,
    keep_batch,
    tensor_of,
)
from adjointbackmap.rules.curved import (
    GATE,
    TANGENT,
    CurvedOperation,
    Held,
    curved_rule_for,
    linearized,
    repeated,
)
from adjointbackmap.rules.linear import (
    Masked,
    Multiply,
    check_dimensions,
    weighted_sum,
)
from adjointbackmap.rules.moving import Slice
from adjointbackmap.rules.natures import Nature
from adjointbackmap.rules.pooling import Sum

Function = Callable[[Tensor, Tensor], Tensor]
FIRST_FROZEN = "the first factor"
SECOND_FROZEN = "the second factor"
BOTH_FROZEN = "each factor in turn, with weight one half"


class SharedProduct(Rule):
    r"""Half of each product with one frozen factor: :math:`(a\,[b] + [a]\,b) / 2`.

    Args:
        function: The product of two batches.
    """

    weight = 0.5

    def __init__(self, function: Function) -> None:
        self.function = function

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        return inputs

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        first, second = (repeated(g, len(tangents[0])) for g in gates)
        moved = self.function(tangents[0], second) + self.function(first, tangents[1])
        return self.weight * moved

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        factors = [repeated(g, len(cotangent)) for g in gates]
        parts = torch.func.vjp(self.function, *factors)[1](cotangent)
        return tuple(self.weight * part for part in parts)

    def kinks(self) -> None:
        """Unknown."""


class SharedMultiply(SharedProduct, Pointwise):
    """The same for products position by position."""

    def __init__(self) -> None:
        super().__init__(torch.mul)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        first, second = gates
        return self.weight * (gated(second, tangents[0]) + gated(first, tangents[1]))

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        # the adjoint of a broadcast is a sum
        return tuple(
            self.weight * gated(other, cotangent).sum_to_size(len(cotangent), *shape)
            for other, shape in zip(gates[::-1], shapes, strict=True)
        )


class TangentMultiply(SharedMultiply):
    r"""The derivative of a product position by position, and its rest as an intercept.

    The intercept :math:`-a b` is the coefficient of an entry 1.
    """

    weight = 1.0

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        first, second, _ = inputs
        return first, second, -first * second

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return super().forward(gates[:2], *tangents[:2]) + gated(gates[2], tangents[2])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        of_one = gated(gates[2], cotangent).sum_to_size(len(cotangent), *shapes[2])
        return (*super().adjoint(gates[:2], cotangent, shapes[:2]), of_one)


def frozen_factor(builder: Builder, first: Value, second: Value) -> int | None:
    """Which of two factors is the gate, 0 or 1; ``None`` if each is in turn."""
    natures = [builder.nature(first), builder.nature(second)]
    if builder.products != GATE and min(natures) > Nature.SOFTMAX:
        return None
    gates = [min(nature, Nature.SQUARES) for nature in natures]  # squares are no gates
    if gates[0] == gates[1]:
        return None
    return gates.index(min(gates))


def multiplied(builder: Builder, first: Value, second: Value, shape: Shape | None = None) -> Value:
    """Append the product of two values, position by position.

    Raises:
        Refused: If they have different numbers of dimensions.
    """
    check_dimensions(first.shape, second.shape)
    shape = tuple(torch.broadcast_shapes(first.shape, second.shape)) if shape is None else shape
    if builder.curved == TANGENT:
        one = builder.number("intercept", 1.0, len(shape))
        made = builder.apply(TangentMultiply(), first, second, one, shape=shape)
        return builder.note(made, "the derivative")
    which = frozen_factor(builder, first, second)
    if which is None:
        made = builder.apply(SharedMultiply(), first, second, shape=shape)
        squares = first == second
        return builder.note(builder.mark(made, Nature.SQUARES) if squares else made, BOTH_FROZEN)
    gate, data = (first, second) if which == 0 else (second, first)
    return builder.note(times_gate(builder, data, gate), (FIRST_FROZEN, SECOND_FROZEN)[which])


def times_gate(
    builder: Builder,
    data: Value,
    gate: Value,
    function: Callable[[Tensor], Tensor] = lambda t: t,
) -> Value:
    """Append a value times a gate, which is a function of another value."""
    mask = Mask(lambda k, t: function(t), (gate,), gate.shape)
    return Masked.product(builder, data, mask)


def quotient(builder: Builder, first: Value, second: Value) -> Value:
    """Append the quotient of two values; frozen, the denominator is the gate."""
    if builder.curved == TANGENT:
        return multiplied(builder, first, curve(builder, INVERSE, second))
    check_dimensions(first.shape, second.shape)
    made = times_gate(builder, first, second, torch.reciprocal)
    return builder.note(made, "the denominator")


def contracted(
    builder: Builder, function: Function, first: Value, second: Value, shape: Shape
) -> Value:
    """Append a product of two values that sums over dimensions, such as a matrix product."""
    if builder.curved == TANGENT:
        return linearized(builder, function, first, second, shape=shape)
    which = frozen_factor(builder, first, second)
    if which is None:
        made = builder.apply(SharedProduct(function), first, second, shape=shape)
        return builder.note(made, BOTH_FROZEN)
    if which == 1:
        made = builder.apply(Held(function), first, second, shape=shape)
        return builder.note(made, SECOND_FROZEN)
    made = builder.apply(Held(lambda t, held: function(held, t)), second, first, shape=shape)
    return builder.note(made, FIRST_FROZEN)


class TwoFactors(CurvedOperation):
    """A product whose first two arguments both depend on the image."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        return not any(builder.constant_on_pieces(a) for a in cls.factors(*args))

    @classmethod
    def factors(cls, *args: Any) -> Sequence[Any]:
        """The arguments that may depend on the image."""
        return args[:2]


class AddedProduct(TwoFactors):
    """A value plus a product of the two arguments after it."""

    @classmethod
    def factors(cls, *args: Any) -> Sequence[Any]:
        return args[1:3]


@curved_rule_for("aten.mul.Tensor")
class MultiplyData(TwoFactors):
    """Product of two values, position by position."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        first, second = args[:2]
        return multiplied(builder, first, second, builder.shape)


@curved_rule_for("aten.matmul.default", "aten.bmm.default")
class MatrixProductOfData(TwoFactors):
    """Matrix product of two values."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If a factor is one vector for each image.
        """
        first, second = args
        check_dimensions(first.shape, second.shape)
        if len(first.shape) < 2:
            msg = "it is a product of two vectors, which PyTorch takes for a matrix of the batch"
            raise Refused(msg)
        return contracted(builder, torch.matmul, first, second, builder.shape)


@curved_rule_for("aten.einsum.default")
class EinsumOfData(CurvedOperation):
    """A sum of products of two values, and of constants, in Einstein's notation."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        return sum(not builder.constant_on_pieces(o) for o in args[1]) > 1

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If more than two operands depend on the image, or their batch is summed.
        """
        equation, operands = args[:2]
        data = [i for i, o in enumerate(operands) if isinstance(o, Value)]
        if len(data) > 2:
            msg = "more than two of its operands depend on the image: multiply two at a time"
            raise Refused(msg)
        left, _, right = equation.replace(" ", "").partition("->")
        terms = left.split(",")
        if not right or {terms[i][:1] for i in data} != {right[:1]} or right[:1] == ".":
            msg = "the first letter of its factors and of its result must be the same, the batch"
            raise Refused(msg)
        constants = [None if i in data else tensor_of(o, "operand") for i, o in enumerate(operands)]

        def function(first: Tensor, second: Tensor) -> Tensor:
            given = iter((first, second))
            return torch.einsum(equation, *(next(given) if o is None else o for o in constants))

        first, second = (operands[i] for i in data)
        return contracted(builder, function, first, second, builder.shape)


@curved_rule_for("aten.bilinear.default")
class BilinearOfData(TwoFactors):
    """A bilinear form of two values, plus a bias."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        first, second, weight, bias = (*args, None)[:4]
        kernel = tensor_of(weight, "weight")

        def function(a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("...i,oij,...j->...o", a, kernel, b)

        made = contracted(builder, function, first, second, builder.shape)
        return made if bias is None else weighted_sum(builder, [(made, 1), (bias, 1)])


@curved_rule_for("aten.addcmul.default", "aten.addcdiv.default")
class SumAndProductOfData(AddedProduct):
    """A value plus a multiple of a product or quotient of two values."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        added, first, second = args
        made = (quotient if builder.op == "addcdiv" else multiplied)(builder, first, second)
        return weighted_sum(builder, [(added, 1), (made, kwargs.get("value", 1))])


@curved_rule_for("aten.baddbmm.default")
class BatchProductAndSum(AddedProduct):
    """A value plus a matrix product of two values."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        added, first, second = args
        made = contracted(builder, torch.matmul, first, second, builder.shape)
        terms = [(made, kwargs.get("alpha", 1)), (added, kwargs.get("beta", 1))]
        return weighted_sum(builder, terms)


@curved_rule_for("aten.lerp.Tensor")
class LerpWithData(CurvedOperation):
    r"""Interpolation with a weight that depends on the image: :math:`a + w (b - a)`."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        return not builder.constant_on_pieces(args[2])

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        start, end, weight = args
        difference = weighted_sum(builder, [(end, 1), (start, -1)])
        moved = multiplied(builder, difference, weight)
        return weighted_sum(builder, [(start, 1), (moved, 1)])


@curved_rule_for("aten.div.Tensor")
class DivideByData(CurvedOperation):
    r"""Division by data: :math:`a / v` with the denominator as gate.

    A constant over data is the constant times ``reciprocal(v)``. An exponential over its sum along
    one dimension is a softmax.
    """

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        return not builder.constant_on_pieces(args[1])

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Append the quotient.

        Raises:
            SoftmaxValue: If it is a softmax that is frozen; then gates alone may read it.
        """
        first, second = args
        if isinstance(first, Value):
            if builder.curved != TANGENT and _is_softmax(builder, first, second):
                raise SoftmaxValue
            return quotient(builder, first, second)
        inverse = curve(builder, INVERSE, second)
        return Multiply.build(builder, inverse, first)


def _is_softmax(builder: Builder, first: Value, second: Value) -> bool:
    """Whether a quotient is that of an exponential and its sum along one dimension."""
    divided = builder.made_by(first)
    divisor = builder.made_by(second)
    if divided is None or divisor is None or divisor[1] != (first,):
        return False
    is_exponential = isinstance(divided[0], Quotient) and divided[0].function.__name__ == "exp"
    return is_exponential and isinstance(divisor[0], Sum) and len(divisor[0].args[0]) == 1


@curved_rule_for("aten.glu.default")
class GatedLinearUnit(CurvedOperation):
    r"""The first half times the sigmoid of the second: :math:`a\,\sigma(b)`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, dim = (*args, kwargs.get("dim", -1))[:2]
        (dim,) = keep_batch([dim], x)
        size = builder.shape[dim - 1]
        axes = len(x.shape) - 1
        first = builder.apply(Slice(axes, dim, 0, size, 1), x)
        second = builder.apply(Slice(axes, dim, size, 2 * size, 1), x)
        return multiplied(builder, first, curve(builder, "sigmoid.default", second))
