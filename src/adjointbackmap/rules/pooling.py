"""Averages, maxima and sums over windows or dimensions, and interpolation."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules.base import (
    Aten,
    Builder,
    Gates,
    Local,
    Mask,
    Rule,
    Shape,
    Signs,
    Value,
    filled,
    gated,
    keep_batch,
    rule_for,
    unfilled,
)
from adjointbackmap.rules.field import Field, Number, Reach, measured_reach, windowed
from adjointbackmap.rules.kinks import Kinks, Order, along, jumping


@rule_for("aten.mean.dim")
class Mean(Aten):
    """Mean over dimensions other than the batch."""

    op = torch.ops.aten.mean.dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, dims, *keep = args
        # no dimensions means all of them, the batch included, which keep_batch refuses
        dims = keep_batch(dims or range(len(x.shape) + 1), x)
        return builder.apply(cls(dims, *keep), x)

    def positional(self) -> bool:
        return over_channels(*self.args)


@rule_for("aten.sum.dim_IntList")
class Sum(Mean):
    """Sum over dimensions other than the batch."""

    op = torch.ops.aten.sum.dim_IntList


def over_channels(dims: Sequence[int], keepdim: bool = False, *_: Any) -> bool:
    """Whether a reduction is over the channels alone and keeps their dimension.

    Then the positions stay where they are.
    """
    return list(dims) == [1] and keepdim


@rule_for("aten.amax.default")
class Largest(Rule):
    """Maximum over dimensions.

    The gates are the derivative. At a tie all winners get the same share, as in PyTorch.
    """

    op: ClassVar[Callable[..., Tensor]] = torch.amax

    def __init__(self, dims: Sequence[int], keepdim: bool = False) -> None:
        self.dims = list(dims)
        self.keepdim = keepdim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, dims, *keep = (*args, [])[: max(2, len(args))]  # the dimensions may be left out
        dims = keep_batch(dims or range(len(x.shape) + 1), x)
        return builder.apply(cls(dims, *keep), x)

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        largest = type(self).op(inputs[0], self.dims, keepdim=True)
        wins = (inputs[0] == largest).to(inputs[0].dtype)
        return (wins / wins.sum(self.dims, keepdim=True),)

    def kinks(self) -> Kinks:
        """Where the winner changes."""
        return (Order(along(*self.dims), largest=self.op is not torch.amin),)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return gated(gates[0], tangents[0]).sum(self.dims, keepdim=self.keepdim)

    def infinities(self, *inputs: Signs) -> Signs:
        # minus infinity never wins
        return inputs[0] - {-1}

    def positional(self) -> bool:
        return over_channels(self.dims, self.keepdim)


@rule_for("aten.amin.default")
class Smallest(Largest):
    """Minimum over dimensions."""

    op = torch.amin

    def infinities(self, *inputs: Signs) -> Signs:
        # plus infinity never wins
        return inputs[0] - {1}


def gathered(tangents: Tensor, places: Tensor, dim: int) -> Tensor:
    """Elements of tangents along a dimension, at places that all tangents of an image share.

    Args:
        tangents: ``(N * K, *shape)``.
        places: Indices along the dimension, ``(N, *shape)``.
        dim: The dimension, which counts the batch.
    """
    t = tangents.unflatten(0, (len(places), -1))
    index = places.unsqueeze(1).expand(-1, t.shape[1], *places.shape[1:])
    # t and index are (N, K, *shape): one dimension more than the tangents
    return t.gather(dim + 1, index).flatten(0, 1)


class Taken(Rule):
    """Elements along a dimension; the gates are their places."""

    def __init__(self, dim: int, keepdim: bool = False) -> None:
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        taken = gathered(tangents[0], gates[0], self.dim)
        return taken if self.keepdim else taken.squeeze(self.dim)


@rule_for("aten.max.dim")
class Winner(Taken):
    """Maximum over one dimension.

    The gates are the winners' places. At a tie the winner is PyTorch's.
    """

    op: ClassVar[Callable[..., Any]] = torch.max

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Value | Mask]:
        """Append one step for the maxima; their places are a mask."""
        x, dim, *keep = args
        rule = cls(keep_batch([dim], x)[0], *keep)
        places = Mask(
            lambda k, c: cls.op(c, rule.dim, rule.keepdim)[1],
            (x,),
            builder.shapes[1],
            jumping(rule.kinks()),
        )
        return [builder.apply(rule, x, shape=builder.shapes[0]), places]

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        return (type(self).op(inputs[0], self.dim, keepdim=True)[1],)

    def kinks(self) -> Kinks:
        """Where the winner changes."""
        return (Order(along(self.dim), largest=type(self).op is not torch.min),)

    def infinities(self, *inputs: Signs) -> Signs:
        # minus infinity never wins
        return inputs[0] - {-1}

    def positional(self) -> bool:
        return over_channels([self.dim], self.keepdim)


@rule_for("aten.min.dim")
class Loser(Winner):
    """Minimum over one dimension."""

    op = torch.min

    def infinities(self, *inputs: Signs) -> Signs:
        # plus infinity never wins
        return inputs[0] - {1}


def per_axis(value: Sequence[int] | int, axes: int) -> list[int]:
    """One number per spatial axis, from one number for all axes or one for each."""
    value = [value] if isinstance(value, int) else list(value)
    return value * (axes // len(value))


@rule_for("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
class AveragePooling(Aten, Local):
    """Average over windows, with all options of PyTorch: ``ceil_mode``, ``count_include_pad``."""

    def __init__(self, axes: int, *args: Any) -> None:
        super().__init__(*args)
        self.axes = axes
        self.op = getattr(torch.ops.aten, f"avg_pool{axes}d").default  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return builder.apply(cls(len(args[0].shape) - 1, *args[1:]), args[0])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        if self.axes != 2:
            return super().adjoint(gates, cotangent, shapes)
        # on maps PyTorch's own adjoint is faster: it needs no forward pass
        size, stride, *rest = filled(self.args, 1, (), 0, False, True, None)
        like = unfilled(cotangent, shapes[0])
        back = torch.ops.aten.avg_pool2d_backward.default
        return (back(cotangent, like, size, stride or size, *rest),)

    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Size, stride and padding of the window per axis."""
        size, stride, padding = filled(self.args, 1, (), (0,))[:3]
        size, stride, padding = (per_axis(v, self.axes) for v in (size, stride or size, padding))
        return size, stride, padding

    def reach(self) -> Reach:
        size, stride, padding = self.geometry()
        return pooled([n - 1 for n in size], stride, padding)

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """Averages over whole windows: those at the border need :meth:`border_correction`."""
        size, stride, _ = self.geometry()
        if self.axes != 2:
            return self.op(F.pad(window, pad), size, stride)
        # On maps we convolve with a constant kernel, which is several times faster on the CPU.
        # F.pad's order: last axis first, (before, after) for each. The convolution pads if both
        # are equal.
        before = list(pad[0::2])
        after = list(pad[1::2])
        if before != after or min(before) < 0:
            window = F.pad(window, pad)
            before = [0, 0]
        channels = window.shape[1]
        kernel = window.new_full((1, 1, *size), 1 / prod(size)).expand(channels, -1, -1, -1)
        return F.conv2d(window, kernel, None, stride, before[::-1], groups=channels)

    def border_correction(self, shape: Shape, like: Tensor) -> Tensor:
        """Correction for windows cut by the border: a factor for each output position.

        It is the average of ones, divided by their average over whole windows with zeros outside.

        Args:
            shape: Shape of the input without the batch.
            like: A tensor of the dtype and device of the result.

        Returns:
            ``(1, 1, *positions)``.
        """
        ones = like.new_ones(1, 1, *shape[1:])
        counted = self.op(ones, *self.args)
        size, stride, padding = self.geometry()
        pad = []
        # F.pad's order: last axis first, (before, after) for each
        for axis in reversed(range(self.axes)):
            reached = (counted.shape[2 + axis] - 1) * stride[axis] + size[axis]
            before = padding[axis]
            pad += [before, reached - ones.shape[2 + axis] - before]
        return counted / self.op(F.pad(ones, pad), size, stride)


def pooled(extent: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Reach:
    """The reach of a window along each axis.

    Args:
        extent: Distance from the window's first to its last position.
        stride: Distance between windows.
        padding: Positions in front of the map.
    """
    lows = [-p for p in padding]
    highs = [e - p for e, p in zip(extent, padding, strict=True)]
    return stride, lows, highs


@rule_for(*(f"aten.adaptive_avg_pool{axes}d.default" for axes in (1, 2, 3)))
class AdaptiveAveragePooling(Aten, Local):
    """Average pooling to a given size."""

    def __init__(self, shape: Shape, size: Shape) -> None:
        super().__init__(list(size))
        self.shape = shape
        op = getattr(torch.ops.aten, f"adaptive_avg_pool{len(size)}d").default
        self.op = op  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        return builder.apply(cls(args[0].shape[1:], builder.shape[1:]), args[0])

    def reach(self) -> Reach | None:
        return divided(self.shape, self.args[0])

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        sizes = [b // a for b, a in zip(self.shape, self.args[0], strict=True)]
        return getattr(torch.ops.aten, f"avg_pool{len(sizes)}d").default(F.pad(window, pad), sizes)


def divided(before: Sequence[int], after: Sequence[int]) -> Reach | None:
    """The reach of an adaptive pooling, from the sizes before and after it.

    It is ``None``, and the field the whole image, unless the windows lie side by side and there are
    several.
    """
    if any(b % a for b, a in zip(before, after, strict=True)) or prod(after) == 1:
        return None
    sizes = [b // a for b, a in zip(before, after, strict=True)]
    return sizes, [0] * len(sizes), [n - 1 for n in sizes]


@rule_for(
    *(f"aten.max_pool{axes}d.default" for axes in (1, 2, 3)),
    *(f"aten.max_pool{axes}d_with_indices.default" for axes in (1, 2, 3)),
)
class MaxPooling(Rule):
    """Maximum over windows.

    The gates are the winners' places. At a tie the winner is PyTorch's.
    """

    def __init__(
        self,
        axes: int,
        size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> None:
        every = (size, stride or size, padding, dilation)
        self.size, self.stride, self.padding, self.dilation = (per_axis(v, axes) for v in every)
        self.ceil_mode = ceil_mode
        self.axes = axes

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        return cls(len(args[0].shape) - 1, *args[1:], **kwargs).put(builder, args[0])

    def put(self, builder: Builder, x: Value) -> Value | list[Value | Mask]:
        """Append one step; the winners' places are a mask, if the operation returns them too."""
        maxima = builder.apply(self, x)
        if len(builder.shapes) == 1:
            return maxima
        kinks = jumping(self.kinks())
        return [maxima, Mask(lambda k, c: self.gates(k, c)[0], (x,), builder.shapes[1], kinks)]

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        # flat place of each window's winner among the positions of its channel
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[self.axes - 1]
        args = (self.size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return (pool(inputs[0], *args, return_indices=True)[1],)

    def kinks(self) -> Kinks:
        """Where the winner of a window changes."""
        return (Order(self.windows),)

    def windows(self, shape: Shape) -> Tensor:
        """Flat places of the elements of every window, ``(windows, elements)``; -1 outside."""
        channels, *extents = shape
        axes = [self.places(axis, extent) for axis, extent in enumerate(extents)]
        flat = torch.zeros((1,) * 2 * len(axes), dtype=torch.int64)
        inside = torch.ones_like(flat, dtype=torch.bool)
        for axis, (places, extent) in enumerate(zip(axes, extents, strict=True)):
            view = [1] * 2 * len(axes)  # (*positions, *elements)
            view[axis], view[len(axes) + axis] = places.shape
            flat = flat * extent + places.view(view)
            inside = inside & (places.view(view) >= 0)
        flat = flat.reshape(prod(len(places) for places in axes), -1)
        channel = torch.arange(channels)[:, None, None] * prod(extents)
        return torch.where(inside.reshape(flat.shape), flat + channel, -1).flatten(0, 1)

    def places(self, axis: int, extent: int) -> Tensor:
        """Places of each window's elements along an axis, ``(positions, elements)``; -1 outside."""
        size, stride, padding, dilation = (
            values[axis] for values in (self.size, self.stride, self.padding, self.dilation)
        )
        line = torch.zeros(1, 1, extent)
        pooled_line = F.max_pool1d(line, size, stride, padding, dilation, self.ceil_mode)
        first = torch.arange(pooled_line.shape[-1]) * stride - padding
        places = first[:, None] + dilation * torch.arange(size)
        return torch.where((places >= 0) & (places < extent), places, -1)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        winners = gates[0]
        # t is (N, K, channels, positions in), places (N, K, channels, positions out)
        t = tangents[0].unflatten(0, (len(winners), -1)).flatten(3)
        places = winners.flatten(2)[:, None].expand(-1, t.shape[1], -1, -1)
        return t.gather(3, places).unflatten(3, winners.shape[2:]).flatten(0, 1)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        # a position that wins in two windows gets the sum of both cotangents
        winners = gates[0]
        g = cotangent.unflatten(0, (len(winners), -1)).flatten(3)
        places = winners.flatten(2)[:, None].expand(-1, g.shape[1], -1, -1)
        channels, *spatial = shapes[0]
        out = g.new_zeros(*g.shape[:2], channels, prod(spatial)).scatter_add_(3, places, g)
        return (out.unflatten(3, spatial).flatten(0, 1),)

    def reach(self) -> Reach | None:
        extent = [d * (k - 1) for k, d in zip(self.size, self.dilation, strict=True)]
        return pooled(extent, self.stride, self.padding)

    def infinities(self, *inputs: Signs) -> Signs:
        # minus infinity never wins
        return inputs[0] - {-1}


@rule_for(*(f"aten.adaptive_max_pool{axes}d.default" for axes in (1, 2, 3)))
class AdaptiveMaxPooling(MaxPooling):
    """Max pooling to a given size."""

    def __init__(self, shape: Shape, size: Shape) -> None:
        self.shape = shape
        self.out_size = size

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        return cls(args[0].shape[1:], builder.shape[1:]).put(builder, args[0])

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        pools = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        pool = pools[len(self.out_size) - 1]
        return (pool(inputs[0], list(self.out_size), return_indices=True)[1],)

    def places(self, axis: int, extent: int) -> Tensor:
        """Places of each window's elements along an axis, ``(positions, elements)``; -1 outside."""
        count = self.out_size[axis]
        position = torch.arange(count)
        first = position * extent // count
        stop = -(-(position + 1) * extent // count)
        places = first[:, None] + torch.arange(int((stop - first).max()))
        return torch.where(places < stop[:, None], places, -1)

    def reach(self) -> Reach | None:
        return divided(self.shape, self.out_size)


@rule_for(
    *(f"aten.upsample_nearest{axes}d.vec" for axes in (1, 2, 3)),
    *(f"aten._upsample_nearest_exact{axes}d.vec" for axes in (1, 2, 3)),
    "aten.upsample_linear1d.vec",
    "aten.upsample_bilinear2d.vec",
    "aten.upsample_trilinear3d.vec",
    "aten.upsample_bicubic2d.vec",
)
class Interpolation(Aten):
    """Nearest, linear or cubic interpolation to another size.

    A scale factor need not be the ratio of the sizes: 3.1 makes 18 positions of 6, and position
    ``o`` reads position ``floor(o / 3.1)``. So the reach is measured on the operation itself.

    The adjoint of nearest interpolation scatters to the positions that were read. PyTorch's
    derivative in one and three dimensions scatters to others, for factors such as 2.1.

    Args:
        kind: Name of the ATen operation.
        reaches: The reach along each axis, see :func:`measured_reach`.
        places: For nearest interpolation, the position that each output position reads, per axis.
        *args: The other arguments of the operation.
    """

    def __init__(
        self,
        kind: str,
        reaches: Sequence[tuple[Number, Number, Number] | None],
        places: Sequence[Tensor],
        *args: Any,
    ) -> None:
        super().__init__(*args)
        self.kind = kind
        self.reaches = list(reaches)
        self.places = list(places)
        self.op = getattr(torch.ops.aten, kind).vec  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, *rest = args
        axes = range(len(builder.shape) - 1)
        matrices = [cls.matrix(builder, x.shape[1:], axis, *rest) for axis in axes]
        reaches = [measured_reach(matrix != 0) for matrix in matrices]
        is_nearest = "nearest" in builder.op
        places = [matrix.argmax(1) for matrix in matrices] if is_nearest else ()
        return builder.apply(cls(builder.op, reaches, places, *rest), x)

    @classmethod
    def matrix(cls, builder: Builder, extents: Shape, axis: int, *args: Any) -> Tensor:
        """The interpolation along one axis as a matrix ``(out, in)``."""
        op = getattr(torch.ops.aten, builder.op).vec
        # a meta device has no numbers to measure
        dtype = torch.promote_types(builder.dtype, torch.float32)
        device = "cpu" if builder.device.type == "meta" else builder.device
        extent = extents[axis]
        size = builder.shape[1 + axis]
        # one image per input position, with one position along the other axes
        shape = [extent if a == axis else 1 for a in range(len(extents))]
        units = torch.eye(extent, dtype=dtype, device=device).view(extent, 1, *shape)
        read = op(units, *cls.along(axis, size, *args))
        return read.reshape(extent, size).T

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        if not self.places:
            return super().adjoint(gates, cotangent, shapes)
        for axis, place in enumerate(self.places, 2):  # after the batch and the channels
            extents = list(cotangent.shape)
            extents[axis] = shapes[0][axis - 1]  # shapes leave the batch out
            zeros = cotangent.new_zeros(extents)
            cotangent = zeros.index_add(axis, place.to(cotangent.device), cotangent)
        return (cotangent,)

    @staticmethod
    def along(axis: int, size: int, to: Sequence[int] | None, *rest: Any) -> list[Any]:
        """The arguments for one axis, where the other axes have one position.

        They are the output size, the options and the scale factors.
        """
        *options, factors = rest
        if factors:
            factors = [f if a == axis else 1.0 for a, f in enumerate(factors)]
        else:
            to = [size if a == axis else 1 for a in range(len(to or ()))]
        return [to, *options, factors]

    def field(self, *fields: Field) -> Field:
        if any(reach is None for reach in self.reaches):
            return None
        return windowed(fields[0], *zip(*(reach for reach in self.reaches if reach), strict=True))
