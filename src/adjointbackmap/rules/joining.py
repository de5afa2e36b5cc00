"""Operations that join several values: concatenation, stacking, one written over another."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Gates,
    Refused,
    Rule,
    Shape,
    Value,
    filled,
    keep_batch,
    rule_for,
)
from adjointbackmap.rules.moving import LAST, Expand, Reshape


@rule_for("aten.copy.default")
class Copy(Expand):
    """A value written over another, as ``x[:] = y`` does."""

    takes_masks = False

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Return the value that is written.

        Raises:
            Refused: If a constant is written.
        """
        if not isinstance(args[1], Value):
            msg = "it writes a constant over data: write it with torch.where or torch.cat"
            raise Refused(msg)
        return super().build(builder, args[1])


class Assembled(Rule):
    """A rule on several values; values that are exactly zero are left out of its inputs.

    Args:
        shapes: Shapes of all values without the batch.
        given: Which of the values are inputs, in their order.
    """

    def __init__(self, shapes: Sequence[Shape], given: Sequence[int]) -> None:
        self.shapes = list(shapes)
        self.given = list(given)

    @staticmethod
    def shapes_and_values(
        builder: Builder, parts: Sequence[Any]
    ) -> tuple[list[Shape], dict[int, Value]]:
        """Shapes of all values, and the values that are not exactly zero by their number.

        Constants become entries of ``b``.
        """
        # a constant has a batch of one in front
        shapes = [p.shape if isinstance(p, Value) else tuple(p.tensor.shape[1:]) for p in parts]
        values = [
            p if isinstance(p, Value) else builder.place(p, shape)
            for p, shape in zip(parts, shapes, strict=True)
        ]
        return shapes, {i: value for i, value in enumerate(values) if value is not None}

    def all_of(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """The tangents of all values, with zeros for the values that were left out."""
        like = tangents[0]
        by_number = dict(zip(self.given, tangents, strict=True))
        zero = like.new_zeros(())
        return [
            by_number[i] if i in by_number else zero.expand(len(like), *shape)
            for i, shape in enumerate(self.shapes)
        ]


@rule_for("aten.cat.default", "aten.concat.default")
class Concatenate(Assembled):
    """Values one after the other along a dimension."""

    def __init__(self, dim: int, shapes: Sequence[Shape], given: Sequence[int]) -> None:
        super().__init__(shapes, given)
        self.dim = dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        parts, dim = (*args, kwargs.get("dim", 0))[:2]
        # an empty vector fits everything in PyTorch: caches of language models begin with one
        parts = [p for p in parts if isinstance(p, Value) or tuple(p.tensor.shape) != (0,)]
        (dim,) = keep_batch([dim], next(p for p in parts if isinstance(p, Value)))
        shapes, values = cls.shapes_and_values(builder, parts)
        return builder.apply(cls(dim, shapes, list(values)), *values.values())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        parts = self.all_of(tangents)
        if self.dim == 1:
            # Along channels the tangents may cover a part of the positions: the zeros must fit it.
            positions = tangents[0].shape[2:]
            one_position = (slice(None), slice(None), *[slice(1)] * len(positions))
            parts = [
                p if i in self.given else p[one_position].expand(-1, -1, *positions)
                for i, p in enumerate(parts)
            ]
        return torch.cat(parts, self.dim)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        # shapes leave the batch out, dimensions count it
        lengths = [shape[self.dim - 1] for shape in self.shapes]
        parts = cotangent.split(lengths, self.dim)
        return tuple(parts[i] for i in self.given)

    def positional(self) -> bool:
        return self.dim == 1


@rule_for("aten.stack.default")
class Stack(Concatenate):
    """Values along a new dimension."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Give each value one more dimension, then concatenate.

        Raises:
            Refused: If the new dimension comes before the batch.
        """
        parts, dim = (*args, kwargs.get("dim", 0))[:2]
        dim %= len(builder.shape) + 1
        if dim == 0:
            msg = "it moves the batch out of the first dimension"
            raise Refused(msg)
        shape = (*builder.shape[: dim - 1], 1, *builder.shape[dim:])
        values = cls.shapes_and_values(builder, parts)[1]
        longer = [builder.apply(Reshape(shape), value, shape=shape) for value in values.values()]
        return builder.apply(Concatenate(dim, [shape] * len(parts), list(values)), *longer)


@rule_for("aten.slice_scatter.default")
class Scatter(Assembled):
    """A value with a part replaced by another value, as ``x[:, 0:2] = y`` does."""

    op: ClassVar[Any] = torch.ops.aten.slice_scatter.default

    def __init__(self, shapes: Sequence[Shape], given: Sequence[int], *args: Any) -> None:
        super().__init__(shapes, given)
        self.args = args

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step; if a slice of everything is replaced, return the replacement.

        Raises:
            Refused: If some images of a batch are replaced, or everything by zero.
        """
        shapes, values = cls.shapes_and_values(builder, args[:2])
        dim, start, end, step = filled(args[2:], 0, 0, None, None, 1)
        is_everything = not start and (end is None or end >= LAST)
        if dim == 0 and is_everything and 1 in values:
            return values[1]
        dims = keep_batch([dim], Value(-1, shapes[0]))
        rule = cls(shapes, list(values), *dims, start, end, step)
        return builder.apply(rule, *values.values())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return self.op(*self.all_of(tangents), *self.args)


@rule_for("aten.select_scatter.default")
class ScatterSelected(Scatter):
    """A value with one element of a dimension replaced, as ``x[:, 0] = y`` does."""

    op = torch.ops.aten.select_scatter.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        shapes, values = cls.shapes_and_values(builder, args[:2])
        dims = keep_batch(args[2:3], Value(-1, shapes[0]))
        return builder.apply(cls(shapes, list(values), *dims, *args[3:]), *values.values())
