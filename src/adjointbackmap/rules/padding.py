"""Padding with zeros, with another number, or with numbers of the map itself."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.rules.base import Aten, Builder, Gates, Local, Refused, Shape, Value, rule_for
from adjointbackmap.rules.field import Field, Reach, windowed
from adjointbackmap.rules.linear import Add, Multiply


def grown(shape: Shape, pad: Sequence[int]) -> Shape:
    """A shape after padding, which PyTorch gives from the last dimension on."""
    # (before, after) of the last dimension, then of the one in front of it, and so on
    added = [pad[2 * i] + pad[2 * i + 1] for i in range(len(pad) // 2)]
    added += [0] * (len(shape) - len(added))
    return tuple(n + a for n, a in zip(shape, reversed(added), strict=True))


def sides(pad: Sequence[int], axes: int) -> tuple[list[int], list[int]]:
    """Number of positions added before and after each spatial axis."""
    # the padding may leave axes out, or go on to the channels
    full = [*pad, *[0] * (2 * axes)][: 2 * axes]
    return full[0::2][::-1], full[1::2][::-1]


def check_circular(shape: Shape, pad: Sequence[int]) -> None:
    """Check that no side gets more numbers than the opposite side has left.

    PyTorch reads memory that it has not yet written there.

    Raises:
        Refused: If one does.
    """
    axes = len(pad) // 2
    for size, before, after in zip(shape[-axes:], *sides(pad, axes), strict=True):
        left = size + min(before, 0) + min(after, 0)
        if max(before, after) > left:
            msg = f"it pads by {max(before, after)} numbers a side that has {left} left"
            raise Refused(msg)


@rule_for("aten.pad.default", "aten.constant_pad_nd.default")
class Pad(Aten, Local):
    """Padding with zeros or with another number, of any dimension but the batch."""

    op = torch.ops.aten.constant_pad_nd.default

    def __init__(self, axes: int, pad: Sequence[int]) -> None:
        super().__init__(list(pad))
        self.axes = axes

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step; a number other than zero is an entry of ``b`` at the new positions.

        Raises:
            Refused: If it pads the batch, or with more numbers of the opposite side than are left.
        """
        x, pad, *rest = args
        mode = next((r for r in rest if isinstance(r, str)), kwargs.get("mode", "constant"))
        number = next((r for r in rest if isinstance(r, int | float)), kwargs.get("value"))
        # the last pair belongs to the batch if there is one pair more than dimensions
        while len(pad) > 2 * len(x.shape) and not any(pad[-2:]):
            pad = pad[:-2]
        if len(pad) > 2 * len(x.shape):
            msg = "it pads the batch"
            raise Refused(msg)
        if mode == "circular":
            check_circular(x.shape, pad)
        if mode != "constant":
            return builder.apply(PADDINGS[mode](len(x.shape) - 1, pad), x)
        padded = builder.apply(cls(len(x.shape) - 1, pad), x)
        if not number:
            return padded
        frame = F.pad(torch.zeros(x.shape, dtype=builder.dtype), pad, value=1.0)
        added = builder.apply(Multiply(frame.to(builder.device)), builder.number("pad", number))
        return builder.apply(Add(), padded, added)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        # the new positions are cut off; a negative padding had cut positions, which get zeros
        return (F.pad(cotangent, [-n for n in self.args[0]]),)

    def reach(self) -> Reach | None:
        # output position o is input position o - before
        moved = [-n for n in sides(self.args[0], self.axes)[0]]
        return [1] * len(moved), moved, moved

    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        # the caller pads the positions of a part; the rest of the padding is that of channels
        return F.pad(window, [*pad, *self.args[0][2 * self.axes :]])


class Replicate(Pad):
    """Padding with the number at the border.

    Attributes:
        mode: PyTorch's name of this padding.
        beyond: Largest distance from a new position to the one that it reads, for each position
            that is added on that side.
    """

    mode = "replicate"
    beyond = 1

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return F.pad(tangents[0], self.args[0], mode=self.mode)

    adjoint = Aten.adjoint  # a new position reads one inside: the derived adjoint adds it up

    def reach(self) -> Reach | None:
        # at the border a position reads others than inside, so a part of the map is not enough
        return None

    def field(self, *fields: Field) -> Field:
        # A new position reads one inside, at most `beyond` times the padding away. A side that is
        # cut (a negative padding) gets no new positions: the others only move.
        before, after = sides(self.args[0], self.axes)
        lows = [-b - self.beyond * max(a, 0) for b, a in zip(before, after, strict=True)]
        highs = [-b + self.beyond * max(b, 0) for b in before]
        return windowed(fields[0], [1] * len(before), lows, highs)


class Reflect(Replicate):
    """Padding with the mirror image of the map at its border."""

    mode = "reflect"
    beyond = 2


class Circular(Replicate):
    """Padding with the numbers of the opposite side, whose field is the whole image."""

    mode = "circular"

    def field(self, *fields: Field) -> Field:
        return None


PADDINGS: dict[str, type[Pad]] = {"replicate": Replicate, "reflect": Reflect, "circular": Circular}
"""PyTorch's name of a padding with numbers of the map -> its rule."""
