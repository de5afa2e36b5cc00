"""Operations that read or write elements at places: gather, scatter, assignment, unpooling."""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Constant,
    ConstantSource,
    Gates,
    Mask,
    Operation,
    Refused,
    Rule,
    Shape,
    Value,
    by_name,
    keep_batch,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.field import Field
from adjointbackmap.rules.joining import Assembled
from adjointbackmap.rules.kinks import Kinks, moved
from adjointbackmap.rules.linear import aligned
from adjointbackmap.rules.masks import Where
from adjointbackmap.rules.pooling import gathered


class AtPlaces(Rule):
    """A rule with an index, which is a constant or a mask; a mask is a gate."""

    def __init__(self, index: Mask | Constant) -> None:
        self.index = index

    def places(self) -> tuple[Value, ...]:
        """The values that the places are computed from."""
        return self.index.inputs if isinstance(self.index, Mask) else ()

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        return (self.index.test(scale, *inputs[1:]),) if isinstance(self.index, Mask) else ()

    def kinks(self) -> Kinks | None:
        """Where the places change; what they are made of comes after the value."""
        return moved(self.index.kinks, 1) if isinstance(self.index, Mask) else ()

    def at(self, gates: Gates) -> Tensor:
        """The places, ``(N, ...)`` or ``(1, ...)``."""
        return self.index.tensor if isinstance(self.index, Constant) else gates[0]

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        # the values that the places are computed from have no cotangent
        return (*super().adjoint(gates, cotangent, shapes[:1]), *[None] * (len(shapes) - 1))

    def field(self, *fields: Field) -> Field:
        return None


def index_of(argument: Any) -> Mask | Constant:
    """The argument with the places.

    Raises:
        Refused: If it depends on the image and is not constant on pieces.
    """
    if isinstance(argument, Mask | Constant):
        return argument
    msg = "its index depends on the image"
    raise Refused(msg)


@rule_for("aten.gather.default")
class Gather(AtPlaces):
    """Elements along a dimension, each at a place of its own.

    The adjoint adds each cotangent at the place that was read.
    """

    takes_masks = True

    def __init__(self, index: Mask | Constant, dim: int) -> None:
        super().__init__(index)
        self.dim = dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it takes elements of zeros.
        """
        given = by_name(torch.ops.aten.gather.default, args, kwargs)
        x = given["self"]
        if isinstance(x, Mask):
            x = builder.as_numbers(x)
        if isinstance(x, Constant):
            x = builder.place(x, aligned(x, len(builder.shape)))
        if x is None:
            msg = "it takes elements of a constant that is zero: write a zero"
            raise Refused(msg)
        rule = cls(index_of(given["index"]), *keep_batch([given["dim"]], x))
        return builder.apply(rule, x, *rule.places())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return gathered(tangents[0], self.at(gates), self.dim)


@rule_for("aten.max_unpool2d.default", "aten.max_unpool3d.default")
class MaxUnpooling(AtPlaces):
    """Values at places of a larger map, with zeros elsewhere.

    A place is a flat index of a position. The places mostly come from a max pooling.
    """

    takes_masks = True

    def __init__(self, index: Mask | Constant, size: Shape) -> None:
        super().__init__(index)
        self.size = size

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, index = args[:2]
        rule = cls(index_of(index), builder.shape[1:])
        return builder.apply(rule, x, *rule.places())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        # places are (N, 1, channels, positions in), t is (N, K, channels, positions in)
        places = self.at(gates).flatten(2)[:, None]
        t = tangents[0].unflatten(0, (len(places), -1)).flatten(3)
        empty = t.new_zeros(*t.shape[:3], prod(self.size))
        return empty.scatter(3, places.expand(t.shape), t).flatten(0, 1).unflatten(2, self.size)


class Written(Assembled):
    """A value with another one written into it, or added to it, at constant places.

    Args:
        shapes: Shapes of both values without the batch.
        given: Which of them are inputs; the other is zero.
        options: The other arguments of the operation, by name.
    """

    op: ClassVar[Any]

    def __init__(
        self, shapes: Sequence[Shape], given: Sequence[int], options: dict[str, Any]
    ) -> None:
        super().__init__(shapes, given)
        self.options = options

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        options = by_name(cls.op, args, kwargs)
        target = options.pop("self")
        source = options.pop(cls.written_name())
        if "dim" in options:
            (options["dim"],) = keep_batch([options["dim"]], Value(-1, builder.shape))
        if "index" in options:
            options["index"] = tensor_of(options["index"], "index")
        return cls.put(builder, target, source, options)

    @classmethod
    def put(cls, builder: Builder, target: Any, source: Any, options: dict[str, Any]) -> Value:
        """Append the step on the values that are not exactly zero."""
        shapes, values = cls.shapes_and_values(builder, (target, source))
        return builder.apply(cls(shapes, list(values), options), *values.values())

    @classmethod
    def written_name(cls) -> str:
        """PyTorch's name of the argument that is written."""
        names = {argument.name for argument in cls.op._schema.arguments}
        return "source" if "source" in names else "src"

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        target, source = self.all_of(tangents)
        options = dict(self.options)
        index = options.get("index")
        # an index with as many dimensions as the data has a batch of one, which all images share
        if isinstance(index, Tensor) and index.dim() == target.dim() > 1:
            options["index"] = index.expand(len(target), *index.shape[1:])
        return self.op(target, **options, **{self.written_name(): source})


@rule_for("aten.index_add.default")
class IndexAdd(Written):
    """``y[index] += source`` along a dimension."""

    op = torch.ops.aten.index_add.default


@rule_for("aten.index_copy.default")
class IndexCopy(Written):
    """``y[index] = source`` along a dimension."""

    op = torch.ops.aten.index_copy.default


@rule_for("aten.scatter.src")
class ScatterValues(Written):
    """Values written along a dimension, each at a place of its own."""

    op = torch.ops.aten.scatter.src


@rule_for("aten.scatter_add.default")
class ScatterAdd(Written):
    """Values added along a dimension, each at a place of its own."""

    op = torch.ops.aten.scatter_add.default


@rule_for("aten.scatter_reduce.two")
class ScatterReduce(Written):
    """Sums or means of the values that have the same place along a dimension."""

    op = torch.ops.aten.scatter_reduce.two

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it is neither a sum nor a mean.
        """
        reduce = by_name(cls.op, args, kwargs)["reduce"]
        if reduce not in ("sum", "mean"):
            msg = f"reduce={reduce!r}: sum and mean have a rule"
            raise Refused(msg)
        return super().build(builder, *args, **kwargs)


@rule_for("aten.diagonal_scatter.default")
class DiagonalScatter(Written):
    """A value with a diagonal replaced."""

    op = torch.ops.aten.diagonal_scatter.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        options = by_name(cls.op, args, kwargs)
        target = options.pop("self")
        source = options.pop("src")
        whole = Value(-1, builder.shape)
        options["dim1"], options["dim2"] = keep_batch([options["dim1"], options["dim2"]], whole)
        return cls.put(builder, target, source, options)


def number_at(builder: Builder, x: Any, chosen: Tensor, number: Any) -> Value:
    """A value with a number wherever a constant mask ``(1, *shape)`` is true."""
    mask = Constant(chosen, ConstantSource("mask", ""), chosen, chosen)
    return Where.build(builder, mask, number, x)


@rule_for("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
class IndexFill(Operation):
    """A value with a number at some places of a dimension; it is an entry of ``b`` if not zero."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, dim, index, number = args
        keep_batch([dim], x)
        chosen = torch.zeros(1, *x.shape, dtype=torch.bool, device=builder.device)
        chosen = chosen.index_fill(dim, tensor_of(index, "index"), True)
        return number_at(builder, x, chosen, number)


@rule_for("aten.scatter.value")
class ScatterNumber(Operation):
    """A value with a number at given places along a dimension.

    The number is an entry of ``b`` unless it is zero.
    """

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, dim, index, number = args
        keep_batch([dim], x)
        chosen = torch.zeros(1, *x.shape, dtype=torch.bool, device=builder.device)
        chosen = chosen.scatter(dim, tensor_of(index, "index"), True)
        return number_at(builder, x, chosen, number)


@rule_for("aten.index_put.default")
class IndexPut(Written):
    """Assignment or addition at an index.

    Examples are ``x[:, [0, 2]] = y``, ``x[..., chosen] = 0.5`` and ``x[x < 0] = 0``.
    """

    op = torch.ops.aten.index_put.default
    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step; a single number is an entry of ``b``.

        Raises:
            Refused: If images of a batch are chosen, the places depend on the image, or the written
                value does not fit.
        """
        given = by_name(cls.op, args, kwargs)
        x = given["self"]
        indices = list(given["indices"])
        number = given["values"]
        is_number = isinstance(number, Constant) and number.tensor.numel() == 1
        single = is_number and not given["accumulate"]
        first = indices[0]
        if isinstance(first, Mask):
            return cls._by_mask(builder, x, indices, number, single)
        if first is not None:
            msg = "it goes over the images of a batch"
            raise Refused(msg)
        number = builder.as_numbers(number) if isinstance(number, Mask) else number
        x = builder.as_numbers(x) if isinstance(x, Mask) else x
        places = [None if i is None else tensor_of(i, "index") for i in indices]
        like = torch.zeros(1, *builder.shape, dtype=torch.bool, device=builder.device)
        if single:
            true = torch.ones((), dtype=torch.bool, device=builder.device)
            chosen = torch.ops.aten.index_put.default(like, places, true)
            return number_at(builder, x, chosen, number)
        return cls._written(builder, (x, number), places, like, accumulate=given["accumulate"])

    @classmethod
    def _by_mask(
        cls, builder: Builder, x: Any, indices: Sequence[Any], number: Any, single: bool
    ) -> Value:
        """The value with a single number wherever a mask of its shape is true.

        Raises:
            Refused: If the mask has another shape, or something else is written.
        """
        if len(indices) > 1 or indices[0].shape != builder.shape or not single:
            msg = "its index depends on the image: write it with torch.where"
            raise Refused(msg)
        return Where.build(builder, indices[0], number, x)

    @classmethod
    def _written(
        cls,
        builder: Builder,
        parts: Sequence[Any],
        places: list[Tensor | None],
        like: Tensor,
        accumulate: bool,
    ) -> Value:
        """Append the step on a value and the one that is written into it.

        Raises:
            Refused: If the written value does not have the dimensions of the places.
        """
        there = torch.ops.aten.index.Tensor(like, places).shape
        source = parts[1]
        dims = len(there) - 1
        if there[0] != 1 or (isinstance(source, Value) and len(source.shape) != dims):
            msg = "what is written must have the batch first and the dimensions of the places"
            raise Refused(msg)
        written = source.shape if isinstance(source, Value) else aligned(source, dims)
        shapes = [builder.shape, written]
        both = [
            p if isinstance(p, Value) else builder.place(p, s)
            for p, s in zip(parts, shapes, strict=True)
        ]
        values = {i: value for i, value in enumerate(both) if value is not None}
        options = {"indices": places, "accumulate": accumulate}
        return builder.apply(cls(shapes, list(values), options), *values.values())

    @classmethod
    def written_name(cls) -> str:
        return "values"
