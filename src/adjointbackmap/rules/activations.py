r"""Curved functions of one number: GELU, sigmoid, exponentials, powers, and others.

Frozen, :math:`f(u) = f(0) + u\,q(u)` with the quotient :math:`q(u) = (f(u) - f(0)) / u` as gate
and :math:`f(0)` as an entry of ``b``. As tangent, :math:`f(u) = f'(u)\,u + (f(u) - f'(u)\,u)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import Builder, Refused, Signs, Value
from adjointbackmap.rules.curved import (
    TANGENT,
    CurvedOperation,
    curved_rule_for,
)
from adjointbackmap.rules.infinite import InfiniteValue, finite
from adjointbackmap.rules.kinks import Kinks
from adjointbackmap.rules.natures import Nature
from adjointbackmap.rules.piecewise import PiecewiseAffine

Function = Callable[[Tensor], Tensor]
# Up to this |u|, f(u) - f(0) is taken from a form in which nothing cancels.
CANCELS = 1.0
LN2 = math.log(2)


def _above_ln2(v: Tensor) -> Tensor:
    """``log(1 + exp(v)) - log(2)`` for small ``v``."""
    return torch.log1p(torch.expm1(v) / 2)


def _softplus_rest(u: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return _above_ln2(beta * u) / beta


def _power_of_base(u: Tensor, base: float) -> Tensor:
    return torch.expm1(u * math.log(base))


@dataclass(frozen=True)
class Curve:
    """What is known of a curved function.

    Attributes:
        nature: What its values are as factors of a product.
        rest: ``f(u) - f(0)`` for ``abs(u) < CANCELS`` without cancellation, with the operation's
            other arguments after ``u``; ``None`` if ``f(0)`` is zero or not finite.
    """

    nature: Nature = Nature.ACTIVATION
    rest: Callable[..., Tensor] | None = None


CURVES = {
    "acos.default": Curve(rest=lambda u: -torch.asin(u)),
    "asin.default": Curve(),
    "asinh.default": Curve(),
    "atan.default": Curve(),
    "atanh.default": Curve(),
    "celu.default": Curve(),
    "cos.default": Curve(rest=lambda u: -2 * torch.sin(u / 2).square()),
    "cosh.default": Curve(rest=lambda u: 2 * torch.sinh(u / 2).square()),
    "elu.default": Curve(),
    "erf.default": Curve(),
    "erfc.default": Curve(rest=lambda u: -torch.erf(u)),
    "exp.default": Curve(rest=torch.expm1),
    "exp2.default": Curve(rest=lambda u: torch.expm1(u * LN2)),
    "expm1.default": Curve(),
    "gelu.default": Curve(),
    "hardswish.default": Curve(),
    "log.default": Curve(Nature.PLAIN),
    "log10.default": Curve(Nature.PLAIN),
    "log1p.default": Curve(Nature.PLAIN),
    "log2.default": Curve(Nature.PLAIN),
    "log_sigmoid.default": Curve(rest=lambda u: -_above_ln2(-u)),
    "logit.default": Curve(Nature.PLAIN),
    "mish.default": Curve(),
    "pow.Scalar": Curve(rest=_power_of_base),
    "pow.Tensor_Scalar": Curve(Nature.PLAIN),
    "reciprocal.default": Curve(Nature.PLAIN),
    "rsqrt.default": Curve(Nature.PLAIN),
    "selu.default": Curve(),
    "sigmoid.default": Curve(Nature.SIGMOID, lambda u: torch.tanh(u / 2) / 2),
    "silu.default": Curve(),
    "sin.default": Curve(),
    "sinh.default": Curve(),
    "softplus.default": Curve(rest=_softplus_rest),
    "sqrt.default": Curve(Nature.PLAIN),
    "square.default": Curve(Nature.SQUARES),
    "tan.default": Curve(),
    "tanh.default": Curve(Nature.TANH),
}
"""ATen operation -> its curve."""

ROOTS = {"sqrt.default", "rsqrt.default"}
INVERSE = "reciprocal.default"
POWER = "pow.Tensor_Scalar"


class Quotient(PiecewiseAffine):
    r"""A curved function with its quotient as gate, and :math:`f(0)` as an entry of ``b``.

    If :math:`f(0)` is not finite, the gate is :math:`f(u) / u`. Where ``u`` is zero, the gate is
    :math:`f'(0)`, and zero if that is not finite. Where ``u`` is infinite, the gate is zero, and
    :math:`f(u)` is the coefficient of an entry 1.

    Args:
        function: The function, element by element.
        rest: ``f(u) - f(0)`` near zero, see :class:`Curve`.
        infinite: Whether the input may be infinite.
    """

    def __init__(
        self, function: Function, rest: Function | None = None, infinite: bool = False
    ) -> None:
        self.function = function
        zero = torch.zeros((), dtype=torch.float64)
        at_zero = float(function(zero))
        self.at_zero = at_zero if math.isfinite(at_zero) else 0.0
        slope = float(torch.func.grad(function)(zero))
        self.limit = slope if math.isfinite(slope) else 0.0
        self.rest = rest
        self.infinite = infinite

    def entries(self) -> list[tuple[str, float]]:
        at_zero = [("f(0)", self.at_zero)] if self.at_zero else []
        return [*at_zero, ("f(inf)", 1.0)] if self.infinite else at_zero

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        value = finite_values(self.function, c)
        rest = value - self.at_zero
        if self.rest is not None:
            near = self.rest(c.clamp(-CANCELS, CANCELS))
            rest = torch.where(c.abs() < CANCELS, near, rest)
        quotient = torch.where(c == 0, c.new_tensor(self.limit), rest / torch.where(c == 0, 1, c))
        if not self.infinite:
            return quotient, {"f(0)": torch.ones_like(c)}
        far = c.isinf()
        quotient = quotient.masked_fill(far, 0)
        return quotient, {"f(0)": (~far).to(c.dtype), "f(inf)": value * far}

    def infinities(self, *inputs: Signs) -> Signs:
        return frozenset()

    def kinks(self) -> Kinks | None:
        """Unknown."""
        return None


class Slope(PiecewiseAffine):
    r"""A curved function with its derivative as gate; the rest is the coefficient of an entry 1.

    Where the derivative or the input is not finite, it is taken as zero.
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def entries(self) -> list[tuple[str, float]]:
        return [("intercept", 1.0)]

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        value = finite_values(self.function, c)
        (slope,) = torch.func.vjp(self.function, c)[1](torch.ones_like(c))
        slope = torch.where(slope.isfinite(), slope, torch.zeros_like(slope))
        slope = slope.masked_fill(c.isinf(), 0)
        return slope, {"intercept": value - slope * finite(c)}

    def infinities(self, *inputs: Signs) -> Signs:
        return frozenset()

    def kinks(self) -> Kinks | None:
        """Unknown."""
        return None


def finite_values(function: Function, c: Tensor) -> Tensor:
    """The function's values.

    Raises:
        InfiniteValue: If one is not finite.
    """
    value = function(c)
    if not bool(value.isfinite().all()):
        name = getattr(function, "__name__", "a curved function")
        wrong = c[~value.isfinite()].flatten()[0]
        msg = (
            f"Every value of a curved operation must be finite. Got {name} of {float(wrong):g}: "
            "give an image at which it is finite, or cut the network before it with until=."
        )
        raise InfiniteValue(msg)
    return value


def curve(
    builder: Builder,
    name: str,
    x: Value,
    *args: Any,
    function: Function | None = None,
    **kwargs: Any,
) -> Value:
    """Append the steps of a curved function of one number.

    Args:
        builder: What appends the steps.
        name: Key of :data:`CURVES`.
        x: The input.
        *args: The operation's other arguments.
        function: The function, if the data are not the operation's first argument.
        **kwargs: Its other arguments by name.
    """
    known = CURVES[name]
    op = name.partition(".")[0]

    def of_data(u: Tensor) -> Tensor:
        overload = getattr(getattr(torch.ops.aten, op), name.partition(".")[2])
        return overload(u, *args, **kwargs) if function is None else function(u)

    of_data.__name__ = op
    near_zero = known.rest
    rest = None if near_zero is None else lambda u: near_zero(u, *args)
    is_tangent = builder.curved == TANGENT
    infinite = builder.may_be_infinite(x)
    rule = Slope(of_data) if is_tangent else Quotient(of_data, rest, infinite)
    constants = [builder.number(key, number, len(x.shape)) for key, number in rule.entries()]
    made = builder.apply(rule, x, *constants, shape=x.shape)
    builder.mark(made, _nature(name, known.nature, args, builder.nature(x)))
    frozen = "the derivative" if is_tangent else _frozen(op, rule)
    return builder.note(made, frozen)


def _frozen(op: str, rule: PiecewiseAffine) -> str:
    constant = f" - {op}(0)" if ("f(0)" in dict(rule.entries())) else ""
    return f"the quotient ({op}(u){constant}) / u" if constant else f"the quotient {op}(u) / u"


def _nature(name: str, own: Nature, args: tuple[Any, ...], of_input: Nature) -> Nature:
    """What a curved function's values are, from what its input is.

    Roots and inverses of sums of squares, and inverses of norms, are norms.
    """
    exponent = args[0] if name == POWER else None
    if exponent == 2:
        return Nature.SQUARES
    is_root = name in ROOTS or (exponent is not None and abs(exponent) == 0.5)
    is_inverse = name == INVERSE or (exponent is not None and exponent < 0)
    of_squares = of_input == Nature.SQUARES and (is_root or is_inverse)
    return Nature.NORM if of_squares or (of_input == Nature.NORM and is_inverse) else own


@curved_rule_for(*(f"aten.{name}" for name in CURVES))
class Elementwise(CurvedOperation):
    """A curved function of one number, from the table :data:`CURVES`."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        # the first power is the value itself
        return not (builder.op == "pow" and args[1] == 1)

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        name = str(builder.call).removeprefix("aten.")
        if name != "pow.Scalar":
            return curve(builder, name, *args, **kwargs)
        base, x = args
        if not base > 0:
            msg = "its base is not positive"
            raise Refused(msg)
        return curve(builder, name, x, base, function=lambda u: torch.pow(base, u))
