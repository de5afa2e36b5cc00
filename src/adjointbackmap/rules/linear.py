"""Operations that are linear in the image and the biases, whatever the pattern."""

from collections.abc import Sequence
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
from adjointbackmap.rules.moving import Expand


class Place(Pointwise):
    """Elements of an entry of the bias vector, at their places in a tensor: ``entry[index]``.

    The adjoint sums over the places of each element.
    """

    def __init__(self, index: Tensor, size: int) -> None:
        self.index = index
        self.size = size
        self.whole = index.numel() == size and torch.equal(
            index.flatten().cpu(), torch.arange(size)
        )

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Gather."""
        entry = tangents[0].reshape(len(tangents[0]), -1)
        placed = entry if self.whole else entry[:, self.index.flatten()]
        return placed.reshape(len(entry), *self.index.shape)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """Scatter and add."""
        flat = cotangent.reshape(len(cotangent), -1)
        if not self.whole:
            flat = flat.new_zeros(len(flat), self.size).index_add_(1, self.index.flatten(), flat)
        return (flat.reshape(len(flat), *shapes[0]),)


@rule_for("aten.add.Tensor", "aten.add.Scalar")
class Add(Pointwise):
    """Sum of two values that meet position by position; the smaller is broadcast."""

    sign: ClassVar[float] = 1.0

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The sum of the data arguments, constants as entries of the bias vector.

        Raises:
            Refused: If one argument would be broadcast over the batch.
        """
        first, second, alpha = (*args, kwargs.get("alpha", 1))[:3]
        left, right = (
            a if isinstance(a, Value) else builder.place(a, aligned(a, len(builder.shape)))
            for a in (first, second)
        )
        factor = cls.sign * alpha
        if right is not None and factor != 1:
            right = builder.apply(Scale(float(factor)), right, shape=right.shape)
        if left is None or right is None:
            return broadcast(builder, left or right)
        if (
            isinstance(first, Value)
            and isinstance(second, Value)
            and len(left.shape) != len(right.shape)
        ):
            msg = f"its arguments have {len(left.shape)} and {len(right.shape)} dimensions beside the batch"
            raise Refused(msg)
        return builder.apply(Add(), left, right)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``a + b``."""
        return tangents[0] + tangents[1]

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """The cotangent itself, summed where an argument was broadcast."""
        return tuple(cotangent.sum_to_size(len(cotangent), *shape) for shape in shapes)


@rule_for("aten.sub.Tensor", "aten.sub.Scalar")
class Subtract(Add):
    """Difference of two values."""

    sign = -1.0


@rule_for("aten.rsub.Scalar", "aten.rsub.Tensor")
class ReverseSubtract(Subtract):
    """Difference whose second argument comes first: ``1 - x`` is one."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The subtraction with the arguments exchanged."""
        first, second, *factor = args
        return super().build(builder, second, first, *factor, **kwargs)


def broadcast(builder: Builder, value: Value | None) -> Value:
    """A value repeated to the operation's shape.

    Raises:
        Refused: If there is none.
    """
    if value is None:
        msg = "both of its arguments are constants"
        raise Refused(msg)
    return (
        value
        if value.shape == builder.shape
        else builder.apply(Expand(value.shape, builder.shape), value)
    )


def aligned(constant: Any, dims: int) -> Shape:
    """Shape beside the batch with which a constant meets a value of ``dims`` dimensions beside the batch.

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
    """Sum of values and constants, each times a constant factor, as wide as the operation's output."""
    dims = len(builder.shape)
    total = None
    for argument, factor in terms:
        if not isinstance(factor, Tensor) and factor == 0:
            continue
        value = (
            argument
            if isinstance(argument, Value)
            else builder.place(argument, aligned(argument, dims))
        )
        if value is None:
            continue
        if isinstance(factor, Tensor) or factor != 1:
            shape = (
                value.shape
                if not isinstance(factor, Tensor)
                else torch.broadcast_shapes(value.shape, factor.shape)
            )
            factor = factor if isinstance(factor, Tensor) else float(factor)
            value = builder.apply(Scale(factor), value, shape=tuple(shape))
        if total is not None:
            value = builder.apply(
                Add(), total, value, shape=tuple(torch.broadcast_shapes(total.shape, value.shape))
            )
        total = value
    return broadcast(builder, total)


class Masked(Pointwise):
    """Product of a value with a mask: the gate is the mask, which is constant on the piece.

    An infinite constant that the mask leaves out is zero, as :func:`torch.where` has it.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    @classmethod
    def product(cls, builder: Builder, value: Value, mask: Mask) -> Value:
        """The step for ``mask * value``.

        Raises:
            Refused: If they have different numbers of dimensions.
        """
        if len(value.shape) != len(mask.shape):
            msg = f"its arguments have {len(value.shape)} and {len(mask.shape)} dimensions beside the batch"
            raise Refused(msg)
        shape = tuple(torch.broadcast_shapes(value.shape, mask.shape))
        return builder.apply(cls(mask), value, *mask.inputs, shape=shape)

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """The mask as numbers, for each image."""
        mask = self.mask.test(scale, *inputs[1:]).to(inputs[0].dtype)
        return (mask.expand(len(inputs[0]), *mask.shape[1:]),)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``mask * x``."""
        return gated(gates[0], tangents[0])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """``mask * g``; what the mask was made of gets nothing."""
        return (
            gated(gates[0], cotangent).sum_to_size(len(cotangent), *shapes[0]),
            *[None] * (len(shapes) - 1),
        )

    def field(self, *fields: Field) -> Field:
        """The value's field: what the mask was made of has no tangent."""
        return fields[0]

    def infinities(self, *inputs: Signs) -> Signs:
        """The value's."""
        return inputs[0]


@rule_for("aten.mul.Tensor", "aten.mul.Scalar")
class Scale(Pointwise):
    """Product with a constant factor, a number or a tensor that broadcasts, or with a mask."""

    takes_masks = True

    def __init__(self, factor: Tensor | float) -> None:
        self.factor = factor

    def positional(self) -> bool:
        """Where the factor is the same at every position."""
        return not isinstance(self.factor, Tensor) or prod(self.factor.shape[1:]) == 1

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """The data argument times the constant one.

        Raises:
            Refused: If both depend on the image, on pieces too.
        """
        first, second = args[:2]
        data, other = (
            (first, second)
            if isinstance(first, Value) or isinstance(second, Constant | float | int)
            else (second, first)
        )
        if isinstance(data, Mask):
            return cls._of_mask(builder, data, other)
        if isinstance(other, Mask):
            return Masked.product(builder, data, other)
        factor = tensor_of(other, "second factor")
        if isinstance(factor, Tensor) and not factor.is_floating_point():
            factor = factor.to(
                builder.dtype
            )  # the inverse of an integer would have the default dtype
        factor = (
            factor.reshape(aligned(other, len(builder.shape)))
            if isinstance(factor, Tensor)
            else float(factor)
        )
        return builder.apply(Scale(cls.prepared(factor)), data)

    @classmethod
    def _of_mask(cls, builder: Builder, mask: Mask, other: Any) -> Value | Mask:
        """A mask times another, or times a constant, which is then an entry of ``b``.

        Raises:
            Refused: If the constant is zero.
        """
        if isinstance(other, Mask):
            count = len(mask.inputs)
            both = torch.broadcast_shapes(mask.shape, other.shape)
            return Mask(
                lambda k, *t: mask.test(k, *t[:count]) * other.test(k, *t[count:]),
                (*mask.inputs, *other.inputs),
                both,
            )
        placed = builder.place(other, aligned(other, len(mask.shape)))
        if placed is None:
            msg = "it multiplies a mask with zero"
            raise Refused(msg)
        return Masked.product(builder, placed, mask)

    @staticmethod
    def prepared(factor: Tensor | float) -> Tensor | float:
        """The factor that multiplies the data."""
        return factor

    def infinities(self, *inputs: Signs) -> Signs:
        """Those of the data, with the factor's sign."""
        factors = (
            self.factor.sign().unique().tolist()
            if isinstance(self.factor, Tensor)
            else [self.factor]
        )
        return frozenset(
            sign if factor > 0 else -sign for sign in inputs[0] for factor in factors if factor
        )

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``s x``."""
        return tangents[0] * self.factor

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """``s g``, summed where the data was broadcast."""
        return ((cotangent * self.factor).sum_to_size(len(cotangent), *shapes[0]),)


@rule_for("aten.div.Tensor", "aten.div.Scalar")
class Divide(Scale):
    """Quotient by a constant."""

    takes_masks = False

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """The data argument times the inverse of the constant one."""
        tensor_of(args[1], "divisor")
        return super().build(builder, *args, **kwargs)

    @staticmethod
    def prepared(factor: Tensor | float) -> Tensor | float:
        """The inverse of the divisor."""
        return 1 / factor


@rule_for("aten.neg.default")
class Negate(Pointwise):
    """Change of sign."""

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``-x``."""
        return -tangents[0]

    def infinities(self, *inputs: Signs) -> Signs:
        """The others."""
        return frozenset(-sign for sign in inputs[0])


@rule_for("aten._native_batch_norm_legit_no_training.default")
class BatchNorm(Rule):
    r"""Batch norm in eval mode, [Wan2022, eq. 3.5].

    :math:`y = s\,c + b'` with :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and
    :math:`b' = \beta - s\,\mu`, one entry of the bias vector per channel.
    """

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Scale by s, then add b'."""
        x, gamma, beta, mean, variance, _, eps = args
        scale = torch.rsqrt(tensor_of(variance, "variance") + eps)
        if gamma is not None:
            scale = tensor_of(gamma, "weight") * scale
        offset = -scale * tensor_of(mean, "mean")
        if beta is not None:
            offset = tensor_of(beta, "bias") + offset
        shape = (len(scale), *(1,) * (len(x.shape) - 1))
        scaled = builder.apply(Scale(scale.reshape(shape)), x)
        name = builder.path or "batch_norm"
        placed = builder.offset(name, offset, shape, beta.source if beta is not None else None)
        return builder.apply(Add(), scaled, placed)


@rule_for("aten.instance_norm.default")
class InstanceNorm(BatchNorm):
    """Instance norm with running statistics in eval mode, which is batch norm."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Scale by s, then add b'.

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
        """One step."""
        first, second = args
        data_first = isinstance(first, Value)
        data, constant = (first, second) if data_first else (second, first)
        return builder.apply(cls(tensor_of(constant, "second factor"), data_first), data)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply."""
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
        """One step.

        Raises:
            Refused: If several operands depend on the image.
        """
        equation, operands = args[:2]
        data = [i for i, o in enumerate(operands) if isinstance(o, Value)]
        if len(data) > 1:
            msg = "several of its operands depend on the image"
            raise Refused(msg)
        constants = [None if i in data else tensor_of(o, "operand") for i, o in enumerate(operands)]
        return builder.apply(cls(equation, constants), operands[data[0]])

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply and sum."""
        return torch.einsum(
            self.equation, *(tangents[0] if o is None else o for o in self.operands)
        )
