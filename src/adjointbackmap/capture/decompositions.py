"""Operations that are decomposed into others before a rule sees them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

TAKEN_APART = (
    "argsort.default",
    "argsort.stable",
    "atleast_1d.Sequence",
    "atleast_2d.Sequence",
    "atleast_3d.Sequence",
    "broadcast_tensors.default",
    "column_stack.default",
    "cross.default",
    "diff.default",
    "dstack.default",
    "fliplr.default",
    "flipud.default",
    "hstack.default",
    "l1_loss.default",
    "linalg_vecdot.default",
    "pairwise_distance.default",
    "take_along_dim.default",
    "trapezoid.dx",
    "vstack.default",
)
"""Operations that PyTorch defines by other operations, all of which have rules.

PyTorch's own definition decomposes them.
"""


@cache
def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The decompositions for ``ExportedProgram.run_decompositions``."""
    known = torch.export.default_decompositions()
    wanted = []
    for name in TAKEN_APART:
        op, overload = name.split(".")
        wanted.append(getattr(getattr(torch.ops.aten, op), overload))
    return {op: known[op] for op in wanted if op in known}
