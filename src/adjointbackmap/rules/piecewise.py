"""Operations that are linear only on pieces: which piece is in the gates, jumps of the line are entries of b."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules.base import Builder, Gates, Pointwise, Rule, Shape, Value, gated
from adjointbackmap.rules.field import Field
from adjointbackmap.rules.linear import pair, pooling_field


class Gate(Pointwise):
    """A piecewise-linear function of one number, zero at zero: the gate is its slope, PyTorch's derivative."""

    @abstractmethod
    def slope(self, c: Tensor) -> Tensor:
        """Slope at ``c``."""

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """The slopes."""
        return (self.slope(inputs[0]),)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply by the slopes."""
        return gated(gates[0], tangents[0])

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """The map is its own adjoint."""
        return (gated(gates[0], cotangent),)


class ReLU(Gate):
    """Slope 1 above zero, 0 at zero and below."""

    ops = ("aten.relu.default",)

    def slope(self, c: Tensor) -> Tensor:
        """1 where ``c > 0``."""
        return (c > 0).to(c.dtype)


class LeakyReLU(Gate):
    """Slope 1 above zero, ``negative_slope`` at zero and below [Wan2022, eq. 3.14]."""

    ops = ("aten.leaky_relu.default",)

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def slope(self, c: Tensor) -> Tensor:
        """1 where ``c > 0``, else the negative slope."""
        return torch.where(c > 0, c.new_ones(()), c.new_tensor(self.negative_slope))


class Clamp(Pointwise):
    """Identity between two bounds, constant outside: the bound is an entry of ``b`` with coefficient 1.

    The bounds themselves belong to the identity, as in PyTorch's derivative of ``clamp``.
    """

    ops = ("aten.clamp.default",)

    def __init__(self, low: float | None, high: float | None) -> None:
        self.low, self.high = low, high

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The data, then an entry for each bound that is not zero."""
        x, low, high = (*args, None, None)[:3]
        low, high = (v if v is None else float(v) for v in (kwargs.get("min", low), kwargs.get("max", high)))
        rule = cls(low, high)
        bounds = [builder.number(name, value) for name, value in rule.entries()]
        return builder.apply(rule, x, *bounds)

    def entries(self) -> list[tuple[str, float]]:
        """The bounds that are entries of ``b``: those that are not exactly zero."""
        return [(name, value) for name, value in (("min", self.low), ("max", self.high)) if value]

    def inside(self, c: Tensor, low: float, high: float) -> Tensor:
        """Where the slope is 1."""
        return (c >= low) & (c <= high)

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """Where the slope is 1, then where each bound that is an entry holds."""
        c = inputs[0]
        low = -torch.inf if self.low is None else scale * self.low
        high = torch.inf if self.high is None else scale * self.high
        inside = self.inside(c, low, high)
        where = {"min": ~inside & (c <= low), "max": ~inside & (c >= high)}
        return tuple(g.to(c.dtype) for g in (inside, *(where[name] for name, _ in self.entries())))

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``slope * c + coefficient * bound``."""
        total = gated(gates[0], tangents[0])
        for gate, bound in zip(gates[1:], tangents[1:], strict=True):
            total = total + gated(gate, bound)
        return total

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """The same gates; summed over positions for the bounds."""
        return tuple(gated(g, cotangent).sum_to_size(len(cotangent), *shape) for g, shape in zip(gates, shapes, strict=True))


class Hardtanh(Clamp):
    """A clamp whose bounds belong to the constant pieces, as in PyTorch's derivative of ``hardtanh``."""

    ops = ("aten.hardtanh.default",)

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Bounds of -1 and 1 unless given."""
        x, *bounds = args
        return super().build(builder, x, *(bounds or (-1.0, 1.0)))

    def inside(self, c: Tensor, low: float, high: float) -> Tensor:
        """Where the slope is 1."""
        return (c > low) & (c < high)


class ReLU6(Hardtanh):
    """``min(max(c, 0), 6)``: one entry of value 6 per call."""

    ops = ("aten.relu6.default",)

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Bounds of 0 and 6."""
        return super().build(builder, args[0], 0.0, 6.0)


class MaxPooling(Rule):
    """Maximum over windows: the gates are the winners' places, PyTorch's choice where there is a tie."""

    ops = ("aten.max_pool2d.default",)

    def __init__(
        self,
        size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> None:
        self.size, self.stride, self.padding, self.dilation = (pair(v) for v in (size, stride or size, padding, dilation))
        self.ceil_mode = ceil_mode

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """Flat place of each window's winner, ``(N, C, H * W)``."""
        args = (self.size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return (F.max_pool2d(inputs[0], *args, return_indices=True)[1],)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Take the winners."""
        winners = gates[0]
        t = tangents[0].unflatten(0, (len(winners), -1)).flatten(3)
        places = winners.flatten(2)[:, None].expand(-1, t.shape[1], -1, -1)
        return t.gather(3, places).unflatten(3, winners.shape[2:]).flatten(0, 1)

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """Give the winners their cotangents, summed where one won twice."""
        winners = gates[0]
        g = cotangent.unflatten(0, (len(winners), -1)).flatten(3)
        places = winners.flatten(2)[:, None].expand(-1, g.shape[1], -1, -1)
        channels, *spatial = shapes[0]
        out = g.new_zeros(*g.shape[:2], channels, spatial[0] * spatial[1]).scatter_add_(3, places, g)
        return (out.unflatten(3, spatial).flatten(0, 1),)

    def field(self, *fields: Field) -> Field:
        """The window, as far as dilation spreads it."""
        extent = [d * (k - 1) + 1 for k, d in zip(self.size, self.dilation, strict=True)]
        return pooling_field(fields[0], extent, self.stride, self.padding)
