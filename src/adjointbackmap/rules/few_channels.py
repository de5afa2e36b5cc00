"""The adjoint of a convolution with few in-channels, such as the first one of a network.

A CPU computes 16 out-channels of a convolution at once, and an adjoint has the in-channels as its
out-channels. With three of them it does a fifth of what it can. So squares of neighbouring
positions become channels: the adjoint is a convolution with a larger kernel that gives all numbers
of a square at once.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules.base import Shape, channels_last

LANES = 16  # out-channels that are computed at once, in float32 on a CPU
LARGEST = 4  # most outputs' positions along an axis of a square
WORTH = 0.5  # share of the plain adjoint's work below which squares are taken
SMALLEST = 2**20  # numbers of a batch of cotangents: below, making the kernel takes longer


def square_of(weight: Tensor, stride: Sequence[int]) -> int:
    """The best size of a square, in strides; 0 if the plain adjoint is as fast.

    Args:
        weight: The kernel ``(out, in, rows, columns)``.
        stride: Its stride, the same along both axes.
    """
    channels, *sizes = weight.shape[1:]
    # products of a position, if each out-channel takes a part of a lane
    plain = prod(size / s for size, s in zip(sizes, stride, strict=True)) * _lanes(channels)
    works = {m: _work(channels, sizes, stride[0], m) for m in range(1, LARGEST + 1)}
    best = min(works, key=lambda m: works[m])
    return best if works[best] < WORTH * plain else 0


def _lanes(channels: int) -> int:
    """Lanes that some out-channels take, also those that compute nothing."""
    return -(-channels // LANES) * LANES


def _work(channels: int, sizes: Sequence[int], stride: int, square: int) -> float:
    """Products of a position, in lanes."""
    side = square * stride
    taps = prod(square + (size - 1) // stride for size in sizes)
    return taps * _lanes(channels * side**2) / side**2


def back_in_squares(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    cotangent: Tensor,
    shape: Shape,
    square: int,
) -> Tensor:
    """The cotangent of the input of a convolution, computed in squares of positions.

    Args:
        weight: The kernel ``(out, in, rows, columns)``, without groups or dilation.
        stride: Its stride.
        padding: Its padding.
        cotangent: Cotangents of the output, ``(K, out, rows, columns)``.
        shape: Shape of the input without the batch.
        square: Size of a square in strides, from :func:`square_of`.
    """
    channels = weight.shape[1]
    sides = [square * s for s in stride]
    reach = [(k - 1) // s for k, s in zip(weight.shape[2:], stride, strict=True)]
    # The input's position r is number a of square q, where r + padding + moved = side * q + a. The
    # squares begin `extra` outputs earlier, so that the last one has its whole kernel.
    extents = zip(cotangent.shape[2:], reach, strict=True)
    extra = [-(n + f) % square for n, f in extents]
    pad = [f + e for f, e in zip(reach, extra, strict=True)]
    kernel = _of_squares(weight, stride, square, reach)
    steps = [square] * 2
    out = torch.ops.aten.convolution.default(
        cotangent, kernel, None, steps, pad, [1, 1], False, [0, 0], 1
    )
    # (K, rows of a square, its columns, channels, rows of squares, their columns)
    out = out.unflatten(1, (*sides, channels))
    rows = out.permute(0, 3, 4, 1, 5, 2)
    whole = rows.flatten(4, 5).flatten(2, 3)
    starts = [p + e * s for p, e, s in zip(padding, extra, stride, strict=True)]
    (top, left) = starts
    inside = whole[:, :, top : top + shape[1], left : left + shape[2]]
    after = [n - m for n, m in zip(shape[1:], inside.shape[2:], strict=True)]
    # positions after the last one that the convolution reads have no cotangent
    return F.pad(inside, (0, after[1], 0, after[0])) if any(after) else inside


def _of_squares(weight: Tensor, stride: Sequence[int], square: int, reach: Sequence[int]) -> Tensor:
    """The kernel that gives all numbers of a square.

    Returns:
        ``(square rows * square columns * in, out, rows, columns)``.
    """
    taps = []
    for s, f, k in zip(stride, reach, weight.shape[2:], strict=True):
        # number a of a square reads output d - reach of it with tap a - s * (d - reach)
        tap = torch.arange(s * square)[:, None] - s * (torch.arange(square + f) - f)
        taps.append(torch.where((tap >= 0) & (tap < k), tap, k).to(weight.device))
    (rows, columns) = taps
    zero_after = F.pad(weight, (0, 1, 0, 1))
    # (out, in, square rows, square columns, rows, columns)
    chosen = zero_after[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    kernel = chosen.permute(2, 3, 1, 0, 4, 5).flatten(0, 2)
    layout = torch.channels_last if channels_last(weight) else torch.contiguous_format
    return kernel.contiguous(memory_format=layout)
