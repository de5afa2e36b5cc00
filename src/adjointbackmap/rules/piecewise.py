"""Operations on single numbers that are affine on pieces.

The gates say which piece holds. The constants of the pieces are entries of ``b``.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Gates,
    Pointwise,
    Refused,
    Shape,
    Signs,
    Value,
    filled,
    gated,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.kinks import Kinks, Levels
from adjointbackmap.rules.linear import check_dimensions, placed


class Gate(Pointwise):
    """A function of one number whose pieces are lines through zero.

    The gate is the slope. At a kink it is PyTorch's derivative.
    """

    @abstractmethod
    def slope(self, c: Tensor, scale: float) -> Tensor:
        """Slope at ``c``, where a kink at 6 is at ``6 * scale``."""

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        return (self.slope(inputs[0], scale),)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return gated(gates[0], tangents[0])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        # a diagonal matrix is its own transpose
        return (gated(gates[0], cotangent),)


@rule_for("aten.relu.default")
class ReLU(Gate):
    """Slope 1 above zero, 0 at zero and below."""

    def slope(self, c: Tensor, scale: float) -> Tensor:
        return (c > 0).to(c.dtype)

    def kinks(self) -> Kinks:
        """Zero."""
        return (Levels(),)

    def infinities(self, *inputs: Signs) -> Signs:
        # minus infinity becomes zero
        return inputs[0] - {-1}


@rule_for("aten.leaky_relu.default")
class LeakyReLU(Gate):
    """Slope 1 above zero, ``negative_slope`` at zero and below [Wan2022, eq. 3.14]."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def slope(self, c: Tensor, scale: float) -> Tensor:
        return torch.where(c > 0, c.new_ones(()), c.new_tensor(self.negative_slope))

    def kinks(self) -> Kinks:
        """Zero."""
        return (Levels(),)


@rule_for("aten.prelu.default", "aten._prelu_kernel.default")
class PReLU(Gate):
    """Slope 1 above zero; at zero and below, the slope is a parameter.

    There is one parameter for all channels, or one per channel.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, weight = args
        slopes = tensor_of(weight, "slope").flatten()
        if len(slopes) > 1:
            slopes = slopes.view(-1, *(1,) * (len(x.shape) - 1))  # (channels, 1, 1)
        return builder.apply(cls(slopes), x)

    def slope(self, c: Tensor, scale: float) -> Tensor:
        return torch.where(c > 0, c.new_ones(()), self.weight)

    def kinks(self) -> Kinks:
        """Zero."""
        return (Levels(),)


@rule_for("aten.rrelu.default")
class RReLU(LeakyReLU):
    """Randomised leaky ReLU; in eval mode its slope is the mean of its bounds."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it draws its slopes at random.
        """
        # PyTorch's default bounds are 1/8 and 1/3
        x, low, high, training = filled(args, 1, 1 / 8, 1 / 3, False)[:4]
        if training:
            msg = "it draws slopes at random: pass training=self.training to the functional form"
            raise Refused(msg)
        return builder.apply(cls((low + high) / 2), x)


@rule_for("aten.rrelu_with_noise_functional.default")
class RReLUInPlace(RReLU):
    """Randomised leaky ReLU in place.

    Its second argument and its second output are the slopes drawn in train mode, which are unused.
    """

    @classmethod
    def build(  # type: ignore[override]
        cls, builder: Builder, *args: Any, **kwargs: Any
    ) -> list[Value]:
        return [super().build(builder, args[0], *args[2:])]


@rule_for("aten.abs.default")
class Absolute(Gate):
    """Slope -1 below zero, 0 at zero, 1 above."""

    def slope(self, c: Tensor, scale: float) -> Tensor:
        return c.sign()

    def kinks(self) -> Kinks:
        """Zero."""
        return (Levels(),)

    def infinities(self, *inputs: Signs) -> Signs:
        # both infinities become plus infinity
        return frozenset({1}) if inputs[0] else inputs[0]


@rule_for("aten.hardshrink.default")
class HardShrink(Gate):
    """Zero between ``-threshold`` and ``threshold``, the identity outside."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def slope(self, c: Tensor, scale: float) -> Tensor:
        return (c.abs() > scale * self.threshold).to(c.dtype)

    def kinks(self) -> Kinks:
        """Jumps at both thresholds."""
        return (Levels((-self.threshold, self.threshold), jumps=True),)


class PiecewiseAffine(Pointwise):
    """A function of one number with affine pieces: ``slope * c + coefficients * entries``.

    The gates are the slope, and one coefficient for each entry of ``b``.
    """

    @abstractmethod
    def entries(self) -> list[tuple[str, float]]:
        """Names and values of the constants, without those that are zero."""

    @abstractmethod
    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Slope at ``c``, and the coefficient of each constant by its name."""

    def put(self, builder: Builder, x: Value) -> Value:
        """Append one step, with an entry for each constant."""
        constants = [builder.number(name, value) for name, value in self.entries()]
        return builder.apply(self, x, *constants)

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        slope, coefficients = self.pieces(inputs[0], scale)
        gates = (slope, *(coefficients[name] for name, _ in self.entries()))
        return tuple(gate.to(inputs[0].dtype) for gate in gates)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        total = gated(gates[0], tangents[0])
        for gate, constant in zip(gates[1:], tangents[1:], strict=True):
            total = total + gated(gate, constant)
        return total

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        # an entry is one number for all positions, so its cotangent is a sum over them
        return tuple(
            gated(g, cotangent).sum_to_size(len(cotangent), *shape)
            for g, shape in zip(gates, shapes, strict=True)
        )


@rule_for(
    "aten.clamp.default", "aten.clip.default", "aten.clamp_min.default", "aten.clamp_max.default"
)
class Clamp(PiecewiseAffine):
    """Identity between two bounds, constant outside.

    A bound is an entry of ``b`` with coefficient 1. At a bound the slope is 1, as in PyTorch's
    derivative of ``clamp``.
    """

    def __init__(self, low: float | None, high: float | None) -> None:
        self.low = low
        self.high = high

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step, with an entry for each bound that is neither zero nor infinite.

        Raises:
            Refused: If its lower bound is plus infinity, or its upper one minus infinity.
        """
        x = args[0]
        low, high = (v if v is None else float(v) for v in _bounds(builder, *args[1:], **kwargs))
        if low is not None and high is not None and low > high:
            msg = (
                f"its lower bound {low:g} is above its upper one {high:g}, "
                f"so that it gives {high:g} alone: write that"
            )
            raise Refused(msg)
        if low == torch.inf or high == -torch.inf:
            msg = "nothing is between its bounds: leave an infinite bound out"
            raise Refused(msg)
        low = None if low == -torch.inf else low
        high = None if high == torch.inf else high
        return cls(low, high).put(builder, x)

    def entries(self) -> list[tuple[str, float]]:
        bounds = (("min", self.low), ("max", self.high))
        return [(name, value) for name, value in bounds if value]

    def infinities(self, *inputs: Signs) -> Signs:
        # a bound removes the infinity on its side
        bounds = ((-1, self.low), (1, self.high))
        return inputs[0] - {sign for sign, bound in bounds if bound is not None}

    def inside(self, c: Tensor, low: float, high: float) -> Tensor:
        """Where the slope is 1."""
        return (c >= low) & (c <= high)

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        low = -torch.inf if self.low is None else scale * self.low
        high = torch.inf if self.high is None else scale * self.high
        inside = self.inside(c, low, high)
        return inside, {"min": ~inside & (c <= low), "max": ~inside & (c >= high)}

    def kinks(self) -> Kinks:
        """The bounds."""
        return (Levels(tuple(bound for bound in (self.low, self.high) if bound is not None)),)


@rule_for("aten.hardtanh.default")
class Hardtanh(Clamp):
    """A clamp with slope 0 at its bounds, as in PyTorch's derivative of ``hardtanh``."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        # PyTorch's default bounds are -1 and 1
        x, low, high = filled(args, 1, -1.0, 1.0)
        return super().build(builder, x, kwargs.get("min_val", low), kwargs.get("max_val", high))

    def inside(self, c: Tensor, low: float, high: float) -> Tensor:
        return (c > low) & (c < high)


@rule_for("aten.relu6.default")
class ReLU6(Hardtanh):
    """``min(max(c, 0), 6)``, with one entry of value 6 per call."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return super().build(builder, args[0], 0.0, 6.0)


@rule_for("aten.threshold.default")
class Threshold(PiecewiseAffine):
    """The identity above a threshold; at the threshold and below, a number."""

    def __init__(self, threshold: float, value: float) -> None:
        self.threshold = threshold
        self.value = value

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return cls(*map(float, args[1:3])).put(builder, args[0])

    def entries(self) -> list[tuple[str, float]]:
        return [("value", self.value)] if self.value else []

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        above = c > scale * self.threshold
        return above, {"value": ~above}

    def kinks(self) -> Kinks:
        """A jump at the threshold, unless the number equals it."""
        return (Levels((self.threshold,), jumps=self.value != self.threshold),)

    def infinities(self, *inputs: Signs) -> Signs:
        # minus infinity becomes the number, which may be infinite itself
        return frozenset().union(inputs[0] - {-1}, *inputs[1:])


@rule_for("aten.hardsigmoid.default")
class HardSigmoid(PiecewiseAffine):
    """``c / 6 + 1 / 2`` between -3 and 3, 0 below, 1 above; its entries are 0.5 and 1."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return cls().put(builder, args[0])

    def entries(self) -> list[tuple[str, float]]:
        return [("middle", 0.5), ("top", 1.0)]

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        inside = (c > -3 * scale) & (c < 3 * scale)
        return inside.to(c.dtype) / 6, {"middle": inside, "top": c >= 3 * scale}

    def kinks(self) -> Kinks:
        """-3 and 3."""
        return (Levels((-3.0, 3.0)),)

    def infinities(self, *inputs: Signs) -> Signs:
        return frozenset()


@rule_for("aten.softshrink.default")
class SoftShrink(PiecewiseAffine):
    """Shrinkage by a threshold: ``c - sign(c) * threshold`` where ``abs(c) > threshold``, else 0.

    Its entry is the threshold, with coefficient -1 above, 1 below and 0 between.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return cls(*map(float, args[1:2])).put(builder, args[0])

    def entries(self) -> list[tuple[str, float]]:
        return [("lambda", self.threshold)] if self.threshold else []

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        outside = c.abs() > scale * self.threshold
        return outside, {"lambda": -c.sign() * outside}

    def kinks(self) -> Kinks:
        """The threshold, on both sides."""
        return (Levels((-self.threshold, self.threshold)),)


@rule_for("aten.maximum.default", "aten.max.other")
class Maximum(Pointwise):
    """The larger of two values; a second value that is missing is zero.

    At a tie PyTorch's derivative is a half for each value.

    Args:
        tie: Derivative of the first value at a tie.

    Attributes:
        sign: 1 for a maximum, -1 for a minimum.
    """

    sign: ClassVar[float] = 1.0

    def __init__(self, tie: float = 0.5) -> None:
        self.tie = tie

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return cls().put(builder, *args[:2])

    def put(self, builder: Builder, *values: Any) -> Value:
        """Append one step on two values, the data first; a constant becomes an entry of ``b``.

        Raises:
            Refused: If both are data and have different numbers of dimensions.
        """
        data = [v for v in values if isinstance(v, Value)]
        constants = [placed(builder, v) for v in values if not isinstance(v, Value)]
        if len(data) == 2:
            check_dimensions(data[0].shape, data[1].shape)
        return builder.apply(self, *data, *(c for c in constants if c is not None))

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        # the gate is the derivative of the first value; that of the second is the rest to 1
        other = inputs[1] if len(inputs) > 1 else torch.zeros_like(inputs[0])
        gap = self.sign * (inputs[0] - other)
        return (torch.where(gap == 0, gap.new_tensor(self.tie), (gap > 0).to(gap.dtype)),)

    def kinks(self) -> Kinks:
        """Where the difference of the two values is zero."""
        return (Levels(of=(0, 1)),)

    def infinities(self, *inputs: Signs) -> Signs:
        # A maximum loses minus infinity to anything finite. Only if both values may hold it, the
        # output may hold it too.
        losing = -int(self.sign)
        both = len(inputs) > 1 and all(losing in signs for signs in inputs)
        return frozenset().union(*inputs) - ({losing} if not both else set())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        first = gated(gates[0], tangents[0])
        return first + gated(1 - gates[0], tangents[1]) if len(tangents) > 1 else first

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        # the adjoint of a broadcast is a sum
        shares = (gates[0], 1 - gates[0])
        return tuple(
            gated(g, cotangent).sum_to_size(len(cotangent), *s)
            for g, s in zip(shares, shapes, strict=False)
        )


@rule_for("aten.minimum.default", "aten.min.other")
class Minimum(Maximum):
    """The smaller of two values."""

    sign = -1.0


@rule_for("aten.clamp.Tensor", "aten.clip.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
class ClampBetween(Maximum):
    """A clamp whose bounds are tensors.

    It is the maximum with the lower bound, then the minimum with the upper one. At a tie the
    derivative is that of the data.
    """

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x = args[0]
        low, high = _bounds(builder, *args[1:], **kwargs)
        x = x if low is None else Maximum(tie=1.0).put(builder, x, low)
        return x if high is None else Minimum(tie=1.0).put(builder, x, high)


def _bounds(builder: Builder, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Lower and upper bound of a clamp; ``None`` where it has none."""
    low, high = (*args, None, None)[:2]
    low = kwargs.get("min", low)
    high = kwargs.get("max", high)
    if builder.op == "clamp_max":  # its only bound is the upper one
        return None, low
    return low, high
