"""Triangles, diagonals, rotations and running sums along dimensions."""

from typing import Any

import torch

from adjointbackmap.rules.base import Aten, Builder, Refused, Value, by_name, keep_batch, rule_for


@rule_for("aten.rot90.default")
class Rotate(Aten):
    """Two dimensions turned by quarters."""

    op = torch.ops.aten.rot90.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        given = by_name(cls.op, args, kwargs)
        return builder.apply(
            cls(given["k"], keep_batch(given["dims"], given["self"])), given["self"]
        )


@rule_for("aten.triu.default")
class UpperTriangle(Aten):
    """The upper triangle of the last two dimensions, zeros below."""

    op = torch.ops.aten.triu.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If one of the last two dimensions is the batch.
        """
        if len(args[0].shape) < 2:
            msg = "it goes over the images of a batch"
            raise Refused(msg)
        return super().build(builder, *args, **kwargs)


@rule_for("aten.tril.default")
class LowerTriangle(UpperTriangle):
    """The lower triangle of the last two dimensions, zeros above."""

    op = torch.ops.aten.tril.default


@rule_for("aten.diagonal.default")
class Diagonal(Aten):
    """A diagonal of two dimensions, as the last one."""

    op = torch.ops.aten.diagonal.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        given = by_name(cls.op, args, kwargs)
        dims = keep_batch([given["dim1"], given["dim2"]], given["self"])
        return builder.apply(cls(given["offset"], *dims), given["self"])


@rule_for("aten.diag_embed.default")
class DiagonalEmbedding(Aten):
    """The last dimension as a diagonal of two, zeros beside it."""

    op = torch.ops.aten.diag_embed.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step; its dimensions are those of the output."""
        given = by_name(cls.op, args, kwargs)
        dims = keep_batch([given["dim1"], given["dim2"]], Value(-1, builder.shape))
        return builder.apply(cls(given["offset"], *dims), given["self"])


@rule_for("aten.cumsum.default")
class CumulativeSum(Aten):
    r"""Sums of what comes before: :math:`y_i = \sum_{j \le i} x_j`; the adjoint sums what comes after."""

    op = torch.ops.aten.cumsum.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step.

        Raises:
            Refused: If it casts.
        """
        given = by_name(cls.op, args, kwargs)
        if given["dtype"] not in (None, builder.dtype):
            msg = f"it casts to {given['dtype']}, and the network computes in {builder.dtype}"
            raise Refused(msg)
        return builder.apply(cls(*keep_batch([given["dim"]], given["self"])), given["self"])

    def positional(self) -> bool:
        """Over channels, positions stay."""
        return self.args[0] == 1
