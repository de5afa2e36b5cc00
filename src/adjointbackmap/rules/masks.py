"""Comparisons of data: masks that are constant on a piece, and what chooses by them."""

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import Builder, Constant, Gates, Mask, Rule, Value, rule_for
from adjointbackmap.rules.linear import Add, Masked, aligned, broadcast

Part = tuple[Callable[..., Tensor], tuple[Value, ...]]


class MaskRule(Rule):
    """An operation whose result is a mask: no step of its own, its test runs where the mask is used."""

    takes_masks = True

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """A mask has no tangent."""
        raise NotImplementedError


def _part(argument: Any, dims: int) -> Part:
    """How to compute an argument from its data at k; constants are kinks, which k multiplies."""
    if isinstance(argument, Value):
        return (lambda k, x: x), (argument,)
    if isinstance(argument, Mask):
        return argument.test, argument.inputs
    value = argument.tensor.reshape(aligned(argument, dims)) if isinstance(argument, Constant) else argument
    return (lambda k: k * value), ()


def _combined(builder: Builder, op: Callable[..., Any], *arguments: Any) -> Mask:
    """The mask ``op(*arguments)``."""
    parts = [_part(a, len(builder.shape)) for a in arguments]

    def test(k: float, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return op(*(of(k, *(next(given) for _ in inputs)) for of, inputs in parts))

    return Mask(test, tuple(i for _, inputs in parts for i in inputs), builder.shape)


@rule_for("aten.gt.Scalar", "aten.gt.Tensor")
class Greater(MaskRule):
    """``a > b``."""

    compare: ClassVar[Callable[..., Any]] = operator.gt

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Mask:
        """The comparison at ``k``."""
        return _combined(builder, cls.compare, *args[:2])


@rule_for("aten.ge.Scalar", "aten.ge.Tensor")
class GreaterOrEqual(Greater):
    """``a >= b``."""

    compare = operator.ge


@rule_for("aten.lt.Scalar", "aten.lt.Tensor")
class Less(Greater):
    """``a < b``."""

    compare = operator.lt


@rule_for("aten.le.Scalar", "aten.le.Tensor")
class LessOrEqual(Greater):
    """``a <= b``."""

    compare = operator.le


@rule_for("aten.eq.Scalar", "aten.eq.Tensor")
class Equal(Greater):
    """``a == b``."""

    compare = operator.eq


@rule_for("aten.ne.Scalar", "aten.ne.Tensor")
class NotEqual(Greater):
    """``a != b``."""

    compare = operator.ne


@rule_for("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor")
class And(Greater):
    """Both of two masks."""

    compare = torch.logical_and


@rule_for("aten.logical_or.default", "aten.bitwise_or.Tensor", "aten.__or__.Tensor")
class Or(Greater):
    """One of two masks or both."""

    compare = torch.logical_or


@rule_for("aten.logical_xor.default", "aten.bitwise_xor.Tensor", "aten.__xor__.Tensor")
class Either(Greater):
    """One of two masks, not both."""

    compare = torch.logical_xor


@rule_for("aten.logical_not.default", "aten.bitwise_not.default")
class Not(Greater):
    """The opposite of a mask."""

    compare = torch.logical_not


@rule_for("aten.sign.default", "aten.sgn.default")
class Sign(Greater):
    """-1, 0 or 1."""

    compare = torch.sign


@rule_for("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
class Where(Rule):
    """One of two values by a mask: ``mask * a + (1 - mask) * b``; at the mask's edge PyTorch's choice."""

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The masked values' sum; numbers that are not zero are entries of ``b``."""
        condition, first, second = args[:3]
        dims = len(builder.shape)
        if isinstance(condition, Constant):
            kept = condition.tensor.reshape(aligned(condition, dims))
            condition = Mask(lambda k: kept[None], (), tuple(kept.shape))
        opposite = Mask(lambda k, *t: ~condition.test(k, *t), condition.inputs, condition.shape)
        chosen = []
        for mask, value in ((condition, first), (opposite, second)):
            placed = value if isinstance(value, Value) else builder.place(value, aligned(value, dims))
            if placed is not None:
                chosen.append(Masked.product(builder, placed, mask))
        if len(chosen) == 2:
            return builder.apply(Add(), *chosen)
        return broadcast(builder, chosen[0] if chosen else None)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Built of other steps."""
        raise NotImplementedError


@rule_for("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
class MaskedFill(Where):
    """A number where a mask holds."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The number where the mask holds, the value elsewhere."""
        x, mask, value = args
        return super().build(builder, mask, value, x)
