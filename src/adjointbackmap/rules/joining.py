"""Operations that put several values together: concatenation, stacks, and one written over a part of another."""

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
        """What is written.

        Raises:
            Refused: If it is a constant.
        """
        if not isinstance(args[1], Value):
            msg = "it writes a constant over data: write it with torch.where or torch.cat"
            raise Refused(msg)
        return super().build(builder, args[1])


class Assembled(Rule):
    """A rule on several values, some of which may be exactly zero and are left out of its inputs."""

    def __init__(self, shapes: Sequence[Shape], given: Sequence[int]) -> None:
        self.shapes = list(shapes)
        self.given = list(given)

    @staticmethod
    def placed(builder: Builder, parts: Sequence[Any]) -> tuple[list[Shape], dict[int, Value]]:
        """Shapes of all values, and by its place every value that is not exactly zero, constants as entries of ``b``."""
        shapes = [p.shape if isinstance(p, Value) else tuple(p.tensor.shape[1:]) for p in parts]
        values = [
            p if isinstance(p, Value) else builder.place(p, shape)
            for p, shape in zip(parts, shapes, strict=True)
        ]
        return shapes, {i: value for i, value in enumerate(values) if value is not None}

    def all_of(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """The tangents of all values, zeros for those that are left out."""
        like = tangents[0]
        by_place = dict(zip(self.given, tangents, strict=True))
        zero = like.new_zeros(())
        return [
            by_place[i] if i in by_place else zero.expand(len(like), *shape)
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
        """The data and the constants that are not zero."""
        parts, dim = (*args, kwargs.get("dim", 0))[:2]
        (dim,) = keep_batch([dim], next(p for p in parts if isinstance(p, Value)))
        shapes, values = cls.placed(builder, parts)
        return builder.apply(cls(dim, shapes, list(values)), *values.values())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Concatenate; along channels, the positions may be a part."""
        parts = self.all_of(tangents)
        if self.dim == 1:
            parts = [
                p
                if i in self.given
                else p[:, :, *(slice(1),) * (p.dim() - 2)].expand(-1, -1, *tangents[0].shape[2:])
                for i, p in enumerate(parts)
            ]
        return torch.cat(parts, self.dim)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """The part of each."""
        parts = cotangent.split([shape[self.dim - 1] for shape in self.shapes], self.dim)
        return tuple(parts[i] for i in self.given)

    def positional(self) -> bool:
        """Along channels."""
        return self.dim == 1


@rule_for("aten.stack.default")
class Stack(Concatenate):
    """Values along a new dimension."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """A dimension more for each, then a concatenation.

        Raises:
            Refused: If the new dimension comes before the batch.
        """
        parts, dim = (*args, kwargs.get("dim", 0))[:2]
        dim %= len(builder.shape) + 1
        if dim == 0:
            msg = "it moves the batch out of the first dimension"
            raise Refused(msg)
        shape = (*builder.shape[: dim - 1], 1, *builder.shape[dim:])
        values = cls.placed(builder, parts)[1]
        longer = [builder.apply(Reshape(shape), value, shape=shape) for value in values.values()]
        return builder.apply(Concatenate(dim, [shape] * len(parts), list(values)), *longer)


@rule_for("aten.slice_scatter.default")
class Scatter(Assembled):
    """A part of a value replaced by another, as ``x[:, 0] = y`` does."""

    op: ClassVar[Any] = torch.ops.aten.slice_scatter.default

    def __init__(self, shapes: Sequence[Shape], given: Sequence[int], *args: Any) -> None:
        super().__init__(shapes, given)
        self.args = args

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step; a slice of everything is what replaces it.

        Raises:
            Refused: If some images of a batch are replaced, or everything by zero.
        """
        shapes, values = cls.placed(builder, args[:2])
        dim, *where = filled(args[2:], 0, 0, None, None, 1)
        if dim == 0 and not where[0] and (where[1] is None or where[1] >= LAST) and 1 in values:
            return values[1]
        dims = keep_batch([dim], Value(-1, shapes[0]))
        return builder.apply(cls(shapes, list(values), *dims, *where), *values.values())

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Replace."""
        return self.op(*self.all_of(tangents), *self.args)


@rule_for("aten.select_scatter.default")
class ScatterSelected(Scatter):
    """One element of a dimension replaced."""

    op = torch.ops.aten.select_scatter.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        shapes, values = cls.placed(builder, args[:2])
        dims = keep_batch(args[2:3], Value(-1, shapes[0]))
        return builder.apply(cls(shapes, list(values), *dims, *args[3:]), *values.values())
