"""Layers with a kernel: convolution and linear. Their bias is a part of ``b`` of its own."""

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
    filled,
    rule_for,
    tensor_of,
    unfilled,
)
from adjointbackmap.rules.field import Reach
from adjointbackmap.rules.linear import Add
from adjointbackmap.rules.padding import Pad, grown
from adjointbackmap.rules.pooling import pooled


class Kernel(Rule):
    """A rule with a kernel ``(out, in, ...)``, whose in-channels the reconstruction modes tell apart."""

    def __init__(self, weight: Tensor, *args: Any) -> None:
        self.weight = weight
        self.groups = 1

    @property
    def in_channels(self) -> int:
        """In-channels that one out-channel sees: those of its group."""
        return self.weight.shape[1]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """The kernel's step, then its bias added to every position."""
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
        """Shape of the bias beside the batch, for an output of ``dims`` dimensions."""

    def infinities(self, *inputs: Signs) -> Signs:
        """Weights have either sign."""
        return inputs[0] and frozenset({-1, 1})

    @abstractmethod
    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        """The cotangent of an input of a shape."""

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """The input's cotangent."""
        return (self.back(cotangent, shapes[0]),)

    def in_channel_mask(self, channels: int) -> Tensor:
        """Which of the input's channels are in-channel ``j`` of their group: ``(j, channels)``."""
        return torch.arange(channels) % self.in_channels == torch.arange(self.in_channels)[:, None]

    def apart(self) -> "Kernel | None":
        """The same with in-channels kept apart: out-channel ``j * out + i`` reads in-channel ``j`` alone; ``None`` for groups."""
        return None

    def tap(self) -> "Kernel | None":
        """The same for one in-channel, with a unit kernel as out-channel for each weight; ``None`` for groups."""
        return None

    def by_tap(self) -> Tensor:
        """The kernel as ``(in, out, taps)``."""
        return self.weight.flatten(2).transpose(0, 1)

    def in_channel_of(self, out_channel: Tensor, j: Tensor) -> Tensor:
        """The channel of the input that is in-channel ``j`` of an out-channel's group."""
        per_group = self.weight.shape[0] // self.groups
        return out_channel // per_group * self.in_channels + j


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

    :math:`y_i = \sum_j w_{i,j} \star x_j`; the adjoint scatters :math:`w_{i,j}` scaled by the cotangent.
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
        """The kernel's step and its bias; for padding by name, the rows that only one side needs are padded before."""
        x, weight, bias, stride, padding, *rest = filled(args, 2, None, (1,), (0,))
        if isinstance(padding, str):
            before, after = (
                cls(tensor_of(weight, "kernel"), stride, (0,), *rest).same()
                if padding == "same"
                else ([0], [0])
            )
            padding = before
            if before != after:
                extra = [
                    n
                    for b, a in zip(reversed(before), reversed(after), strict=True)
                    for n in (0, a - b)
                ]
                x = builder.apply(Pad(len(x.shape) - 1, extra), x, shape=grown(x.shape, extra))
        return super().build(builder, x, weight, bias, stride, padding, *rest, **kwargs)

    def extent(self) -> list[int]:
        """How far a kernel reaches from its first position, per axis."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]

    def same(self) -> tuple[list[int], list[int]]:
        """PyTorch's padding ``"same"``: positions before and after each axis."""
        return [r // 2 for r in self.extent()], [r - r // 2 for r in self.extent()]

    @staticmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        """One number per channel, at every position."""
        return (channels, *(1,) * (dims - 1))

    def apart(self) -> "Convolution | None":
        """One group for each in-channel."""
        return self._like(
            self.by_tap().reshape(-1, 1, *self.weight.shape[2:]), self.weight.shape[1]
        )

    def tap(self) -> "Convolution | None":
        """Unit kernels."""
        return self._like(_unit_kernels(self.weight)[:, None], 1)

    def _like(self, weight: Tensor, groups: int) -> "Convolution | None":
        if self.groups > 1:
            return None
        return Convolution(_contiguous(weight), self.stride, self.padding, self.dilation, groups)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Convolve."""
        return self._convolved(tangents[0], self.padding)

    def _convolved(self, tangents: Tensor, padding: list[int]) -> Tensor:
        if self._faster_transposed(tangents, padding):
            return self._transposed(tangents, padding)
        args = (self.stride, padding, self.dilation, False, [0] * len(self.stride), self.groups)
        return torch.ops.aten.convolution.default(tangents, self.weight, None, *args)

    def _faster_transposed(self, tangents: Tensor, padding: list[int]) -> bool:
        """Whether the convolution is faster as the adjoint of one with the turned kernel: on the CPU in float64."""
        inside = all(p <= r for p, r in zip(padding, self.extent(), strict=True))
        plain = self.groups == 1 and set(self.stride) == {1}
        return (
            tangents.dtype == torch.float64 and tangents.device.type == "cpu" and plain and inside
        )

    def _transposed(self, tangents: Tensor, padding: list[int]) -> Tensor:
        axes = range(2, self.weight.dim())
        turned = Convolution(
            self.weight.transpose(0, 1).flip(*axes).contiguous(), dilation=self.dilation
        )
        turned.padding = [r - p for r, p in zip(self.extent(), padding, strict=True)]
        grown = [p - q for p, q in zip(padding, turned.padding, strict=True)]
        shape = [n + g for n, g in zip(tangents.shape[2:], grown, strict=True)]
        return turned.back(tangents, (self.weight.shape[0], *shape))

    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        """Transposed convolution; this form of it is the fastest in float64 too."""
        like = unfilled(cotangent, shape)
        args = (
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
        )
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward.default(
            cotangent, like, self.weight, *args, mask
        )[0]

    def reach(self) -> Reach:
        """The window of the kernel."""
        return pooled(self.extent(), self.stride, self.padding)

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """Convolve a part; padding that is the same on both sides is the convolution's own."""
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

    :math:`x_j` scatters :math:`w_{j,i}`; the adjoint is the convolution with the same kernel.
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
        """One group for each in-channel."""
        return self._like(self.weight, self.weight.shape[0])

    def tap(self) -> "TransposedConvolution | None":
        """Unit kernels."""
        return self._like(_unit_kernels(self.weight)[None], 1)

    def by_tap(self) -> Tensor:
        """The kernel as ``(in, out, taps)``."""
        return self.weight.flatten(2)

    def _like(self, weight: Tensor, groups: int) -> "TransposedConvolution | None":
        if self.groups > 1:
            return None
        return TransposedConvolution(
            weight, self.stride, self.padding, self.output_padding, groups, self.dilation
        )

    @property
    def in_channels(self) -> int:
        """In-channels that one out-channel sees: those of its group."""
        return self.weight.shape[0] // self.groups

    def in_channel_of(self, out_channel: Tensor, j: Tensor) -> Tensor:
        """The channel of the input that is in-channel ``j`` of an out-channel's group."""
        return out_channel // self.weight.shape[1] * self.in_channels + j

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Convolve, transposed."""
        args = (self.stride, self.padding, self.dilation, True, self.output_padding, self.groups)
        return torch.ops.aten.convolution.default(tangents[0], self.weight, None, *args)

    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        """Convolve; a last position that the convolution reaches beyond the input is left out."""
        args = (
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
        )
        back = torch.ops.aten.convolution.default(cotangent, self.weight, None, *args)
        return back[(..., *(slice(n) for n in shape[1:]))]

    def reach(self) -> Reach:
        """Position ``o`` reads from ``(o + padding - dilation (kernel - 1)) / stride`` to ``(o + padding) / stride``."""
        geometry = list(
            zip(self.stride, self.padding, self.dilation, self.weight.shape[2:], strict=True)
        )
        lows = [Fraction(p - d * (k - 1), s) for s, p, d, k in geometry]
        return (
            [Fraction(1, s) for s, *_ in geometry],
            lows,
            [Fraction(p, s) for s, p, *_ in geometry],
        )

    def origin(self, first: Sequence[int]) -> list[int]:
        """Where the first position of :meth:`valid` is, for a part that starts at ``first``."""
        return [i * s - p for i, s, p in zip(first, self.stride, self.padding, strict=True)]

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """Convolve a part, transposed."""
        zeros = [0] * len(self.stride)
        args = (self.stride, zeros, self.dilation, True, zeros, self.groups)
        return torch.ops.aten.convolution.default(F.pad(window, pad), self.weight, None, *args)


def _unit_kernels(weight: Tensor) -> Tensor:
    """One kernel for each weight of a kernel's in-channel, ``(taps, *sizes)``."""
    sizes = weight.shape[2:]
    return torch.eye(prod(sizes), dtype=weight.dtype, device=weight.device).unflatten(1, sizes)


def _contiguous(weight: Tensor) -> Tensor:
    return (
        weight.contiguous(memory_format=torch.channels_last)
        if weight.dim() == 4
        else weight.contiguous()
    )


@rule_for("aten.linear.default")
class Linear(Kernel):
    """Matrix product with a kernel ``(out, in)`` over the last dimension."""

    @staticmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        """One number per feature, at every position."""
        return (*(1,) * (dims - 1), channels)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``x W^T``."""
        return tangents[0] @ self.weight.T

    def back(self, cotangent: Tensor, shape: Shape) -> Tensor:
        """``g W``."""
        return cotangent @ self.weight
