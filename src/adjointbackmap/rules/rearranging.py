"""Triangles, diagonals, rotations and running sums along dimensions."""

from typing import Any

import torch

from adjointbackmap.rules.base import Aten, Builder, Refused, Value, by_name, keep_batch, rule_for


@rule_for("aten.rot90.default")
class Rotate(Aten):
    """Rotation by quarter turns in the plane of two dimensions."""

    op = torch.ops.aten.rot90.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        given = by_name(cls.op, args, kwargs)
        dims = keep_batch(given["dims"], given["self"])
        return builder.apply(cls(given["k"], dims), given["self"])


@rule_for("aten.triu.default")
class UpperTriangle(Aten):
    """The upper triangle of the last two dimensions, with zeros below."""

    op = torch.ops.aten.triu.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If one of the last two dimensions is the batch.
        """
        if len(args[0].shape) < 2:
            msg = "it goes over the images of a batch"
            raise Refused(msg)
        return super().build(builder, *args, **kwargs)


@rule_for("aten.tril.default")
class LowerTriangle(UpperTriangle):
    """The lower triangle of the last two dimensions, with zeros above."""

    op = torch.ops.aten.tril.default


@rule_for("aten.diagonal.default")
class Diagonal(Aten):
    """A diagonal of two dimensions, as a new last dimension."""

    op = torch.ops.aten.diagonal.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        given = by_name(cls.op, args, kwargs)
        dims = keep_batch([given["dim1"], given["dim2"]], given["self"])
        return builder.apply(cls(given["offset"], *dims), given["self"])


@rule_for("aten.diag_embed.default")
class DiagonalEmbedding(Aten):
    """The last dimension as the diagonal of two new ones, with zeros elsewhere."""

    op = torch.ops.aten.diag_embed.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        # its dimensions are those of the output
        given = by_name(cls.op, args, kwargs)
        dims = keep_batch([given["dim1"], given["dim2"]], Value(-1, builder.shape))
        return builder.apply(cls(given["offset"], *dims), given["self"])


@rule_for("aten.cumsum.default")
class CumulativeSum(Aten):
    r"""Running sums: :math:`y_i = \sum_{j \le i} x_j`; the adjoint sums over :math:`j \ge i`."""

    op = torch.ops.aten.cumsum.default

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it casts to another dtype.
        """
        given = by_name(cls.op, args, kwargs)
        if given["dtype"] not in (None, builder.dtype):
            msg = f"it casts to {given['dtype']}, and the network computes in {builder.dtype}"
            raise Refused(msg)
        return builder.apply(cls(*keep_batch([given["dim"]], given["self"])), given["self"])

    def positional(self) -> bool:
        return self.args[0] == 1  # sums over channels leave positions where they are
