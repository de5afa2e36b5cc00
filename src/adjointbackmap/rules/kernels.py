"""Layers with a kernel: convolution and linear. Their bias is an entry of ``b``."""

from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Gates,
    Local,
    Rule,
    Shape,
    Signs,
    Value,
    channels_last,
    filled,
    rule_for,
    tensor_of,
    unfilled,
)
from adjointbackmap.rules.few_channels import SMALLEST, back_in_squares, square_of
from adjointbackmap.rules.field import Reach
from adjointbackmap.rules.linear import Add
from adjointbackmap.rules.padding import Pad, grown
from adjointbackmap.rules.pooling import pooled


class Kernel(Rule):
    """A rule with a kernel ``(out, in, ...)``.

    The modes RM3 and RM4 keep its in-channels apart.
    """

    def __init__(self, weight: Tensor, *args: Any) -> None:
        self.weight = weight
        self.groups = 1

    @property
    def in_channels(self) -> int:
        """Number of in-channels that one out-channel reads: those of its group."""
        return self.weight.shape[1]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append a step for the kernel, and one that adds the bias to every position."""
        x, weight, bias, *rest = (*args, None) if len(args) == 2 else args
        out = builder.apply(cls(tensor_of(weight, "kernel"), *rest, **kwargs), x)
        if bias is None:
            return out
        channels = tensor_of(bias, "bias").numel()
        placed = builder.place(bias, cls.bias_shape(channels, len(builder.shape)))
        return builder.apply(Add(), out, placed) if placed else out

    @staticmethod
    @abstractmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        """Shape of the bias without the batch, for an output of ``dims`` dimensions."""

    def infinities(self, *inputs: Signs) -> Signs:
        # weights have either sign, so that an infinity can become the other one
        return inputs[0] and frozenset({-1, 1})

    @abstractmethod
    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        """The cotangent of the input, which has the given shape."""

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        return (self.back(cotangent, shapes[0]),)

    def in_channel_mask(self, channels: int) -> Tensor:
        """Which of the input's channels are in-channel ``j`` of their group: ``(j, channels)``."""
        # channels of a group are contiguous in the input
        return torch.arange(channels) % self.in_channels == torch.arange(self.in_channels)[:, None]

    def apart(self) -> "Kernel | None":
        """Depthwise version, with one group per in-channel.

        Its out-channel ``j * out + i`` is out-channel ``i`` restricted to in-channel ``j``. It is
        ``None`` for a kernel that has groups itself.
        """
        return None

    def tap(self) -> "Kernel | None":
        """Version for one in-channel, with one out-channel per tap.

        The kernel of each out-channel is 1 at its tap and 0 elsewhere. It is ``None`` for a kernel
        with groups.
        """
        return None

    def by_tap(self) -> Tensor:
        """The kernel as ``(in, out, taps)``; a tap is a position in the kernel's window."""
        return self.weight.flatten(2).transpose(0, 1)

    def in_channel_of(self, out_channel: Tensor, j: Tensor) -> Tensor:
        """The input channel that is in-channel ``j`` of an out-channel's group."""
        out_per_group = self.weight.shape[0] // self.groups
        group = out_channel // out_per_group
        return group * self.in_channels + j


@rule_for(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
)
class Convolution(Kernel, Local):
    r"""Convolution with any stride, padding, dilation and groups.

    :math:`y_i = \sum_j w_{i,j} \star x_j`. The adjoint scatters :math:`w_{i,j}`, scaled by the
    cotangent.
    """

    def __init__(
        self,
        weight: Tensor,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> None:
        super().__init__(weight)
        self.groups = groups
        axes = weight.dim() - 2
        self.stride, self.padding, self.dilation = (
            list(v) * (axes // len(v)) for v in (stride, padding, dilation)
        )

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append the steps of kernel and bias.

        The padding may be ``"same"`` or ``"valid"``. If "same" needs more positions after an axis
        than before it, the extra ones are padded in a step of their own.
        """
        x, weight, bias, stride, padding, *rest = filled(args, 2, None, (1,), (0,))
        if padding == "valid":
            padding = [0]
        elif padding == "same":
            unpadded = cls(tensor_of(weight, "kernel"), stride, (0,), *rest)
            padding, after = unpadded.same()
            if padding != after:
                # F.pad's order: last axis first, (before, after) for each
                pairs = reversed(list(zip(padding, after, strict=True)))
                extra = [n for before, behind in pairs for n in (0, behind - before)]
                x = builder.apply(Pad(len(x.shape) - 1, extra), x, shape=grown(x.shape, extra))
        return super().build(builder, x, weight, bias, stride, padding, *rest, **kwargs)

    def extent(self) -> list[int]:
        """Distance from the first to the last position of the kernel's window, per axis."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]

    def same(self) -> tuple[list[int], list[int]]:
        """PyTorch's padding ``"same"``: positions before and after each axis."""
        before = [n // 2 for n in self.extent()]
        after = [n - n // 2 for n in self.extent()]
        return before, after

    @staticmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        return (channels, *(1,) * (dims - 1))

    def apart(self) -> "Convolution | None":
        # (in, out, taps) -> (in * out, 1, *taps): a group of out-channels for each in-channel
        weight = self.by_tap().reshape(-1, 1, *self.weight.shape[2:])
        return self._like(weight, groups=self.weight.shape[1])

    def tap(self) -> "Convolution | None":
        return self._like(_unit_kernels(self.weight)[:, None], groups=1)

    def _like(self, weight: Tensor, groups: int) -> "Convolution | None":
        if self.groups > 1:
            return None
        return Convolution(_contiguous(weight), self.stride, self.padding, self.dilation, groups)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return self._convolved(tangents[0], self.padding)

    def _convolved(self, tangents: Tensor, padding: list[int]) -> Tensor:
        if self._faster_transposed(tangents, padding):
            return self._transposed(tangents, padding)
        args = (self.stride, padding, self.dilation, False, [0] * len(self.stride), self.groups)
        return torch.ops.aten.convolution.default(tangents, self.weight, None, *args)

    def _faster_transposed(self, tangents: Tensor, padding: list[int]) -> bool:
        """Whether the convolution is faster as the adjoint of one with the flipped kernel.

        It is on the CPU in float64. The adjoint needs stride 1, no groups, and a padding that is
        not wider than the kernel's window.
        """
        if tangents.dtype != torch.float64 or tangents.device.type != "cpu":
            return False
        inside = all(p <= n for p, n in zip(padding, self.extent(), strict=True))
        return self.groups == 1 and set(self.stride) == {1} and inside

    def _transposed(self, tangents: Tensor, padding: list[int]) -> Tensor:
        """The same convolution, computed as the adjoint of one with the flipped kernel."""
        axes = range(2, self.weight.dim())
        weight = self.weight.transpose(0, 1).flip(*axes).contiguous()
        flipped = Convolution(weight, dilation=self.dilation)
        # An adjoint removes q positions at each end where a convolution adds p: q = extent - p.
        # The output has n + 2 p - extent = n + p - q positions.
        flipped.padding = [n - p for n, p in zip(self.extent(), padding, strict=True)]
        growth = [p - q for p, q in zip(padding, flipped.padding, strict=True)]
        sizes = [n + g for n, g in zip(tangents.shape[2:], growth, strict=True)]
        return flipped.back(tangents, (self.weight.shape[0], *sizes))

    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        square = self._square(cotangent)
        if square:
            kernel = (self.weight, self.stride, self.padding)
            return back_in_squares(*kernel, cotangent, shape, square)
        # a transposed convolution, in the form that is fastest in float64 too
        geometry = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride))
        back = torch.ops.aten.convolution_backward.default(
            cotangent,
            unfilled(cotangent, shape),
            self.weight,
            None,  # no bias
            *geometry,
            self.groups,
            [True, False, False],  # of input, weight and bias, only the input's gradient
        )
        return back[0]

    def _square(self, cotangent: Tensor) -> int:
        """The size of the squares in which the adjoint is computed; 0 for the plain adjoint."""
        if cotangent.dim() != 4 or not channels_last(cotangent) or cotangent.numel() < SMALLEST:
            return 0
        if self.groups > 1 or set(self.dilation) != {1} or len(set(self.stride)) > 1:
            return 0
        return square_of(self.weight, self.stride)

    def reach(self) -> Reach:
        return pooled(self.extent(), self.stride, self.padding)

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        # F.pad's order: last axis first, (before, after) for each. If both are equal, the
        # convolution pads, which saves a copy.
        before = list(pad[0::2])
        after = list(pad[1::2])
        if before == after and min(before) >= 0:
            return self._convolved(window, before[::-1])
        return self._convolved(F.pad(window, pad), [0] * len(before))


@rule_for(
    "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"
)
class TransposedConvolution(Kernel, Local):
    r"""Transposed convolution, whose kernel is ``(in, out / groups, ...)``.

    :math:`x_j` scatters :math:`w_{j,i}`. The adjoint is the convolution with the same kernel.
    """

    def __init__(
        self,
        weight: Tensor,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        output_padding: Sequence[int] = (0,),
        groups: int = 1,
        dilation: Sequence[int] = (1,),
    ) -> None:
        super().__init__(weight)
        self.groups = groups
        axes = weight.dim() - 2
        every = (stride, padding, output_padding, dilation)
        self.stride, self.padding, self.output_padding, self.dilation = (
            list(v) * (axes // len(v)) for v in every
        )

    bias_shape = staticmethod(Convolution.bias_shape)

    def apart(self) -> "TransposedConvolution | None":
        return self._like(self.weight, groups=self.weight.shape[0])

    def tap(self) -> "TransposedConvolution | None":
        return self._like(_unit_kernels(self.weight)[None], groups=1)

    def by_tap(self) -> Tensor:
        """The kernel as ``(in, out, taps)``; a tap is a position in the kernel's window."""
        return self.weight.flatten(2)

    def _like(self, weight: Tensor, groups: int) -> "TransposedConvolution | None":
        if self.groups > 1:
            return None
        return TransposedConvolution(
            weight, self.stride, self.padding, self.output_padding, groups, self.dilation
        )

    @property
    def in_channels(self) -> int:
        """Number of in-channels that one out-channel reads: those of its group."""
        return self.weight.shape[0] // self.groups

    def in_channel_of(self, out_channel: Tensor, j: Tensor) -> Tensor:
        group = out_channel // self.weight.shape[1]
        return group * self.in_channels + j

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        args = (self.stride, self.padding, self.dilation, True, self.output_padding, self.groups)
        return torch.ops.aten.convolution.default(tangents[0], self.weight, None, *args)

    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride))
        back = torch.ops.aten.convolution.default(
            cotangent, self.weight, None, *geometry, self.groups
        )
        # with output_padding the convolution can have a position more than the input
        return back[(..., *(slice(n) for n in shape[1:]))]

    def reach(self) -> Reach:
        """From ``(o + padding - dilation (kernel - 1)) / stride`` to ``(o + padding) / stride``."""
        sizes = self.weight.shape[2:]
        geometry = list(zip(self.stride, self.padding, self.dilation, sizes, strict=True))
        steps = [Fraction(1, s) for s, *_ in geometry]
        lows = [Fraction(p - d * (k - 1), s) for s, p, d, k in geometry]
        highs = [Fraction(p, s) for s, p, *_ in geometry]
        return steps, lows, highs

    def origin(self, first: Sequence[int]) -> list[int]:
        # input position i writes output positions from i * stride - padding on
        return [i * s - p for i, s, p in zip(first, self.stride, self.padding, strict=True)]

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        zeros = [0] * len(self.stride)
        args = (self.stride, zeros, self.dilation, True, zeros, self.groups)
        return torch.ops.aten.convolution.default(F.pad(window, pad), self.weight, None, *args)


def _unit_kernels(weight: Tensor) -> Tensor:
    """Kernels ``(taps, *sizes)``, each of them 1 at one tap and 0 elsewhere."""
    sizes = weight.shape[2:]
    return torch.eye(prod(sizes), dtype=weight.dtype, device=weight.device).unflatten(1, sizes)


def _contiguous(weight: Tensor) -> Tensor:
    is_map = weight.dim() == 4
    layout = torch.channels_last if is_map else torch.contiguous_format
    return weight.contiguous(memory_format=layout)


@rule_for("aten.linear.default")
class Linear(Kernel):
    r"""Matrix product with a kernel ``(out, in)`` over the last dimension.

    :math:`y = x W^T`; the adjoint is :math:`g W`.
    """

    @staticmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        return (*(1,) * (dims - 1), channels)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0] @ self.weight.T

    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        return cotangent @ self.weight
