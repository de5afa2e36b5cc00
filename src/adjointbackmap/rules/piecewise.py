"""Operations that are linear only on pieces: which piece is in the gates, jumps of the line are entries of b."""

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
from adjointbackmap.rules.linear import aligned


class Gate(Pointwise):
    """A piecewise-linear function of one number, zero at zero: the gate is its slope, PyTorch's derivative."""

    @abstractmethod
    def slope(self, c: Tensor, scale: float) -> Tensor:
        """Slope at ``c``, where kinks lie at ``scale`` times their place."""

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """The slopes."""
        return (self.slope(inputs[0], scale),)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply by the slopes."""
        return gated(gates[0], tangents[0])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """The map is its own adjoint."""
        return (gated(gates[0], cotangent),)


@rule_for("aten.relu.default")
class ReLU(Gate):
    """Slope 1 above zero, 0 at zero and below."""

    def slope(self, c: Tensor, scale: float) -> Tensor:
        """1 where ``c > 0``."""
        return (c > 0).to(c.dtype)

    def infinities(self, *inputs: Signs) -> Signs:
        """Minus infinity becomes zero."""
        return inputs[0] - {-1}


@rule_for("aten.leaky_relu.default")
class LeakyReLU(Gate):
    """Slope 1 above zero, ``negative_slope`` at zero and below [Wan2022, eq. 3.14]."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def slope(self, c: Tensor, scale: float) -> Tensor:
        """1 where ``c > 0``, else the negative slope."""
        return torch.where(c > 0, c.new_ones(()), c.new_tensor(self.negative_slope))


@rule_for("aten.prelu.default", "aten._prelu_kernel.default")
class PReLU(Gate):
    """Slope 1 above zero, a parameter of the network at zero and below, one for all channels or one each."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        x, weight = args
        slopes = tensor_of(weight, "slope").flatten()
        return builder.apply(
            cls(slopes.view(-1, *(1,) * (len(x.shape) - 1)) if len(slopes) > 1 else slopes), x
        )

    def slope(self, c: Tensor, scale: float) -> Tensor:
        """1 where ``c > 0``, else the parameter."""
        return torch.where(c > 0, c.new_ones(()), self.weight)


@rule_for("aten.rrelu.default")
class RReLU(LeakyReLU):
    """In eval mode the leaky ReLU whose slope is the middle of its bounds."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If it draws its slopes.
        """
        x, low, high, training = filled(args, 1, 1 / 8, 1 / 3, False)[:4]
        if training:
            msg = "it draws slopes at random: pass training=self.training to the functional form"
            raise Refused(msg)
        return builder.apply(cls((low + high) / 2), x)


@rule_for("aten.rrelu_with_noise_functional.default")
class RReLUInPlace(RReLU):
    """The same in place: the noise that it would draw in train mode is left out."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Value]:  # type: ignore[override]
        """The value, the first of two outputs."""
        return [super().build(builder, args[0], *args[2:])]


@rule_for("aten.abs.default")
class Absolute(Gate):
    """Slope -1 below zero, 0 at zero, 1 above."""

    def slope(self, c: Tensor, scale: float) -> Tensor:
        """The sign."""
        return c.sign()

    def infinities(self, *inputs: Signs) -> Signs:
        """Plus infinity, from either."""
        return frozenset({1}) if inputs[0] else inputs[0]


@rule_for("aten.hardshrink.default")
class HardShrink(Gate):
    """Zero between ``-threshold`` and ``threshold``, the identity outside."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def slope(self, c: Tensor, scale: float) -> Tensor:
        """1 outside."""
        return (c.abs() > scale * self.threshold).to(c.dtype)


class PiecewiseAffine(Pointwise):
    """A function of one number, linear on pieces with jumps: ``slope * c + coefficients * entries``.

    The gates are the slope and a coefficient for each entry of ``b``; entries of zero are left out.
    """

    @abstractmethod
    def entries(self) -> list[tuple[str, float]]:
        """The constants by name, none of them zero."""

    @abstractmethod
    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Slope at ``c``, and the coefficient of each constant."""

    def put(self, builder: Builder, x: Value) -> Value:
        """One step, with an entry for each constant."""
        return builder.apply(
            self, x, *(builder.number(name, value) for name, value in self.entries())
        )

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """The slope, then the coefficients."""
        slope, coefficients = self.pieces(inputs[0], scale)
        return tuple(
            g.to(inputs[0].dtype)
            for g in (slope, *(coefficients[name] for name, _ in self.entries()))
        )

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``slope * c + coefficients * entries``."""
        total = gated(gates[0], tangents[0])
        for gate, constant in zip(gates[1:], tangents[1:], strict=True):
            total = total + gated(gate, constant)
        return total

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """The same gates; summed over positions for the constants."""
        return tuple(
            gated(g, cotangent).sum_to_size(len(cotangent), *shape)
            for g, shape in zip(gates, shapes, strict=True)
        )


@rule_for(
    "aten.clamp.default", "aten.clip.default", "aten.clamp_min.default", "aten.clamp_max.default"
)
class Clamp(PiecewiseAffine):
    """Identity between two bounds, constant outside: the bound is an entry of ``b`` with coefficient 1.

    The bounds themselves belong to the identity, as in PyTorch's derivative of ``clamp``.
    """

    def __init__(self, low: float | None, high: float | None) -> None:
        self.low = low
        self.high = high

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The data, then an entry for each bound that is neither zero nor infinite.

        Raises:
            Refused: If its lower bound is plus infinity, or its upper one minus infinity.
        """
        x, low, high = (*args, None, None)[:3]
        low = kwargs.get("min", low)
        high = kwargs.get("max", high)
        if builder.op == "clamp_max":
            low, high = None, low
        low, high = (v if v is None else float(v) for v in (low, high))
        if low == torch.inf or high == -torch.inf:
            msg = "nothing is between its bounds: leave an infinite bound out"
            raise Refused(msg)
        return cls(None if low == -torch.inf else low, None if high == torch.inf else high).put(
            builder, x
        )

    def entries(self) -> list[tuple[str, float]]:
        """The bounds that are not exactly zero."""
        return [(name, value) for name, value in (("min", self.low), ("max", self.high)) if value]

    def infinities(self, *inputs: Signs) -> Signs:
        """Those on a side without a bound."""
        bounded = {sign for sign, bound in ((-1, self.low), (1, self.high)) if bound is not None}
        return inputs[0] - bounded

    def inside(self, c: Tensor, low: float, high: float) -> Tensor:
        """Where the slope is 1."""
        return (c >= low) & (c <= high)

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Where the slope is 1, and where each bound holds."""
        low = -torch.inf if self.low is None else scale * self.low
        high = torch.inf if self.high is None else scale * self.high
        inside = self.inside(c, low, high)
        return inside, {"min": ~inside & (c <= low), "max": ~inside & (c >= high)}


@rule_for("aten.hardtanh.default")
class Hardtanh(Clamp):
    """A clamp whose bounds belong to the constant pieces, as in PyTorch's derivative of ``hardtanh``."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Bounds of -1 and 1 unless given."""
        x, low, high = filled(args, 1, -1.0, 1.0)
        return super().build(builder, x, kwargs.get("min_val", low), kwargs.get("max_val", high))

    def inside(self, c: Tensor, low: float, high: float) -> Tensor:
        """Where the slope is 1."""
        return (c > low) & (c < high)


@rule_for("aten.relu6.default")
class ReLU6(Hardtanh):
    """``min(max(c, 0), 6)``: one entry of value 6 per call."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Bounds of 0 and 6."""
        return super().build(builder, args[0], 0.0, 6.0)


@rule_for("aten.threshold.default")
class Threshold(PiecewiseAffine):
    """The identity above a threshold, a number at it and below."""

    def __init__(self, threshold: float, value: float) -> None:
        self.threshold = threshold
        self.value = value

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        return cls(*map(float, args[1:3])).put(builder, args[0])

    def entries(self) -> list[tuple[str, float]]:
        """The number, unless it is zero."""
        return [("value", self.value)] if self.value else []

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Where the slope is 1, and where the number holds."""
        above = c > scale * self.threshold
        return above, {"value": ~above}

    def infinities(self, *inputs: Signs) -> Signs:
        """Minus infinity becomes the number, unless that is infinite."""
        return frozenset().union(inputs[0] - {-1}, *inputs[1:])


@rule_for("aten.hardsigmoid.default")
class HardSigmoid(PiecewiseAffine):
    """``c / 6 + 1 / 2`` between -3 and 3, 0 below and 1 above: entries of 0.5 and 1."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        return cls().put(builder, args[0])

    def entries(self) -> list[tuple[str, float]]:
        """The middle and the top."""
        return [("middle", 0.5), ("top", 1.0)]

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """1/6 inside, with the middle; the top above."""
        inside = (c > -3 * scale) & (c < 3 * scale)
        return inside.to(c.dtype) / 6, {"middle": inside, "top": c >= 3 * scale}

    def infinities(self, *inputs: Signs) -> Signs:
        """None."""
        return frozenset()


@rule_for("aten.softshrink.default")
class SoftShrink(PiecewiseAffine):
    """``c - threshold`` above it, ``c + threshold`` below minus it, zero between: coefficients -1, 1 and 0."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        return cls(*map(float, args[1:2])).put(builder, args[0])

    def entries(self) -> list[tuple[str, float]]:
        """The threshold, unless it is zero."""
        return [("lambda", self.threshold)] if self.threshold else []

    def pieces(self, c: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """1 outside, with minus the sign as coefficient."""
        outside = c.abs() > scale * self.threshold
        return outside, {"lambda": -c.sign() * outside}


@rule_for("aten.maximum.default", "aten.max.other")
class Maximum(Pointwise):
    """The larger of two values: at a tie PyTorch's derivative gives half to each.

    Without a second value the other is zero.
    """

    sign: ClassVar[float] = 1.0

    def __init__(self, tie: float = 0.5) -> None:
        self.tie = tie

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step; a constant is an entry of ``b``."""
        return cls().put(builder, *args[:2])

    def put(self, builder: Builder, *values: Any) -> Value:
        """One step on two values, the data first.

        Raises:
            Refused: If both are data with different numbers of dimensions.
        """
        data = [v for v in values if isinstance(v, Value)]
        others = [v for v in values if not isinstance(v, Value)]
        if len({len(v.shape) for v in data}) > 1:
            msg = f"its arguments have {len(data[0].shape)} and {len(data[1].shape)} dimensions beside the batch"
            raise Refused(msg)
        placed = [builder.place(v, aligned(v, len(builder.shape))) for v in others]
        return builder.apply(self, *data, *(p for p in placed if p is not None))

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """The share of the first value."""
        other = inputs[1] if len(inputs) > 1 else torch.zeros_like(inputs[0])
        gap = self.sign * (inputs[0] - other)
        return (torch.where(gap == 0, gap.new_tensor(self.tie), (gap > 0).to(gap.dtype)),)

    def infinities(self, *inputs: Signs) -> Signs:
        """What loses against something finite is left out: of a maximum, minus infinity unless both may hold it."""
        losing = -int(self.sign)
        both = len(inputs) > 1 and all(losing in signs for signs in inputs)
        return frozenset().union(*inputs) - ({losing} if not both else set())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Each value's share."""
        first = gated(gates[0], tangents[0])
        return first + gated(1 - gates[0], tangents[1]) if len(tangents) > 1 else first

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """Each value's share, summed where it was broadcast."""
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
    """A clamp whose bounds are tensors: the larger of the data and the lower bound, then the smaller; ties are the data's."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """A step for each bound."""
        x, low, high = (*args, None, None)[:3]
        low = kwargs.get("min", low)
        high = kwargs.get("max", high)
        if builder.op == "clamp_max":
            low, high = None, low
        x = x if low is None else Maximum(tie=1.0).put(builder, x, low)
        return x if high is None else Minimum(tie=1.0).put(builder, x, high)
