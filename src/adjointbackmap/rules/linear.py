"""Operations that are linear in the image and the biases, whatever the pattern."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adjointbackmap.rules.base import Builder, Constant, Gates, Pointwise, Refused, Rule, Shape, Value, tensor_of
from adjointbackmap.rules.field import Axis, Field, windowed


class Place(Pointwise):
    """Elements of an entry of the bias vector, at their places in a tensor: ``entry[index]``.

    The adjoint sums over the places of each element.
    """

    def __init__(self, index: Tensor, size: int) -> None:
        self.index, self.size = index, size
        self.whole = index.numel() == size and torch.equal(index.flatten().cpu(), torch.arange(size))

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Gather."""
        entry = tangents[0].reshape(len(tangents[0]), -1)
        placed = entry if self.whole else entry[:, self.index.flatten()]
        return placed.reshape(len(entry), *self.index.shape)

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """Scatter and add."""
        flat = cotangent.reshape(len(cotangent), -1)
        if not self.whole:
            flat = flat.new_zeros(len(flat), self.size).index_add_(1, self.index.flatten(), flat)
        return (flat.reshape(len(flat), *shapes[0]),)


class Add(Pointwise):
    """Sum of two values that meet position by position; the smaller is broadcast."""

    ops = ("aten.add.Tensor", "aten.add.Scalar")
    sign: ClassVar[float] = 1.0

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The sum of the data arguments, constants as entries of the bias vector.

        Raises:
            Refused: If one argument would be broadcast over the batch.
        """
        first, second, alpha = (*args, kwargs.get("alpha", 1))[:3]
        left, right = (a if isinstance(a, Value) else builder.place(a, aligned(a, len(builder.shape))) for a in (first, second))
        factor = cls.sign * alpha
        if right is not None and factor != 1:
            right = builder.apply(Scale(float(factor)), right, shape=right.shape)
        if left is None or right is None:
            return _broadcast(builder, left or right)
        if isinstance(first, Value) and isinstance(second, Value) and len(left.shape) != len(right.shape):
            msg = f"its arguments have {len(left.shape)} and {len(right.shape)} dimensions beside the batch"
            raise Refused(msg)
        return builder.apply(Add(), left, right)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``a + b``."""
        return tangents[0] + tangents[1]

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """The cotangent itself, summed where an argument was broadcast."""
        return tuple(cotangent.sum_to_size(len(cotangent), *shape) for shape in shapes)


class Subtract(Add):
    """Difference of two values."""

    ops = ("aten.sub.Tensor", "aten.sub.Scalar")
    sign = -1.0


class ReverseSubtract(Subtract):
    """Difference whose second argument comes first: ``1 - x`` is one."""

    ops = ("aten.rsub.Scalar", "aten.rsub.Tensor")

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The subtraction with the arguments exchanged."""
        first, second, *factor = args
        return super().build(builder, second, first, *factor, **kwargs)


class Expand(Pointwise):
    """A value repeated along dimensions of extent one."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Repeat."""
        return tangents[0].expand(len(tangents[0]), *self.shape)

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """Sum over the copies."""
        return (cotangent.sum_to_size(len(cotangent), *shapes[0]),)


def _broadcast(builder: Builder, value: Value | None) -> Value:
    if value is None:
        msg = "both of its arguments are constants"
        raise Refused(msg)
    return value if value.shape == builder.shape else builder.apply(Expand(builder.shape), value)


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


class Scale(Pointwise):
    """Product with a constant factor, a number or a tensor that broadcasts."""

    ops = ("aten.mul.Tensor", "aten.mul.Scalar")

    def __init__(self, factor: Tensor | float) -> None:
        self.factor = factor

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The data argument times the constant one."""
        first, second = args[:2]
        data, constant = (first, second) if isinstance(first, Value) else (second, first)
        factor = tensor_of(constant, "second factor")
        factor = factor.reshape(aligned(constant, len(builder.shape))) if isinstance(factor, Tensor) else float(factor)
        return builder.apply(Scale(cls.prepared(factor)), data)

    @staticmethod
    def prepared(factor: Tensor | float) -> Tensor | float:
        """The factor that multiplies the data."""
        return factor

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``s x``."""
        return tangents[0] * self.factor

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """``s g``, summed where the data was broadcast."""
        return ((cotangent * self.factor).sum_to_size(len(cotangent), *shapes[0]),)


class Divide(Scale):
    """Quotient by a constant."""

    ops = ("aten.div.Tensor", "aten.div.Scalar")

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The data argument times the inverse of the constant one."""
        tensor_of(args[1], "divisor")
        return super().build(builder, *args, **kwargs)

    @staticmethod
    def prepared(factor: Tensor | float) -> Tensor | float:
        """The inverse of the divisor."""
        return 1 / factor


class Negate(Pointwise):
    """Change of sign."""

    ops = ("aten.neg.default",)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``-x``."""
        return -tangents[0]


class BatchNorm(Rule):
    r"""Batch norm in eval mode, [Wan2022, eq. 3.5].

    :math:`y = s\,c + b'` with :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and
    :math:`b' = \beta - s\,\mu`, one entry of the bias vector per channel.
    """

    ops = ("aten._native_batch_norm_legit_no_training.default",)

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
        key = builder.path or "batch_norm"
        placed = builder.offset(key, offset, shape, beta.source if beta is not None else None)
        return builder.apply(Add(), scaled, placed)


class Identity(Rule):
    """An operation that changes nothing in eval mode."""

    ops = (
        "aten.clone.default",
        "aten.alias.default",
        "aten.detach.default",
        "aten.contiguous.default",
        "aten.dropout.default",
        "aten.native_dropout.default",
    )

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The argument itself.

        Raises:
            Refused: If it is dropout in train mode.
        """
        if len(args) == 3 and args[2]:
            msg = "it drops units at random: pass training=self.training to the functional form"
            raise Refused(msg)
        return args[0]


class Reshape(Rule):
    """The same numbers in another shape; the batch stays the first dimension."""

    ops = (
        "aten.view.default",
        "aten.reshape.default",
        "aten._unsafe_view.default",
        "aten.flatten.using_ints",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
    )

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The shape is the one that the trace found."""
        return builder.apply(cls(builder.shape), args[0])

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Reshape."""
        return tangents[0].reshape(len(tangents[0]), *self.shape)

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """Reshape back."""
        return (cotangent.reshape(len(cotangent), *shapes[0]),)


class Aten(Rule):
    """A linear ATen operation applied to every tangent as it is; the adjoint is derived."""

    op: ClassVar[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """The operation itself."""
        return self.op(tangents[0], *self.args, **self.kwargs)


class Mean(Aten):
    """Mean over dimensions other than the batch."""

    ops = ("aten.mean.dim",)
    op = torch.ops.aten.mean.dim

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If it goes over the batch.
        """
        dims = len(args[0].shape) + 1
        if any(d % dims == 0 for d in args[1] or range(dims)):
            msg = "it goes over the images of a batch"
            raise Refused(msg)
        return super().build(builder, *args, **kwargs)


class Sum(Mean):
    """Sum over dimensions other than the batch."""

    ops = ("aten.sum.dim_IntList",)
    op = torch.ops.aten.sum.dim_IntList


class AdaptiveAveragePooling(Aten):
    """Average pooling to a given size."""

    ops = ("aten.adaptive_avg_pool2d.default",)
    op = torch.ops.aten.adaptive_avg_pool2d.default


class AveragePooling(Aten):
    """Average over windows; with ``ceil_mode`` or without, counting the padding or not, as the module says."""

    ops = ("aten.avg_pool2d.default",)
    op = torch.ops.aten.avg_pool2d.default

    def field(self, *fields: Field) -> Field:
        """The window."""
        return pooling_field(fields[0], *self.args)


def pooling_field(field: Field, size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *_: Any) -> Field:
    """The field after a pooling over windows of ``size``."""
    size, stride, padding = (pair(v) for v in (size, stride or size, padding))
    return windowed(field, stride, [-p for p in padding], size)


def pair(value: Sequence[int]) -> list[int]:
    """One number per spatial axis of a map, from one or two."""
    return list(value) * (2 // len(value))


class Pad(Aten):
    """Padding with zeros of any dimension but the batch."""

    ops = ("aten.pad.default", "aten.constant_pad_nd.default")
    op = torch.ops.aten.constant_pad_nd.default

    def __init__(self, pad: Sequence[int]) -> None:
        super().__init__(list(pad))

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If it pads with anything but zero, or the batch.
        """
        x, pad, *rest = args
        mode = next((r for r in rest if isinstance(r, str)), kwargs.get("mode", "constant"))
        value = next((r for r in rest if isinstance(r, int | float)), kwargs.get("value"))
        if mode != "constant" or value:
            msg = f"only zero padding has a rule, this pads with {value if mode == 'constant' else mode}"
            raise Refused(msg)
        if len(pad) > 2 * len(x.shape):
            msg = "it pads the batch"
            raise Refused(msg)
        return builder.apply(cls(pad), x)

    def field(self, *fields: Field) -> Field:
        """Positions move by what is added before them."""
        if not fields[0]:
            return fields[0]
        before = [*self.args[0][0::2], *[0] * len(fields[0])][: len(fields[0])]
        return tuple(
            Axis(a.step, a.low - a.step * p, a.high - a.step * p) for a, p in zip(fields[0], reversed(before), strict=True)
        )
