"""The angle between two vectors, accurate for vectors that are nearly parallel."""

import torch
from torch import Tensor


def angles(before: Tensor, after: Tensor, kept: int) -> Tensor:
    """Angle between vectors in degrees, over all dimensions after the first ``kept``.

    It is twice the arctangent of |u - v| / |u + v| for unit vectors u and v. Unlike the arccosine,
    this is accurate near 0 and 180 degrees. The result is NaN if one vector is zero.

    Example:
        >>> angles(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 1).tolist()
        [90.0]
    """
    first, second = (t.double().flatten(kept) for t in (before, after))
    first, second = (t / t.norm(dim=-1, keepdim=True) for t in (first, second))
    return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)).rad2deg()
