"""The angle between two vectors, accurate for vectors that are nearly parallel."""

import torch
from torch import Tensor

from adjointbackmap.planes.hyperplane import Hyperplanes, planes_of
from adjointbackmap.planes.planner import plan_queries
from adjointbackmap.planes.query import Query
from adjointbackmap.rules.curved import TANGENT


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


def angle_to_derivative(planes: Hyperplanes) -> Tensor:
    """Angle between the image part of each hyperplane and the derivative of its value, in degrees.

    It is zero for piecewise-affine networks and for ``curved="tangent"``. With frozen gates the
    image part is not the derivative, and the angle says how far it is from it.

    Args:
        planes: The hyperplanes.

    Returns:
        ``(N, *units)``; NaN where the hyperplane or the derivative is zero.

    Example:
        >>> from adjointbackmap import hyperplanes, trace
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval()
        >>> x = torch.rand(1, 4)
        >>> frozen = hyperplanes(trace(model, x, curved="frozen"), x, "output", "RM0")
        >>> tangent = hyperplanes(trace(model, x, curved="tangent"), x, "output", "RM0")
        >>> float(angle_to_derivative(tangent).max()) < 1e-2
        True
        >>> angle_to_derivative(frozen).shape
        torch.Size([1, 4])
    """
    network = planes.network.read_as(TANGENT)
    layer = network.layer(planes.layer)
    chosen = (layer, planes.mode, planes.own_bias, planes.units)
    query = Query(network, planes.x, *chosen, planes.scale, None, planes.memory)
    (derivative,) = planes_of([query], [plan.method for plan in plan_queries([query])])
    return angles(planes.image, derivative.image, planes.value.dim())
