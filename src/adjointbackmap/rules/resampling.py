"""Maps read at other places: sampling on a constant grid, resizing with a filter against aliases."""

from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import Aten, Builder, Gates, Value, by_name, rule_for, tensor_of


@rule_for(
    "aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default"
)
class GridSample(Aten):
    """A map read at the places of a constant grid, the same for every image."""

    def __init__(self, grid: Tensor, *args: Any) -> None:
        super().__init__(*args)
        self.grid = grid

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        given = list(by_name(torch.ops.aten.grid_sampler.default, args, kwargs).values())
        return builder.apply(cls(tensor_of(given[1], "grid"), *given[2:]), given[0])

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Read."""
        grid = self.grid.expand(len(tangents[0]), *self.grid.shape[1:])
        return torch.ops.aten.grid_sampler.default(tangents[0], grid, *self.args)


@rule_for("aten.affine_grid_generator.default")
class AffineGrid(Aten):
    """The grid of an affine transformation: linear in its matrix."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step; of the size, the batch is left out."""
        theta, size, aligned = args
        return builder.apply(cls(list(size[1:]), aligned), theta)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """Multiply the places with the matrix."""
        size, aligned = self.args
        return torch.ops.aten.affine_grid_generator.default(
            tangents[0], [len(tangents[0]), *size], aligned
        )


@rule_for("aten._upsample_bilinear2d_aa.vec", "aten._upsample_bicubic2d_aa.vec")
class AntialiasedInterpolation(Aten):
    """Linear or cubic interpolation with a filter as wide as the step, so that nothing is passed over."""

    def __init__(self, kind: str, size: list[int], *args: Any) -> None:
        super().__init__(size, *args)
        self.op = getattr(torch.ops.aten, kind).vec  # type: ignore[misc]

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """One step."""
        return builder.apply(cls(builder.op, *args[1:], **kwargs), args[0])
