"""Comparisons of data: masks that are constant on a piece, and what chooses by them."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Constant,
    Mask,
    Operation,
    Value,
    filled,
    keep_batch,
    rule_for,
)
from adjointbackmap.rules.linear import Add, Masked, aligned, broadcast

Part = tuple[Callable[..., Any], tuple[Value, ...]]


def _part(argument: Any, builder: Builder, scales: bool) -> Part:
    """How to compute an argument at k, which has multiplied data already.

    Constants and masks do not scale by themselves. Where they meet data (``scales``), k multiplies them too.
    """
    if isinstance(argument, Value):
        return (lambda k, x: x), (argument,)
    if isinstance(argument, Mask):
        test = argument.test
        return (
            lambda k, *t: k * test(k, *t).to(builder.dtype) if scales else test(k, *t)
        ), argument.inputs
    value = argument
    if isinstance(argument, Constant):
        value = argument.tensor.reshape(1, *aligned(argument, len(builder.shape)))
        value = value.to(builder.dtype) if scales else value
    return (lambda k: k * value if scales else value), ()


def _combined(builder: Builder, op: Callable[..., Any], *arguments: Any) -> Mask:
    """The mask ``op(*arguments)``."""
    scales = any(isinstance(a, Value) for a in arguments)
    parts = [_part(a, builder, scales) for a in arguments]

    def test(k: float, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return op(*(of(k, *(next(given) for _ in inputs)) for of, inputs in parts))

    return Mask(test, tuple(i for _, inputs in parts for i in inputs), builder.shape)


def _bitwise(op: Callable[..., Any], logical: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on bits, which of data that is made of masks asks for non-zeros alone."""

    def combined(*arguments: Any) -> Any:
        floating = any(isinstance(a, Tensor) and a.is_floating_point() for a in arguments)
        return (logical if floating else op)(*arguments)

    return combined


COMPARISONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{
        f"logical_{name}": getattr(torch, f"logical_{name}") for name in ("and", "or", "xor", "not")
    },
    **dict.fromkeys(("bitwise_and", "__and__"), _bitwise(operator.and_, torch.logical_and)),
    **dict.fromkeys(("bitwise_or", "__or__"), _bitwise(operator.or_, torch.logical_or)),
    **dict.fromkeys(("bitwise_xor", "__xor__"), _bitwise(operator.xor, torch.logical_xor)),
    "bitwise_not": _bitwise(operator.invert, torch.logical_not),
    **dict.fromkeys(("sign", "sgn"), torch.sign),
}
"""Name of an operation -> the mask that it gives."""


@rule_for(
    *(f"aten.{name}.{kind}" for name in COMPARISONS for kind in ("default", "Scalar", "Tensor"))
)
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
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """The masked values' sum; numbers that are not zero are entries of ``b``. Of two masks it is a mask."""
        condition, first, second = args[:3]
        if all(_is_boolean(v) for v in (first, second)) and isinstance(condition, Mask):
            return _combined(builder, torch.where, condition, first, second)
        dims = len(builder.shape)
        condition = _as_mask(condition, len(builder.shape))
        opposite = Mask(lambda k, *t: ~condition.test(k, *t), condition.inputs, condition.shape)
        chosen = []
        for mask, value in ((condition, first), (opposite, second)):
            value = builder.as_numbers(value) if isinstance(value, Mask) else value
            placed = (
                value if isinstance(value, Value) else builder.place(value, aligned(value, dims))
            )
            if placed is not None:
                chosen.append(Masked.product(builder, placed, mask))
        if len(chosen) == 2:
            return builder.apply(Add(), *chosen)
        return broadcast(builder, chosen[0] if chosen else None)


def _is_boolean(value: Any) -> bool:
    """Whether a value is a mask, or a constant that is true or false."""
    truth = isinstance(value, Constant) and value.tensor.dtype == torch.bool
    return truth or isinstance(value, Mask | bool)


def _as_mask(condition: Any, dims: int) -> Mask:
    """A condition as a mask: it may be a constant, or numbers that masks were put together to."""
    if isinstance(condition, Mask):
        return condition
    if isinstance(condition, Value):
        return Mask(lambda k, x: x != 0, (condition,), condition.shape)
    kept = condition.tensor.reshape(aligned(condition, dims))
    return Mask(lambda k: kept[None], (), tuple(kept.shape))


@rule_for("aten.any.dim", "aten.all.dim")
class AnyOrAll(Operation):
    """Whether a mask holds anywhere along a dimension, or everywhere."""

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Mask:
        """The mask."""
        x, dim, keepdim = filled(args, 2, False)
        op = getattr(torch, builder.op)
        (dim,) = keep_batch([dim], x)
        mask = _as_mask(x, len(x.shape))
        return Mask(lambda k, *t: op(mask.test(k, *t), dim, keepdim), mask.inputs, builder.shape)


@rule_for("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
class MaskedFill(Where):
    """A number where a mask holds."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """The number where the mask holds, the value elsewhere."""
        x, mask, value = args
        return super().build(builder, mask, value, x)
