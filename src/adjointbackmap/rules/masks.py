"""Comparisons of data: masks that are constant on a piece, and what chooses by them."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import Builder, Constant, Mask, Operation, Value, rule_for
from adjointbackmap.rules.linear import Add, Masked, aligned, broadcast

Part = tuple[Callable[..., Tensor], tuple[Value, ...]]


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


COMPARISONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), torch.logical_and),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), torch.logical_or),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), torch.logical_xor),
    **dict.fromkeys(("logical_not", "bitwise_not"), torch.logical_not),
    **dict.fromkeys(("sign", "sgn"), torch.sign),
}
"""Name of an operation -> the mask that it gives."""


@rule_for(*(f"aten.{name}.{kind}" for name in COMPARISONS for kind in ("default", "Scalar", "Tensor")))
class Comparison(Operation):
    """An operation whose result is a mask: no step of its own, its test runs where the mask is used."""

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Mask:
        """The comparison at ``k``."""
        return _combined(builder, COMPARISONS[builder.op], *args[:2])


@rule_for("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
class Where(Operation):
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


@rule_for("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
class MaskedFill(Where):
    """A number where a mask holds."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The number where the mask holds, the value elsewhere."""
        x, mask, value = args
        return super().build(builder, mask, value, x)
