"""Products with constants that are written together with a sum, and sums with weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Aten,
    Builder,
    Constant,
    Gates,
    Operation,
    Refused,
    Value,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.linear import Einsum, Product, aligned, weighted_sum


@rule_for("aten.addmm.default", "aten.baddbmm.default", "aten.addmv.default")
class ProductAndSum(Operation):
    r"""A matrix product with a constant, added to a value or a constant: :math:`\beta y + \alpha A B`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The product, then the sum."""
        added, first, second = args[:3]
        beta = kwargs.get("beta", 1)
        alpha = kwargs.get("alpha", 1)
        product = Product.build(builder, first, second)
        return weighted_sum(builder, [(product, alpha), (added, beta)])


@rule_for("aten.tensordot.default")
class TensorDot(Aten):
    """Sum of products over dimensions of the data and of a constant."""

    def __init__(self, constant: Tensor, dims: Sequence[Sequence[int]], data_first: bool) -> None:
        super().__init__()
        self.constant = constant
        self.dims = dims
        self.data_first = data_first

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If both depend on the image, or the batch is summed.
        """
        first, second, *dims = args[:4]
        data_first = isinstance(first, Value)
        data, constant = (first, second) if data_first else (second, first)
        dims = [
            [d % (len(data.shape) + 1) for d in dims[0 if data_first else 1]],
            dims[1 if data_first else 0],
        ]
        if 0 in dims[0]:
            msg = "it goes over the images of a batch"
            raise Refused(msg)
        return builder.apply(cls(tensor_of(constant, "second factor"), dims, data_first), data)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply and sum."""
        data, constant = self.dims
        if self.data_first:
            return torch.tensordot(tangents[0], self.constant, (data, constant))
        return torch.tensordot(self.constant, tangents[0], (constant, data))


@rule_for("aten.inner.default")
class Inner(Aten):
    """Inner products of the data with the rows of a constant, over the last dimension of both."""

    op = torch.inner

    def __init__(self, constant: Tensor) -> None:
        super().__init__(constant)

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If the constant comes first, so that the batch does not.
        """
        first, second = args
        if not isinstance(first, Value):
            first, second = second, first
            if first is not None and len(tensor_of(second, "first factor").shape) > 1:
                msg = "it moves the batch out of the first dimension: give the data first"
                raise Refused(msg)
        return builder.apply(cls(tensor_of(second, "second factor")), first)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply and sum."""
        return torch.inner(tangents[0], *self.args)


@rule_for("aten.linalg_cross.default")
class Cross(Product):
    """Vector product of the data with a constant."""

    def __init__(self, constant: Tensor, data_first: bool, dim: int = -1) -> None:
        super().__init__(constant, data_first)
        self.dim = dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        first, second = args
        data_first = isinstance(first, Value)
        data, constant = (first, second) if data_first else (second, first)
        factor = tensor_of(constant, "second factor")
        return builder.apply(cls(factor, data_first, kwargs.get("dim", -1)), data)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply; the constant first changes the sign."""
        product = torch.linalg.cross(tangents[0], self.constant, dim=self.dim)
        return product if self.data_first else -product


@rule_for("aten.bilinear.default")
class Bilinear(Operation):
    """A bilinear form of the data and a constant: linear in the data, with its bias as an entry."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step, then the bias.

        Raises:
            Refused: If both of its inputs depend on the image.
        """
        first, second, weight, bias = (*args, None)[:4]
        if isinstance(first, Value) and isinstance(second, Value):
            msg = "both of its inputs depend on the image"
            raise Refused(msg)
        data = first if isinstance(first, Value) else second
        operands = [None if a is data else tensor_of(a, "input") for a in (first, weight, second)]
        product = builder.apply(Einsum("...i,oij,...j->...o", operands), data)
        return product if bias is None else weighted_sum(builder, [(product, 1), (bias, 1)])


@rule_for("aten.lerp.Scalar", "aten.lerp.Tensor")
class Lerp(Operation):
    r"""Linear interpolation between two values at a constant weight: :math:`(1 - w) a + w b`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The weighted sum."""
        start, end, weight = args
        w = _factor(builder, weight, "weight")
        return weighted_sum(builder, [(start, 1 - w), (end, w)])


@rule_for("aten.addcmul.default", "aten.addcdiv.default")
class SumAndProduct(Operation):
    """A value plus the product, or the quotient, of a value with a constant, times a number."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The weighted sum."""
        added, first, second = args
        divides = builder.op == "addcdiv"
        if not divides and isinstance(second, Value):
            first, second = second, first
        factor = _factor(builder, second, "divisor" if divides else "second factor")
        factor = kwargs.get("value", 1) * (1 / factor if divides else factor)
        return weighted_sum(builder, [(added, 1), (first, factor)])


def _factor(builder: Builder, argument: Any, what: str) -> Tensor | float:
    """A constant factor in the shape in which it meets the output beside the batch."""
    tensor = tensor_of(argument, what)
    return (
        tensor.reshape(aligned(argument, len(builder.shape)))
        if isinstance(argument, Constant)
        else tensor
    )


@rule_for("aten.pow.Tensor_Scalar")
class Power(Operation):
    """The first power, which is the value itself, as pooling of order 1 takes it."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The value.

        Raises:
            Refused: If it is another power.
        """
        if args[1] != 1:
            raise Refused
        return args[0]
