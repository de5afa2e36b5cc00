"""Operations that are linear in the image and the biases, whatever the pattern."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Aten,
    Builder,
    Constant,
    Gates,
    Mask,
    Pointwise,
    Refused,
    Rule,
    Shape,
    Signs,
    Value,
    gated,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.field import Field
from adjointbackmap.rules.kinks import Kinks, joined, moved
from adjointbackmap.rules.moving import Expand


class PlacedEntry(Pointwise):
    """An entry of the bias vector, placed in a larger tensor: ``entry[index]``.

    The adjoint sums over all places of an element.

    Args:
        index: Flat index into the entry, for each element of the tensor.
        size: Number of elements of the entry.
    """

    def __init__(self, index: Tensor, size: int) -> None:
        self.index = index
        self.size = size
        in_order = torch.arange(size)
        self.whole = index.numel() == size and torch.equal(index.flatten().cpu(), in_order)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        entry = tangents[0].reshape(len(tangents[0]), -1)
        placed = entry if self.whole else entry[:, self.index.flatten()]
        return placed.reshape(len(entry), *self.index.shape)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        flat = cotangent.reshape(len(cotangent), -1)
        if not self.whole:
            flat = flat.new_zeros(len(flat), self.size).index_add_(1, self.index.flatten(), flat)
        return (flat.reshape(len(flat), *shapes[0]),)


@rule_for("aten.add.Tensor", "aten.add.Scalar")
class Add(Pointwise):
    """Sum of two values, position by position; the smaller one is broadcast.

    Attributes:
        sign: Factor of the second value: -1 for a difference.
    """

    sign: ClassVar[float] = 1.0

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append a sum of both arguments; a constant becomes an entry of ``b``.

        Raises:
            Refused: If one argument would be broadcast over the batch.
        """
        first, second, alpha = (*args, kwargs.get("alpha", 1))[:3]
        left = placed(builder, first)
        right = placed(builder, second)
        factor = cls.sign * alpha
        if right is not None and factor != 1:
            right = builder.apply(Multiply(float(factor)), right, shape=right.shape)
        if left is None or right is None:
            return broadcast(builder, left or right)
        if isinstance(first, Value) and isinstance(second, Value):
            check_dimensions(left.shape, right.shape)
        return builder.apply(Add(), left, right)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0] + tangents[1]

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        # the adjoint of a broadcast is a sum
        return tuple(cotangent.sum_to_size(len(cotangent), *shape) for shape in shapes)


@rule_for("aten.sub.Tensor", "aten.sub.Scalar")
class Subtract(Add):
    """Difference of two values."""

    sign = -1.0


@rule_for("aten.rsub.Scalar", "aten.rsub.Tensor")
class ReverseSubtract(Subtract):
    """Difference with its arguments exchanged, as PyTorch computes ``1 - x``."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        first, second, *factor = args
        return super().build(builder, second, first, *factor, **kwargs)


def broadcast(builder: Builder, value: Value | None) -> Value:
    """A value repeated to the operation's shape.

    Raises:
        Refused: If there is no value.
    """
    if value is None:
        msg = "both of its arguments are constants"
        raise Refused(msg)
    if value.shape == builder.shape:
        return value
    return builder.apply(Expand(value.shape, builder.shape), value)


def placed(builder: Builder, argument: Any) -> Value | None:
    """An argument as a value: a constant becomes an entry of ``b``, ``None`` if it is zero."""
    if isinstance(argument, Value):
        return argument
    return builder.place(argument, aligned(argument, len(builder.shape)))


def check_dimensions(first: Shape, second: Shape) -> None:
    """Check that two values have the same number of dimensions.

    Otherwise PyTorch would broadcast one of them over the batch.

    Raises:
        Refused: If they have not.
    """
    if len(first) != len(second):
        msg = f"its arguments have {len(first)} and {len(second)} dimensions beside the batch"
        raise Refused(msg)


def aligned(constant: Any, dims: int) -> Shape:
    """Shape of a constant, with ones in front, so that it broadcasts to ``dims`` dimensions.

    Neither the shape nor ``dims`` counts the batch.

    Raises:
        Refused: If the constant differs between the images of a batch.
    """
    if not isinstance(constant, Constant):
        return (1,) * dims
    shape = tuple(constant.tensor.shape)
    if len(shape) == dims + 1:
        if shape[0] != 1:
            msg = "its constant differs between the images of a batch"
            raise Refused(msg)
        shape = shape[1:]
    return (*(1,) * (dims - len(shape)), *shape)


def weighted_sum(builder: Builder, terms: Sequence[tuple[Any, Tensor | float | int]]) -> Value:
    """Sum of values and constants, each times a constant factor, in the operation's shape."""
    total = None
    for argument, factor in terms:
        if not isinstance(factor, Tensor) and factor == 0:
            continue
        value = placed(builder, argument)
        if value is None:
            continue
        value = _multiplied(builder, value, factor)
        if total is not None:
            shape = tuple(torch.broadcast_shapes(total.shape, value.shape))
            value = builder.apply(Add(), total, value, shape=shape)
        total = value
    return broadcast(builder, total)


def _multiplied(builder: Builder, value: Value, factor: Tensor | float | int) -> Value:
    """A value times a constant factor."""
    if isinstance(factor, Tensor):
        shape = tuple(torch.broadcast_shapes(value.shape, factor.shape))
        return builder.apply(Multiply(factor), value, shape=shape)
    if factor == 1:
        return value
    return builder.apply(Multiply(float(factor)), value, shape=value.shape)


class Masked(Pointwise):
    """Product of a value with a mask: the mask is the gate.

    An infinite constant becomes zero where the mask is zero, as :func:`torch.where` gives it.
    """

    may_leave_out = True

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    @classmethod
    def product(cls, builder: Builder, value: Value, mask: Mask) -> Value:
        """Append the step ``mask * value``.

        Raises:
            Refused: If they have different numbers of dimensions.
        """
        check_dimensions(value.shape, mask.shape)
        shape = tuple(torch.broadcast_shapes(value.shape, mask.shape))
        return builder.apply(cls(mask), value, *mask.inputs, shape=shape)

    def linear_inputs(self, count: int) -> int:
        return 1

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        mask = self.mask.test(scale, *inputs[1:]).to(inputs[0].dtype)
        return (mask.expand(len(inputs[0]), *mask.shape[1:]),)

    def kinks(self) -> Kinks | None:
        """Where the mask changes; its inputs come after the value."""
        return moved(self.mask.kinks, 1)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return gated(gates[0], tangents[0])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        of_value = gated(gates[0], cotangent).sum_to_size(len(cotangent), *shapes[0])
        of_mask = [None] * (len(shapes) - 1)
        return (of_value, *of_mask)

    def field(self, *fields: Field) -> Field:
        # the mask's inputs are read by the gate alone and have no tangent
        return fields[0]

    def infinities(self, *inputs: Signs) -> Signs:
        return inputs[0]


@rule_for("aten.mul.Tensor", "aten.mul.Scalar")
class Multiply(Pointwise):
    """Product with a constant factor or with a mask.

    Args:
        factor: A number, or a tensor without the batch that broadcasts.
    """

    takes_masks = True

    def __init__(self, factor: Tensor | float) -> None:
        self.factor = factor

    def positional(self) -> bool:
        # the factor must be the same at every position; its first dimension is the channels
        return not isinstance(self.factor, Tensor) or prod(self.factor.shape[1:]) == 1

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Append one step, on the argument that depends on the image.

        Raises:
            Refused: If both arguments depend on the image and neither is a mask.
        """
        first, second = args[:2]
        data_first = isinstance(first, Value) or isinstance(second, Constant | float | int)
        data, other = (first, second) if data_first else (second, first)
        if isinstance(data, Mask):
            return cls._of_mask(builder, data, other)
        if isinstance(other, Value) and builder.as_factor(other) is None:
            data, other = other, data
        mask = builder.as_factor(other) if isinstance(other, Value | Mask) else None
        if mask is not None:
            return Masked.product(builder, data, mask)
        factor = tensor_of(other, "second factor")
        if not isinstance(factor, Tensor):
            return builder.apply(Multiply(cls.prepared(float(factor))), data)
        if not factor.is_floating_point():
            # the inverse of an integer would have PyTorch's default dtype
            factor = factor.to(builder.dtype)
        factor = factor.reshape(aligned(other, len(builder.shape)))
        return builder.apply(Multiply(cls.prepared(factor)), data)

    @classmethod
    def _of_mask(cls, builder: Builder, mask: Mask, other: Any) -> Value | Mask:
        """A mask times another mask, or times a constant, which becomes an entry of ``b``.

        Raises:
            Refused: If the constant is zero.
        """
        if isinstance(other, Mask):
            count = len(mask.inputs)

            def both(k: float, *inputs: Tensor) -> Tensor:
                return mask.test(k, *inputs[:count]) * other.test(k, *inputs[count:])

            shape = torch.broadcast_shapes(mask.shape, other.shape)
            kinks = joined([(mask.kinks, count), (other.kinks, len(other.inputs))])
            return Mask(both, (*mask.inputs, *other.inputs), shape, kinks)
        constant = builder.place(other, aligned(other, len(mask.shape)))
        if constant is None:
            msg = "it multiplies a mask with zero"
            raise Refused(msg)
        return Masked.product(builder, constant, mask)

    @staticmethod
    def prepared(factor: Tensor | float) -> Tensor | float:
        """The factor of the data, from the constant argument."""
        return factor

    def infinities(self, *inputs: Signs) -> Signs:
        if isinstance(self.factor, Tensor):
            factors = self.factor.sign().unique().tolist()
        else:
            factors = [self.factor]
        return frozenset(
            sign if factor > 0 else -sign for sign in inputs[0] for factor in factors if factor
        )

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0] * self.factor

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        # summed where the factor's shape made the data wider
        return ((cotangent * self.factor).sum_to_size(len(cotangent), *shapes[0]),)


@rule_for("aten.div.Tensor", "aten.div.Scalar")
class Divide(Multiply):
    """Quotient by a constant, or by a mask that never changes, such as the number of words."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Append one step.

        Raises:
            Refused: If the divisor depends on the image.
        """
        x, divisor = args[:2]
        if isinstance(x, Mask):
            x = builder.as_numbers(x)
        if isinstance(divisor, Mask) and divisor.kinks == ():
            inverse = replace(divisor, test=lambda k, *t: 1 / divisor.test(k, *t))
            return Masked.product(builder, x, inverse)
        if isinstance(divisor, Mask):
            divisor = builder.as_numbers(divisor)
        tensor_of(divisor, "divisor")
        return super().build(builder, x, divisor, *args[2:], **kwargs)

    @staticmethod
    def prepared(factor: Tensor | float) -> Tensor | float:
        return 1 / factor


@rule_for("aten.neg.default")
class Negate(Pointwise):
    """Change of sign."""

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return -tangents[0]

    def infinities(self, *inputs: Signs) -> Signs:
        return frozenset(-sign for sign in inputs[0])


@rule_for("aten._native_batch_norm_legit_no_training.default")
class BatchNorm(Rule):
    r"""Batch norm in eval mode, [Wan2022, eq. 3.5].

    :math:`y = s\,c + b'` with :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and
    :math:`b' = \beta - s\,\mu`, one entry of the bias vector per channel.
    """

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, gamma, beta, mean, variance, _, eps = args
        scale = torch.rsqrt(tensor_of(variance, "variance") + eps)
        if gamma is not None:
            scale = tensor_of(gamma, "weight") * scale
        offset = -scale * tensor_of(mean, "mean")
        if beta is not None:
            offset = tensor_of(beta, "bias") + offset
        shape = (len(scale), *(1,) * (len(x.shape) - 1))
        scaled = builder.apply(Multiply(scale.reshape(shape)), x)
        name = builder.path or "batch_norm"
        entry = builder.offset(name, offset, shape, beta.source if beta is not None else None)
        return builder.apply(Add(), scaled, entry)


@rule_for("aten.instance_norm.default")
class InstanceNorm(BatchNorm):
    """Instance norm with running statistics in eval mode, which is batch norm."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append the steps of batch norm.

        Raises:
            Refused: If it divides by statistics of the image.
        """
        x, gamma, beta, mean, variance, of_image, momentum, eps, _ = args
        if of_image:
            msg = "its statistics depend on the image"
            raise Refused(msg)
        return super().build(builder, x, gamma, beta, mean, variance, momentum, eps)


@rule_for("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default")
class Product(Aten):
    """Matrix product of the data with a constant."""

    op = torch.ops.aten.matmul.default

    def __init__(self, constant: Tensor, data_first: bool) -> None:
        super().__init__()
        self.constant = constant
        self.data_first = data_first

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        first, second = args
        data_first = isinstance(first, Value)
        data, constant = (first, second) if data_first else (second, first)
        return builder.apply(cls(tensor_of(constant, "second factor"), data_first), data)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0] @ self.constant if self.data_first else self.constant @ tangents[0]


@rule_for("aten.einsum.default")
class Einsum(Aten):
    """Sum of products of the data with constants, in Einstein's notation."""

    op = torch.einsum

    def __init__(self, equation: str, operands: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.equation = equation
        self.operands = list(operands)

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If several operands depend on the image.
        """
        equation, operands = args[:2]
        data = [i for i, o in enumerate(operands) if isinstance(o, Value)]
        if len(data) > 1:
            msg = "several of its operands depend on the image"
            raise Refused(msg)
        # None holds the place of the data
        constants = [None if i in data else tensor_of(o, "operand") for i, o in enumerate(operands)]
        return builder.apply(cls(equation, constants), operands[data[0]])

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        operands = [tangents[0] if o is None else o for o in self.operands]
        return torch.einsum(self.equation, *operands)
