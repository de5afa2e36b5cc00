"""Operations that only move numbers: shapes, slices, permutations, copies."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules.base import (
    Aten,
    Builder,
    Constant,
    Gates,
    Local,
    Mask,
    Pointwise,
    Refused,
    Rule,
    Shape,
    Value,
    filled,
    keep_batch,
    rule_for,
    tensor_of,
    unfilled,
)
from adjointbackmap.rules.field import Reach
from adjointbackmap.rules.kinks import NOT_ZERO

# PyTorch writes the end of an open slice as 2**63 - 1; no dimension is longer than this.
LAST = 2**62


def only(x: Any) -> Any:
    """A value, or the only value of a list, see :attr:`Operation.takes_lists`.

    Raises:
        Refused: If the list has several values.
    """
    if not isinstance(x, list):
        return x
    if len(x) > 1:
        msg = (
            "its input has the batch in the second dimension: "
            "choose one of the first, such as states[-1]"
        )
        raise Refused(msg)
    return x[0]


@rule_for(
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.contiguous.default",
    "aten.dropout.default",
    "aten.native_dropout.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
    "aten.feature_alpha_dropout.default",
)
class Identity(Rule):
    """An operation that changes nothing in eval mode."""

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Return the argument itself.

        Raises:
            Refused: If it is dropout in train mode.
        """
        if len(args) == 3 and args[2]:  # dropout: (x, probability, train)
            msg = "it drops units at random: pass training=self.training to the functional form"
            raise Refused(msg)
        return args[0]

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0]


@rule_for("aten._to_copy.default", "aten.to.dtype", "aten.type_as.default")
class Cast(Identity):
    """A cast to the dtype of the steps, which changes nothing; any other cast would round."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Return the argument itself; cast to Boolean, the mask of its non-zeros.

        Raises:
            Refused: If it casts to a dtype other than that of the steps.
        """
        x = args[0]
        dtype = next((a for a in args[1:] if isinstance(a, torch.dtype)), kwargs.get("dtype"))
        if len(args) > 1 and isinstance(args[1], Constant):  # type_as
            dtype = args[1].tensor.dtype
        if dtype == torch.bool and isinstance(x, Value):
            return Mask(lambda k, t: t != 0, (x,), x.shape, (NOT_ZERO,))
        if isinstance(x, Mask) and dtype is not None and not dtype.is_floating_point:
            return replace(x, test=lambda k, *t: x.test(k, *t).to(dtype))
        if dtype not in (None, builder.dtype) and not isinstance(x, Mask):
            msg = f"it casts to {dtype}, and the network computes in {builder.dtype}"
            raise Refused(msg)
        return x


@rule_for(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.squeeze.default",
    "aten.unflatten.int",
)
class Reshape(Rule):
    """The same numbers in another shape; the batch stays the first dimension."""

    takes_masks = takes_lists = True

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        # the trace knows the output's shape, whatever the operation's arguments
        return builder.apply(cls(builder.shape), only(args[0]))

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0].reshape(len(tangents[0]), *self.shape)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        return (cotangent.reshape(len(cotangent), *shapes[0]),)


@rule_for("aten.permute.default", "aten.transpose.int")
class Permute(Aten):
    """Dimensions in another order, the batch first."""

    takes_masks = True

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__(list(order))

    op = torch.ops.aten.permute.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        x, *order = args
        if len(order) == 1:  # permute; transpose names two dimensions
            return builder.apply(cls(order[0]), x)
        first, second = keep_batch(order, x)
        swapped = list(range(len(x.shape) + 1))
        swapped[first] = second
        swapped[second] = first
        return builder.apply(cls(swapped), x)


@rule_for("aten.slice.Tensor")
class Slice(Aten, Local):
    """Part of a dimension: every ``step``-th element of a range."""

    takes_masks = True

    op = torch.ops.aten.slice.Tensor

    def __init__(self, axes: int, *args: Any) -> None:
        super().__init__(*args)
        self.axes = axes

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Append one step; a slice of everything needs none.

        Raises:
            Refused: If it leaves out images of a batch.
        """
        x, dim, start, end, step = filled(args, 1, 0, None, None, 1)
        if not start and step == 1 and (end is None or end >= LAST):
            return x
        (dim,) = keep_batch([dim], x)
        length = x.shape[dim - 1]
        start, end, step = slice(start, end, step).indices(length)
        return builder.apply(Slice(len(x.shape) - 1, dim, start, end, step), x)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        dim, start, end, step = self.args
        whole = unfilled(cotangent, shapes[0]).zero_()
        whole[(slice(None),) * dim + (slice(start, end, step),)] = cotangent
        return (whole,)

    def positional(self) -> bool:
        return self.args[0] == 1  # a slice of channels leaves positions where they are

    def reach(self) -> Reach:
        dim, start, _, step = self.args
        along = [axis == dim - 2 for axis in range(self.axes)]  # dim counts batch and channels
        starts = [start if is_sliced else 0 for is_sliced in along]
        steps = [step if is_sliced else 1 for is_sliced in along]
        return steps, starts, starts

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        dim, _, _, step = self.args
        return F.pad(window, pad)[(slice(None),) * dim + (slice(None, None, step),)]


@rule_for("aten.select.int")
class Select(Aten):
    """One element along a dimension; the dimension is dropped."""

    takes_masks = True

    op = torch.ops.aten.select.int
    takes_lists = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        x, dim, which = args
        if isinstance(x, list) and dim == 0:  # the list stands for a dimension in front
            return x[which]
        return builder.apply(cls(dim, which), only(x))


@rule_for(
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.chunk.default",
    "aten.tensor_split.sections",
)
class Split(Slice):
    """A tensor in several parts along a dimension."""

    @classmethod
    def build(  # type: ignore[override]
        cls, builder: Builder, *args: Any, **kwargs: Any
    ) -> list[Value | Mask]:
        x = args[0]
        (dim,) = keep_batch([args[2] if len(args) > 2 else kwargs.get("dim", 0)], x)
        axes = len(x.shape) - 1
        parts = []
        start = 0
        for shape in builder.shapes:
            stop = start + shape[dim - 1]  # shapes leave the batch out
            part = builder.apply(Slice(axes, dim, start, stop, 1), x, shape=shape)
            parts.append(part)
            start = stop
        return parts


@rule_for("aten.unbind.int")
class Unbind(Select):
    """All elements along a dimension, as one output each."""

    takes_lists = False

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Value | Mask]:
        x = args[0]
        (dim,) = keep_batch([args[1] if len(args) > 1 else 0], x)
        shapes = builder.shapes
        return [builder.apply(Select(dim, i), x, shape=s) for i, s in enumerate(shapes)]


@rule_for("aten.index.Tensor", "aten.index_select.default")
class Index(Aten):
    """Elements at constant places."""

    takes_masks = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        aten = torch.ops.aten
        op = aten.index.Tensor if len(args) == 1 else aten.index_select.default
        self.op = op  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Append one step.

        Raises:
            Refused: If the places depend on the image, or images of a batch are chosen.
        """
        x, *rest = args
        if len(rest) == 2:  # index_select
            return builder.apply(cls(*keep_batch(rest[:1], x), tensor_of(rest[1], "index")), x)
        places = [None if i is None else tensor_of(i, "index") for i in rest[0]]
        if places[0] is not None:
            msg = "it goes over the images of a batch"
            raise Refused(msg)
        return builder.apply(cls(places), x)


@rule_for("aten.flip.default")
class Flip(Aten):
    """Dimensions in reverse."""

    takes_masks = True

    op = torch.ops.aten.flip.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        return builder.apply(cls(keep_batch(args[1], args[0])), args[0])


@rule_for("aten.roll.default")
class Roll(Aten):
    """Elements shifted along dimensions; those that leave at one end come back at the other."""

    takes_masks = True

    op = torch.ops.aten.roll.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        """Append one step.

        Raises:
            Refused: If it names no dimension, so that it mixes images of a batch.
        """
        x, shifts, dims = (*args, [])[:3]
        if not dims:
            msg = "it goes over the images of a batch: name the dimensions"
            raise Refused(msg)
        return builder.apply(cls(shifts, keep_batch(dims, x)), x)


@rule_for("aten.repeat.default", "aten.tile.default")
class Repeat(Aten):
    """Copies side by side."""

    takes_masks = True

    op = torch.ops.aten.repeat.default


@rule_for("aten.repeat_interleave.self_int")
class RepeatInterleave(Aten):
    """Every element several times in a row."""

    takes_masks = True

    op = torch.ops.aten.repeat_interleave.self_int

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        x, times, dim = args[:3]
        return builder.apply(cls(times, *keep_batch([dim], x)), x)


@rule_for("aten.channel_shuffle.default")
class ChannelShuffle(Aten):
    """Channels of groups, one of each group in turn."""

    op = torch.ops.aten.channel_shuffle.default

    def positional(self) -> bool:
        return True


@rule_for("aten.pixel_shuffle.default")
class PixelShuffle(Aten, Local):
    """Channels become positions: one position becomes ``factor`` positions along each axis."""

    op = torch.ops.aten.pixel_shuffle.default

    def reach(self) -> Reach:
        return finer([self.args[0]] * 2)

    def origin(self, first: Sequence[int]) -> list[int]:
        return [i * self.args[0] for i in first]

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        return self.op(F.pad(window, pad), *self.args)


@rule_for("aten.pixel_unshuffle.default")
class PixelUnshuffle(Aten, Local):
    """Positions become channels: ``factor`` positions along each axis become one."""

    op = torch.ops.aten.pixel_unshuffle.default

    def reach(self) -> Reach:
        # position o reads positions o * factor to o * factor + factor - 1
        factor = self.args[0]
        return [factor] * 2, [0, 0], [factor - 1] * 2

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        return self.op(F.pad(window, pad), *self.args)


def finer(factors: Sequence[int]) -> Reach:
    """The reach of an operation that makes ``factor`` positions of each, one factor per axis."""
    # position o reads position floor(o / f), which lies from o / f - (f - 1) / f to o / f
    steps = [Fraction(1, f) for f in factors]
    lows = [Fraction(1 - f, f) for f in factors]
    highs = [0] * len(factors)
    return steps, lows, highs


@rule_for("aten.im2col.default")
class UnfoldWindows(Aten):
    """Windows of a map as columns: ``torch.nn.functional.unfold``."""

    op = torch.ops.aten.im2col.default


@rule_for("aten.col2im.default")
class FoldWindows(Aten):
    """Columns added to the windows of a map: ``torch.nn.functional.fold``."""

    op = torch.ops.aten.col2im.default


@rule_for("aten.unfold.default")
class SlidingWindows(Aten):
    """Windows along one dimension as a new last dimension: ``Tensor.unfold``."""

    takes_masks = True

    op = torch.ops.aten.unfold.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value | Mask:
        x, dim, *rest = args
        return builder.apply(cls(*keep_batch([dim], x), *rest), x)


@rule_for("aten.expand.default", "aten.expand_as.default")
class Expand(Pointwise):
    """A value repeated along dimensions of extent one."""

    takes_masks = True

    def __init__(self, before: Shape, shape: Shape) -> None:
        # -1 keeps an extent as it comes, so that the positions may be a part of the map
        self.repeated = [n if n != b else -1 for b, n in zip(before, shape, strict=True)]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """Append one step, if anything is repeated.

        Raises:
            Refused: If a dimension is put in front of the batch.
        """
        if len(args[0].shape) != len(builder.shape):
            msg = "it moves the batch out of the first dimension"
            raise Refused(msg)
        x = args[0]
        shape = builder.shape
        return builder.apply(Expand(x.shape, shape), x) if x.shape != shape else x

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0].expand(-1, *self.repeated)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        return (cotangent.sum_to_size(len(cotangent), *shapes[0]),)
