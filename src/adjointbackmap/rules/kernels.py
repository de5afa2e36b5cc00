"""Layers with a kernel: convolution and linear. Their bias is a part of ``b`` of its own."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import Builder, Gates, Rule, Shape, Value, tensor_of
from adjointbackmap.rules.field import Field, windowed
from adjointbackmap.rules.linear import Add


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

    def in_channel_mask(self, channels: int) -> Tensor:
        """Which of the input's channels are in-channel ``j`` of their group: ``(j, channels)``."""
        return torch.arange(channels) % self.in_channels == torch.arange(self.in_channels)[:, None]

    def in_channel_of(self, out_channel: Tensor, j: Tensor) -> Tensor:
        """The channel of the input that is in-channel ``j`` of an out-channel's group."""
        per_group = self.weight.shape[0] // self.groups
        return out_channel // per_group * self.in_channels + j


class Convolution(Kernel):
    r"""Convolution with any stride, padding, dilation and groups.

    :math:`y_i = \sum_j w_{i,j} \star x_j`; the adjoint scatters :math:`w_{i,j}` scaled by the cotangent.
    """

    ops = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")

    def __init__(
        self,
        weight: Tensor,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> None:
        super().__init__(weight)
        self.groups, axes = groups, weight.dim() - 2
        self.stride, self.padding, self.dilation = (list(v) * (axes // len(v)) for v in (stride, padding, dilation))

    @staticmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        """One number per channel, at every position."""
        return (channels, *(1,) * (dims - 1))

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Convolve."""
        if self._faster_transposed(tangents[0]):
            return self._transposed(tangents[0])
        args = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups)
        return torch.ops.aten.convolution.default(tangents[0], self.weight, None, *args)

    def _faster_transposed(self, tangents: Tensor) -> bool:
        """Whether the convolution is faster as the adjoint of one with the turned kernel: on the CPU in float64."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        inside = all(p <= r for p, r in zip(self.padding, reach, strict=True))
        plain = self.groups == 1 and set(self.stride) == {1}
        return tangents.dtype == torch.float64 and tangents.device.type == "cpu" and plain and inside

    def _transposed(self, tangents: Tensor) -> Tensor:
        axes = range(2, self.weight.dim())
        turned = Convolution(self.weight.transpose(0, 1).flip(*axes).contiguous(), dilation=self.dilation)
        turned.padding = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.weight.shape[2:], self.padding, strict=True)]
        grown = [p - q for p, q in zip(self.padding, turned.padding, strict=True)]
        shape = [n + g for n, g in zip(tangents.shape[2:], grown, strict=True)]
        return turned.adjoint((), tangents, [(self.weight.shape[0], *shape)])[0]

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """Transposed convolution; this form of it is the fastest in float64 too."""
        like = cotangent.new_empty(1).expand(len(cotangent), *shapes[0])
        args = (None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups)
        mask = [True, False, False]
        return (torch.ops.aten.convolution_backward.default(cotangent, like, self.weight, *args, mask)[0],)

    def field(self, *fields: Field) -> Field:
        """The window of the kernel."""
        extents = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        return windowed(fields[0], self.stride, [-p for p in self.padding], extents)


class Linear(Kernel):
    """Matrix product with a kernel ``(out, in)`` over the last dimension."""

    ops = ("aten.linear.default",)

    @staticmethod
    def bias_shape(channels: int, dims: int) -> Shape:
        """One number per feature, at every position."""
        return (*(1,) * (dims - 1), channels)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``x W^T``."""
        return tangents[0] @ self.weight.T

    def adjoint(self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """``g W``."""
        return (cotangent @ self.weight,)
