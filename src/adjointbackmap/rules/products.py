"""Products with constants, combined with sums: ``addmm``, ``lerp``, ``bilinear`` and others."""

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
    keep_batch,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.linear import Einsum, Product, aligned, weighted_sum


@rule_for("aten.addmm.default", "aten.baddbmm.default", "aten.addmv.default")
class ProductAndSum(Operation):
    r"""A matrix product with a constant, plus a value or constant: :math:`\beta y + \alpha A B`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        added, first, second = args[:3]
        beta = kwargs.get("beta", 1)
        alpha = kwargs.get("alpha", 1)
        product = Product.build(builder, first, second)
        return weighted_sum(builder, [(product, alpha), (added, beta)])


@rule_for("aten.tensordot.default")
class TensorDot(Aten):
    """Sum of products over dimensions of the data and of a constant.

    Args:
        constant: The constant factor.
        dims: The summed dimensions of the data, and those of the constant.
        data_first: Whether the data are the first factor.
    """

    def __init__(self, constant: Tensor, dims: Sequence[Sequence[int]], data_first: bool) -> None:
        super().__init__()
        self.constant = constant
        self.dims = dims
        self.data_first = data_first

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If both factors depend on the image, or the batch is summed.
        """
        first, second, of_first, of_second = args[:4]
        data_first = isinstance(first, Value)
        data, constant = (first, second) if data_first else (second, first)
        summed, of_constant = (of_first, of_second) if data_first else (of_second, of_first)
        dims = [keep_batch(summed, data), of_constant]
        return builder.apply(cls(tensor_of(constant, "second factor"), dims, data_first), data)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
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
        """Append one step.

        Raises:
            Refused: If the constant comes first and has rows, so that the batch comes second.
        """
        first, second = args
        if not isinstance(first, Value):
            first, second = second, first
            if first is not None and len(tensor_of(second, "first factor").shape) > 1:
                msg = "it moves the batch out of the first dimension: give the data first"
                raise Refused(msg)
        return builder.apply(cls(tensor_of(second, "second factor")), first)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return torch.inner(tangents[0], *self.args)


@rule_for("aten.linalg_cross.default")
class Cross(Product):
    """Vector product of the data with a constant."""

    def __init__(self, constant: Tensor, data_first: bool, dim: int = -1) -> None:
        super().__init__(constant, data_first)
        self.dim = dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        first, second = args
        data_first = isinstance(first, Value)
        data, constant = (first, second) if data_first else (second, first)
        factor = tensor_of(constant, "second factor")
        return builder.apply(cls(factor, data_first, kwargs.get("dim", -1)), data)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        # the product changes its sign if the factors are exchanged
        product = torch.linalg.cross(tangents[0], self.constant, dim=self.dim)
        return product if self.data_first else -product


@rule_for("aten.bilinear.default")
class Bilinear(Operation):
    """A bilinear form of the data and a constant, which is linear in the data."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step, and one that adds the bias.

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
    r"""Linear interpolation between two values with a constant weight: :math:`(1 - w) a + w b`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        start, end, weight = args
        w = _factor(builder, weight, "weight")
        return weighted_sum(builder, [(start, 1 - w), (end, w)])


@rule_for("aten.addcmul.default", "aten.addcdiv.default")
class SumAndProduct(Operation):
    r"""A value plus a multiple of a product or quotient with a constant: :math:`a + v b / w`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        added, first, second = args
        divides = builder.op == "addcdiv"
        if not divides and isinstance(second, Value):
            first, second = second, first
        factor = _factor(builder, second, "divisor" if divides else "second factor")
        factor = kwargs.get("value", 1) * (1 / factor if divides else factor)
        return weighted_sum(builder, [(added, 1), (first, factor)])


def _factor(builder: Builder, argument: Any, what: str) -> Tensor | float:
    """A constant factor, in a shape that broadcasts to the output without the batch."""
    factor = tensor_of(argument, what)
    if isinstance(argument, Constant):
        return factor.reshape(aligned(argument, len(builder.shape)))
    return factor


@rule_for("aten.pow.Tensor_Scalar")
class Power(Operation):
    """The first power, which is the value itself; ``LPPool`` of order 1 takes it."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Return the value.

        Raises:
            Refused: If it is another power.
        """
        if args[1] != 1:
            raise Refused
        return args[0]
