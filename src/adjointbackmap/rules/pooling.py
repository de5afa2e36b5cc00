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
from adjointbackmap.rules.field import Field, Number, Reach, measured, windowed


@rule_for("aten.mean.dim")
class Mean(Aten):
    """Mean over dimensions other than the batch."""

    op = torch.ops.aten.mean.dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        x, dims, *keep = args
        return builder.apply(cls(keep_batch(dims or range(len(x.shape) + 1), x), *keep), x)

    def positional(self) -> bool:
        """Over channels that are kept as one."""
        return over_channels(*self.args)


@rule_for("aten.sum.dim_IntList")
class Sum(Mean):
    """Sum over dimensions other than the batch."""

    op = torch.ops.aten.sum.dim_IntList


def over_channels(dims: Sequence[int], keepdim: bool = False, *_: Any) -> bool:
    """Whether a reduction leaves positions as they are: over channels, which are kept as one."""
    return list(dims) == [1] and keepdim


@rule_for("aten.amax.default")
class Largest(Rule):
    """Maximum over dimensions: the gates share a tie among all that hold it, as PyTorch's derivative does."""

    op: ClassVar[Callable[..., Tensor]] = torch.amax

    def __init__(self, dims: Sequence[int], keepdim: bool = False) -> None:
        self.dims = list(dims)
        self.keepdim = keepdim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        x, dims, *keep = (*args, [])[: max(2, len(args))]
        return builder.apply(cls(keep_batch(dims or range(len(x.shape) + 1), x), *keep), x)

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """The share of each element."""
        holds = (inputs[0] == type(self).op(inputs[0], self.dims, keepdim=True)).to(inputs[0].dtype)
        return (holds / holds.sum(self.dims, keepdim=True),)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """The shares' sum."""
        return gated(gates[0], tangents[0]).sum(self.dims, keepdim=self.keepdim)

    def infinities(self, *inputs: Signs) -> Signs:
        """Minus infinity never wins."""
        return inputs[0] - {-1}

    def positional(self) -> bool:
        """Over channels that are kept as one."""
        return over_channels(self.dims, self.keepdim)


@rule_for("aten.amin.default")
class Smallest(Largest):
    """Minimum over dimensions."""

    op = torch.amin

    def infinities(self, *inputs: Signs) -> Signs:
        """Plus infinity never wins."""
        return inputs[0] - {1}


def gathered(tangents: Tensor, places: Tensor, dim: int) -> Tensor:
    """Elements of ``(N * K, *shape)`` along a dimension at places ``(N, *shape)``, the same for all ``K`` of an image."""
    t = tangents.unflatten(0, (len(places), -1))
    index = places.unsqueeze(1).expand(-1, t.shape[1], *places.shape[1:])
    return t.gather(dim + 1, index).flatten(0, 1)


class Taken(Rule):
    """Elements along a dimension at places that are the gates."""

    def __init__(self, dim: int, keepdim: bool = False) -> None:
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Take the elements."""
        taken = gathered(tangents[0], gates[0], self.dim)
        return taken if self.keepdim else taken.squeeze(self.dim)


@rule_for("aten.max.dim")
class Winner(Taken):
    """Maximum over one dimension: the gates are the winners' places, PyTorch's choice where there is a tie."""

    op: ClassVar[Callable[..., Any]] = torch.max

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Value | Mask]:
        """The maxima, and their places, which are constant on a piece."""
        x, dim, *keep = args
        rule = cls(keep_batch([dim], x)[0], *keep)
        places = Mask(lambda k, c: cls.op(c, rule.dim, rule.keepdim)[1], (x,), builder.shapes[1])
        return [builder.apply(rule, x, shape=builder.shapes[0]), places]

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """Place of the winner, the dimension kept."""
        return (type(self).op(inputs[0], self.dim, keepdim=True)[1],)

    def infinities(self, *inputs: Signs) -> Signs:
        """Minus infinity never wins."""
        return inputs[0] - {-1}

    def positional(self) -> bool:
        """Over channels that are kept as one."""
        return over_channels([self.dim], self.keepdim)


@rule_for("aten.min.dim")
class Loser(Winner):
    """Minimum over one dimension."""

    op = torch.min

    def infinities(self, *inputs: Signs) -> Signs:
        """Plus infinity never wins."""
        return inputs[0] - {1}


def spread(value: Sequence[int] | int, axes: int) -> list[int]:
    """One number per spatial axis, from one for all or one for each."""
    value = [value] if isinstance(value, int) else list(value)
    return value * (axes // len(value))


@rule_for("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
class AveragePooling(Aten, Local):
    """Average over windows; with ``ceil_mode`` or without, counting the padding or not, as the module says."""

    def __init__(self, axes: int, *args: Any) -> None:
        super().__init__(*args)
        self.axes = axes
        self.op = getattr(torch.ops.aten, f"avg_pool{axes}d").default  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        return builder.apply(cls(len(args[0].shape) - 1, *args[1:]), args[0])

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """Spread each cotangent over its window; on maps by PyTorch's own, which needs no pass forward."""
        if self.axes != 2:
            return super().adjoint(gates, cotangent, shapes)
        size, stride, *rest = filled(self.args, 1, (), 0, False, True, None)
        like = unfilled(cotangent, shapes[0])
        return (
            torch.ops.aten.avg_pool2d_backward.default(
                cotangent, like, size, stride or size, *rest
            ),
        )

    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Size, stride and padding of the window per axis."""
        size, stride, padding = filled(self.args, 1, (), (0,))[:3]
        size, stride, padding = (spread(v, self.axes) for v in (size, stride or size, padding))
        return size, stride, padding

    def reach(self) -> Reach:
        """The window."""
        size, stride, padding = self.geometry()
        return pooled([n - 1 for n in size], stride, padding)

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """Averages over whole windows of a part; on maps as a convolution, which is several times faster on the CPU."""
        size, stride, _ = self.geometry()
        if self.axes != 2:
            return self.op(F.pad(window, pad), size, stride)
        before = list(pad[0::2])
        after = list(pad[1::2])
        if before != after or min(before) < 0:
            window = F.pad(window, pad)
            before = [0, 0]
        channels = window.shape[1]
        kernel = window.new_full((1, 1, *size), 1 / prod(size)).expand(channels, -1, -1, -1)
        return F.conv2d(window, kernel, None, stride, before[::-1], groups=channels)

    def weight(self, shape: Shape, like: Tensor) -> Tensor:
        """What an average counts more at a position than one over a whole window does, for maps of a shape: ``(1, 1, ...)``."""
        ones = like.new_ones(1, 1, *shape[1:])
        counted = self.op(ones, *self.args)
        size, stride, padding = self.geometry()
        reached = [(n - 1) * s + k for n, s, k in zip(counted.shape[2:], stride, size, strict=True)]
        pad = [
            v
            for n, p, r in zip(ones.shape[:1:-1], padding[::-1], reached[::-1], strict=True)
            for v in (p, r - n - p)
        ]
        return counted / self.op(F.pad(ones, pad), size, stride)


def pooled(extent: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Reach:
    """The reach of a window that extends so far from its first position."""
    return stride, [-p for p in padding], [e - p for e, p in zip(extent, padding, strict=True)]


@rule_for(*(f"aten.adaptive_avg_pool{axes}d.default" for axes in (1, 2, 3)))
class AdaptiveAveragePooling(Aten, Local):
    """Average pooling to a given size."""

    def __init__(self, shape: Shape, size: Shape) -> None:
        super().__init__(list(size))
        self.shape = shape
        self.op = getattr(torch.ops.aten, f"adaptive_avg_pool{len(size)}d").default  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        return builder.apply(cls(args[0].shape[1:], builder.shape[1:]), args[0])

    def reach(self) -> Reach | None:
        """Windows side by side where the sizes divide."""
        return divided(self.shape, self.args[0])

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """Averages over windows of a part."""
        sizes = [b // a for b, a in zip(self.shape, self.args[0], strict=True)]
        return getattr(torch.ops.aten, f"avg_pool{len(sizes)}d").default(F.pad(window, pad), sizes)


def divided(before: Sequence[int], after: Sequence[int]) -> Reach | None:
    """The reach of an adaptive pooling whose windows lie side by side."""
    if any(b % a for b, a in zip(before, after, strict=True)) or prod(after) == 1:
        return None
    sizes = [b // a for b, a in zip(before, after, strict=True)]
    return sizes, [0] * len(sizes), [n - 1 for n in sizes]


@rule_for(
    *(f"aten.max_pool{axes}d.default" for axes in (1, 2, 3)),
    *(f"aten.max_pool{axes}d_with_indices.default" for axes in (1, 2, 3)),
)
class MaxPooling(Rule):
    """Maximum over windows: the gates are the winners' places, PyTorch's choice where there is a tie."""

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
        self.size, self.stride, self.padding, self.dilation = (spread(v, axes) for v in every)
        self.ceil_mode = ceil_mode
        self.axes = axes

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """One step; and the places of the winners, where the operation gives them."""
        return cls(len(args[0].shape) - 1, *args[1:], **kwargs).put(builder, args[0])

    def put(self, builder: Builder, x: Value) -> Value | list[Value | Mask]:
        """The maxima; and the places, where the operation gives them."""
        maxima = builder.apply(self, x)
        if len(builder.shapes) == 1:
            return maxima
        return [maxima, Mask(lambda k, c: self.gates(k, c)[0], (x,), builder.shapes[1])]

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """Flat place of each window's winner among the positions of its channel."""
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[self.axes - 1]
        args = (self.size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return (pool(inputs[0], *args, return_indices=True)[1],)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Take the winners."""
        winners = gates[0]
        t = tangents[0].unflatten(0, (len(winners), -1)).flatten(3)
        places = winners.flatten(2)[:, None].expand(-1, t.shape[1], -1, -1)
        return t.gather(3, places).unflatten(3, winners.shape[2:]).flatten(0, 1)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """Give the winners their cotangents, summed where one won twice."""
        winners = gates[0]
        g = cotangent.unflatten(0, (len(winners), -1)).flatten(3)
        places = winners.flatten(2)[:, None].expand(-1, g.shape[1], -1, -1)
        channels, *spatial = shapes[0]
        out = g.new_zeros(*g.shape[:2], channels, prod(spatial)).scatter_add_(3, places, g)
        return (out.unflatten(3, spatial).flatten(0, 1),)

    def reach(self) -> Reach | None:
        """The window, as far as dilation spreads it."""
        return pooled(
            [d * (k - 1) for k, d in zip(self.size, self.dilation, strict=True)],
            self.stride,
            self.padding,
        )

    def infinities(self, *inputs: Signs) -> Signs:
        """Minus infinity never wins."""
        return inputs[0] - {-1}


@rule_for(*(f"aten.adaptive_max_pool{axes}d.default" for axes in (1, 2, 3)))
class AdaptiveMaxPooling(MaxPooling):
    """Max pooling to a given size."""

    def __init__(self, shape: Shape, size: Shape) -> None:
        self.shape = shape
        self.out_size = size

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """One step; and the places of the winners, where the operation gives them."""
        return cls(args[0].shape[1:], builder.shape[1:]).put(builder, args[0])

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """Flat place of each window's winner among the positions of its channel."""
        pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[
            len(self.out_size) - 1
        ]
        return (pool(inputs[0], list(self.out_size), return_indices=True)[1],)

    def reach(self) -> Reach | None:
        """Windows side by side where the sizes divide."""
        return divided(self.shape, self.out_size)


@rule_for(
    *(
        f"aten.upsample_{kind}.vec"
        for kind in "nearest1d nearest2d nearest3d linear1d bilinear2d trilinear3d bicubic2d".split()
    ),
    *(f"aten._upsample_nearest_exact{axes}d.vec" for axes in (1, 2, 3)),
)
class Interpolation(Aten):
    """Nearest, linear or cubic interpolation to another size.

    A scale factor that is no ratio of sizes moves the positions that are read: 3.1 makes 18 positions of 6, and
    position ``o`` reads ``floor(o / 3.1)``. So the field is measured on the operation itself.
    The adjoint of nearest interpolation scatters to the positions that were read: PyTorch's derivative in
    one and three dimensions scatters to others for factors such as 2.1.
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
        """One step."""
        x, *rest = args
        op = getattr(torch.ops.aten, builder.op).vec
        sizes = list(builder.shape[1:])
        dtype = torch.promote_types(builder.dtype, torch.float32)
        device = "cpu" if builder.device.type == "meta" else builder.device
        reaches = []
        places = []
        for axis, (extent, size) in enumerate(zip(x.shape[1:], sizes, strict=True)):
            units = torch.eye(extent, dtype=dtype, device=device)
            shape = [
                extent if a == axis else 1 for a in range(len(sizes))
            ]  # the other axes have one position
            read = op(units.view(extent, 1, *shape), *cls.along(axis, size, *rest))
            matrix = read.reshape(extent, size).T  # which position each new one reads
            reaches.append(measured(matrix != 0))
            places.append(matrix.argmax(1))
        is_nearest = "nearest" in builder.op
        return builder.apply(cls(builder.op, reaches, places if is_nearest else (), *rest), x)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """Scatter along each axis to what was read; for linear and cubic interpolation, PyTorch's derivative."""
        if not self.places:
            return super().adjoint(gates, cotangent, shapes)
        for axis, place in enumerate(self.places, 2):  # after the batch and the channels
            extents = list(cotangent.shape)
            extents[axis] = shapes[0][axis - 1]
            zeros = cotangent.new_zeros(extents)
            cotangent = zeros.index_add(axis, place.to(cotangent.device), cotangent)
        return (cotangent,)

    @staticmethod
    def along(axis: int, size: int, to: Sequence[int] | None, *rest: Any) -> list[Any]:
        """The arguments (output size, options, scale factors) for one axis, the others one position wide."""
        *options, factors = rest
        if factors:
            factors = [f if a == axis else 1.0 for a, f in enumerate(factors)]
        else:
            to = [size if a == axis else 1 for a in range(len(to or ()))]
        return [to, *options, factors]

    def field(self, *fields: Field) -> Field:
        """What was measured; the whole image where the positions of an axis are not regular."""
        if any(reach is None for reach in self.reaches):
            return None
        return windowed(fields[0], *zip(*(reach for reach in self.reaches if reach), strict=True))
