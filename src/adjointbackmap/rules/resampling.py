"""Maps resampled: on a constant grid, or resized with an antialiasing filter."""

from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Aten,
    Builder,
    Gates,
    Refused,
    Value,
    by_name,
    rule_for,
    tensor_of,
)


@rule_for(
    "aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default"
)
class GridSample(Aten):
    """A map sampled at the points of a constant grid, which all images share."""

    def __init__(self, grid: Tensor, *args: Any) -> None:
        super().__init__(*args)
        self.grid = grid

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        given = list(by_name(torch.ops.aten.grid_sampler.default, args, kwargs).values())
        return builder.apply(cls(tensor_of(given[1], "grid"), *given[2:]), given[0])

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        grid = self.grid.expand(len(tangents[0]), *self.grid.shape[1:])
        return torch.ops.aten.grid_sampler.default(tangents[0], grid, *self.args)


@rule_for("aten.affine_grid_generator.default")
class AffineGrid(Aten):
    """The grid of an affine transformation, which is linear in its matrix."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        theta, size, aligned = args  # the size counts the batch
        return builder.apply(cls(list(size[1:]), aligned), theta)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        size, aligned = self.args
        batch = len(tangents[0])
        return torch.ops.aten.affine_grid_generator.default(tangents[0], [batch, *size], aligned)


@rule_for("aten._upsample_bilinear2d_aa.vec", "aten._upsample_bicubic2d_aa.vec")
class AntialiasedInterpolation(Aten):
    """Linear or cubic interpolation with a filter that is as wide as the step between samples."""

    def __init__(self, kind: str, size: list[int], *args: Any) -> None:
        super().__init__(size, *args)
        self.op = getattr(torch.ops.aten, kind).vec  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append the step.

        Raises:
            Refused: If it makes one column, and another number of rows. PyTorch then repeats the
                first row, and its derivative is that of the right values.
        """
        rows, columns = builder.shape[-2:]
        if columns == 1 and rows != args[0].shape[-2]:
            msg = "PyTorch repeats the first row of one column: resize rows and columns in turn"
            raise Refused(msg)
        return builder.apply(cls(builder.op, *args[1:], **kwargs), args[0])
