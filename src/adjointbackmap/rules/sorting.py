"""Operations that choose elements by their order: sort, top k, median, quantile.

The gates are the places of the chosen elements.
"""

from abc import abstractmethod
from collections.abc import Callable
from math import ceil, floor
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Gates,
    Mask,
    Operation,
    Refused,
    Value,
    by_name,
    keep_batch,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.kinks import Kinks, Order, along, every_rank, jumping
from adjointbackmap.rules.linear import weighted_sum
from adjointbackmap.rules.pooling import Largest, Smallest, Taken, over_channels


class Chosen(Taken):
    """An operation with two outputs: elements along a dimension, and their places.

    The places are the gates, and a mask for other operations. At a tie the choice is PyTorch's.
    """

    op: ClassVar[Any]
    may_leave_out = True

    def __init__(self, **options: Any) -> None:
        super().__init__(options["dim"], options.get("keepdim", True))
        self.options = options

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Value | Mask]:
        options = by_name(cls.op, args, kwargs)
        x = options.pop("self")
        (options["dim"],) = keep_batch([options["dim"]], x)
        rule = cls(**options)
        places = Mask(
            lambda k, c: rule.op(c, **rule.options)[1],
            (x,),
            builder.shapes[1],
            jumping(rule.kinks()),
        )
        return [builder.apply(rule, x, shape=builder.shapes[0]), places]

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        places = self.op(inputs[0], **self.options)[1]
        # forward gathers, for which the places must keep the dimension
        return (places if self.keepdim else places.unsqueeze(self.dim),)

    def positional(self) -> bool:
        return over_channels([self.dim], self.keepdim)


@rule_for("aten.sort.default")
class Sort(Chosen):
    """Elements in order: a permutation on each piece. GroupSort and MaxMin use it."""

    op = torch.ops.aten.sort.default

    def kinks(self) -> Kinks:
        """Where two elements change their order."""
        return (Order(along(self.dim), every_rank),)


@rule_for("aten.sort.stable")
class StableSort(Sort):
    """A sort that keeps the order of equal elements."""

    op = torch.ops.aten.sort.stable


@rule_for("aten.topk.default")
class TopK(Chosen):
    """The largest or smallest elements."""

    op = torch.ops.aten.topk.default

    def kinks(self) -> Kinks:
        """Where the elements that are taken, or their order, change."""
        last = self.options["k"] - 1
        return (Order(along(self.dim), lambda count: (0, last), self.options["largest"]),)


class OrderStatistic(Chosen):
    """One element, given by its rank."""

    @abstractmethod
    def rank(self, count: int) -> int:
        """Rank of the element among ``count``, 0 for the smallest."""

    def kinks(self) -> Kinks:
        """Where the element of this rank changes."""
        return (Order(along(self.dim), lambda count: (self.rank(count),) * 2, largest=False),)


@rule_for("aten.kthvalue.default")
class KthValue(OrderStatistic):
    """The k-th smallest element."""

    op = torch.ops.aten.kthvalue.default

    def rank(self, count: int) -> int:
        """The given one, which counts from 1."""
        return int(self.options["k"]) - 1


@rule_for("aten.median.dim")
class Median(OrderStatistic):
    """The middle element; of two, the lower."""

    op = torch.ops.aten.median.dim

    def rank(self, count: int) -> int:
        """The middle, the lower of two."""
        return (count - 1) // 2


@rule_for("aten.nanmedian.dim")
class NanMedian(Median):
    """The median of the elements that are numbers, which all elements of a map are."""

    op = torch.ops.aten.nanmedian.dim


@rule_for("aten.cummax.default")
class RunningMaximum(Chosen):
    """The largest element up to each place."""

    op = torch.ops.aten.cummax.default

    def kinks(self) -> Kinks:
        """Where the winner up to an element changes."""
        largest = self.op is torch.ops.aten.cummax.default
        return (Order(along(self.dim), largest=largest, running=True),)


@rule_for("aten.cummin.default")
class RunningMinimum(RunningMaximum):
    """The smallest element up to each place."""

    op = torch.ops.aten.cummin.default


@rule_for("aten.argmax.default")
class PlaceOfLargest(Operation):
    """Place of the largest element along a dimension; it is constant on a piece."""

    op: ClassVar[Any] = torch.ops.aten.argmax.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Mask:
        """Return the places as a mask.

        Raises:
            Refused: If it goes over the images of a batch.
        """
        x, dim, keepdim = by_name(cls.op, args, kwargs).values()
        if dim is None:
            msg = "it goes over the images of a batch: name the dimension"
            raise Refused(msg)
        (dim,) = keep_batch([dim], x)
        largest = cls.op is torch.ops.aten.argmax.default
        kinks = (Order(along(dim), largest=largest, jumps=True),)
        return Mask(lambda k, c: cls.op(c, dim, keepdim), (x,), builder.shape, kinks)


@rule_for("aten.argmin.default")
class PlaceOfSmallest(PlaceOfLargest):
    """Place of the smallest element along a dimension."""

    op = torch.ops.aten.argmin.default


@rule_for("aten.aminmax.default")
class SmallestAndLargest(Operation):
    """Minimum and maximum over a dimension."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Value]:
        given = by_name(torch.ops.aten.aminmax.default, args, kwargs)
        dims = keep_batch([given["dim"] or 0], given["self"])
        keepdim = given["keepdim"]
        return [
            builder.apply(rule(dims, keepdim), given["self"], shape=shape)
            for rule, shape in zip((Smallest, Largest), builder.shapes, strict=True)
        ]


NEAREST: dict[str, Callable[[float], int]] = {
    "lower": floor,
    "higher": ceil,
    "nearest": round,
}
"""Interpolation of ``torch.quantile`` -> how it rounds a rank that lies between two elements."""


@rule_for("aten.quantile.scalar", "aten.quantile.default")
class Quantile(Operation):
    r"""A quantile over one dimension.

    It is :math:`(1 - t) x_{(r)} + t x_{(r + 1)}`, where :math:`r + t = q (n - 1)` is the rank.
    """

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append a step for each element that counts, then their weighted sum.

        Raises:
            Refused: If it goes over the images of a batch.
        """
        given = by_name(torch.ops.aten.quantile.scalar, args, kwargs)
        x = given["self"]
        dim = given["dim"]
        interpolation = given["interpolation"]
        if dim is None:
            msg = "it goes over the images of a batch: name the dimension"
            raise Refused(msg)
        (dim,) = keep_batch([dim], x)
        length = x.shape[dim - 1]  # shapes leave the batch out
        rank = float(tensor_of(given["q"], "quantile")) * (length - 1)
        terms = []
        for below, weight in cls.weights(rank, interpolation).items():
            rule = KthValue(k=below + 1, dim=dim, keepdim=given["keepdim"])  # k counts from 1
            terms.append((builder.apply(rule, x), weight))
        return weighted_sum(builder, terms)

    @staticmethod
    def weights(rank: float, interpolation: str) -> dict[int, float]:
        """Whole rank of each element that counts, from 0 -> its weight."""
        if interpolation in NEAREST:
            return {NEAREST[interpolation](rank): 1.0}
        low = floor(rank)
        if rank == low:
            return {low: 1.0}
        t = 0.5 if interpolation == "midpoint" else rank - low
        return {low: 1 - t, low + 1: t}
