"""Comparisons of data, which give masks, and the operations that choose with a mask."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from adjointbackmap.rules.kinks import NOT_ZERO, At, Kinks, Levels, joined
from adjointbackmap.rules.linear import Add, Masked, aligned, broadcast, placed

Operand = tuple[Callable[..., Any], tuple[Value, ...]]
"""A function ``(k, *tensors)`` that gives an argument at k, and the values that it reads."""

ORDERINGS = {"gt", "ge", "lt", "le"}
EQUALITIES = {"eq", "ne"}
FINITENESS = ("isinf", "isnan", "isfinite", "isposinf", "isneginf")  # change with masks alone


def _operand(argument: Any, builder: Builder, scales: bool) -> Operand:
    """How to compute an argument at k.

    Data are k times as large already. Constants and masks are not: where they are compared with
    data (``scales``), k must multiply them too.
    """
    if isinstance(argument, Value):
        return (lambda k, x: x), (argument,)
    if isinstance(argument, Mask):
        test = argument.test
        if not scales:
            return test, argument.inputs
        return (lambda k, *t: k * test(k, *t).to(builder.dtype)), argument.inputs
    value = argument
    if isinstance(argument, Constant):
        value = argument.tensor.reshape(1, *aligned(argument, len(builder.shape)))
        value = value.to(builder.dtype) if scales else value
    return (lambda k: k * value if scales else value), ()


def _combined(builder: Builder, op: Callable[..., Any], *arguments: Any) -> Mask:
    """The mask ``op(*arguments)``."""
    scales = any(isinstance(a, Value) for a in arguments)
    parts = [_operand(a, builder, scales) for a in arguments]

    def test(k: float, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return op(*(of(k, *(next(given) for _ in inputs)) for of, inputs in parts))

    given = tuple(i for _, inputs in parts for i in inputs)
    return Mask(test, given, builder.shape, _kinks(builder.op, arguments, parts))


def _kinks(op: str, arguments: Sequence[Any], parts: Sequence[Operand]) -> Kinks | None:
    """Where a mask of some arguments changes: with its masks, and where its data cross.

    Data are compared with what they meet; a logical operation and a sign compare them with zero.
    """
    masks = [
        (argument.kinks if isinstance(argument, Mask) else (), len(inputs))
        for argument, (_, inputs) in zip(arguments, parts, strict=True)
    ]
    kinks = joined(masks)
    data = [n for n, argument in enumerate(arguments) if isinstance(argument, Value)]
    if kinks is None or not data or op in FINITENESS:
        return kinks
    firsts = [sum(count for _, count in masks[:n]) for n in range(len(masks))]
    if op not in ORDERINGS | EQUALITIES:
        isolated = op not in ("sign", "sgn")
        own = [Levels(of=(firsts[n],), jumps=True, isolated=isolated) for n in data]
        return (*kinks, *own)
    isolated = op in EQUALITIES
    if len(data) == 2:
        return (*kinks, Levels(of=(firsts[0], firsts[1]), jumps=True, isolated=isolated))
    (place,) = data
    other = arguments[1 - place]
    if isinstance(other, bool | int | float):
        at: tuple[At, ...] = (float(other),)
        return (*kinks, Levels(at, (firsts[place],), jumps=True, isolated=isolated))
    level, inputs = parts[1 - place]
    those = slice(firsts[1 - place], firsts[1 - place] + len(inputs))
    at = (lambda *given: level(1.0, *given[those]),)
    return (*kinks, Levels(at, (firsts[place],), jumps=True, isolated=isolated))


def _bitwise(op: Callable[..., Any], logical: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on bits, or its logical twin where an argument is a mask held as numbers."""

    def combined(*arguments: Any) -> Any:
        floating = any(isinstance(a, Tensor) and a.is_floating_point() for a in arguments)
        return (logical if floating else op)(*arguments)

    return combined


ORDER = ("gt", "ge", "lt", "le", "eq", "ne")
LOGIC = ("logical_and", "logical_or", "logical_xor", "logical_not")
COMPARISONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ORDER},
    **{name: getattr(torch, name) for name in LOGIC},
    **dict.fromkeys(("bitwise_and", "__and__"), _bitwise(operator.and_, torch.logical_and)),
    **dict.fromkeys(("bitwise_or", "__or__"), _bitwise(operator.or_, torch.logical_or)),
    **dict.fromkeys(("bitwise_xor", "__xor__"), _bitwise(operator.xor, torch.logical_xor)),
    "bitwise_not": _bitwise(operator.invert, torch.logical_not),
    **dict.fromkeys(("sign", "sgn"), torch.sign),
    **{name: getattr(torch, name) for name in FINITENESS},
}
"""Name of an operation -> the function that gives its mask."""


KINDS = ("default", "Scalar", "Tensor")  # a comparison may have any of these overloads


@rule_for(*(f"aten.{name}.{kind}" for name in COMPARISONS for kind in KINDS))
class Comparison(Operation):
    """An operation that gives a mask.

    It appends no step. The comparison is computed in the step that uses the mask.
    """

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Mask:
        return _combined(builder, COMPARISONS[builder.op], *args[:2])


@rule_for("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
class Where(Operation):
    """One of two values, chosen with a mask: ``mask * a + (1 - mask) * b``.

    Where the compared values are equal, the choice is PyTorch's.
    """

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """Append the sum of both masked values; a choice between two masks is a mask.

        Constants that are not zero become entries of ``b``.
        """
        condition, first, second = args[:3]
        if all(_is_boolean(v) for v in (first, second)) and isinstance(condition, Mask):
            return _combined(builder, torch.where, condition, first, second)
        condition = _as_mask(condition, len(builder.shape))
        opposite = replace(condition, test=lambda k, *t: ~condition.test(k, *t))
        chosen = []
        for mask, value in ((condition, first), (opposite, second)):
            value = builder.as_numbers(value) if isinstance(value, Mask) else value
            data = placed(builder, value)
            if data is not None:
                chosen.append(Masked.product(builder, data, mask))
        if len(chosen) == 2:
            return builder.apply(Add(), *chosen)
        return broadcast(builder, chosen[0] if chosen else None)


def _is_boolean(value: Any) -> bool:
    """Whether a value is a mask or a Boolean constant."""
    truth = isinstance(value, Constant) and value.tensor.dtype == torch.bool
    return truth or isinstance(value, Mask | bool)


def _as_mask(condition: Any, dims: int) -> Mask:
    """A condition as a mask.

    It may also be a constant, or a value of zeros and ones that was computed from masks.
    """
    if isinstance(condition, Mask):
        return condition
    if isinstance(condition, Value):
        return Mask(lambda k, x: x != 0, (condition,), condition.shape, (NOT_ZERO,))
    kept = condition.tensor.reshape(aligned(condition, dims))
    return Mask(lambda k: kept[None], (), tuple(kept.shape), ())


@rule_for("aten.any.dim", "aten.all.dim")
class AnyOrAll(Operation):
    """Whether a mask is true anywhere along a dimension, or everywhere."""

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Mask:
        x, dim, keepdim = filled(args, 2, False)
        op = getattr(torch, builder.op)
        (dim,) = keep_batch([dim], x)
        mask = _as_mask(x, len(x.shape))
        return replace(
            mask, test=lambda k, *t: op(mask.test(k, *t), dim, keepdim), shape=builder.shape
        )


@rule_for("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
class MaskedFill(Where):
    """A value with a number wherever a mask is true."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        x, mask, value = args
        return super().build(builder, mask, value, x)
