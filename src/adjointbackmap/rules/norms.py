"""Norms that are piecewise linear: the sum and the maximum of absolute values."""

from math import inf
from typing import Any

import torch

from adjointbackmap.rules.base import (
    Builder,
    Operation,
    Refused,
    Value,
    by_name,
    keep_batch,
    rule_for,
)
from adjointbackmap.rules.piecewise import Absolute
from adjointbackmap.rules.pooling import Largest, Smallest, Sum

REDUCTIONS = {1.0: Sum, inf: Largest, -inf: Smallest}
"""Order of a norm -> the reduction of the absolute values."""


@rule_for("aten.linalg_vector_norm.default")
class VectorNorm(Operation):
    """A norm of order 1 or infinity over dimensions.

    It is the sum of the absolute values, or their maximum or minimum.

    Attributes:
        order: PyTorch's name of the argument with the order.
    """

    op = torch.ops.aten.linalg_vector_norm.default
    order = "ord"

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append two steps: the absolute values and their reduction.

        Raises:
            Refused: If it has another order, or goes over the images of a batch.
        """
        given = by_name(cls.op, args, kwargs)
        x = given["self"]
        order = float(2 if given[cls.order] is None else given[cls.order])
        if order not in REDUCTIONS:
            msg = f"a norm of order {order:g} is curved"
            raise Refused(msg)
        dims = keep_batch(given["dim"] or [0], x)
        sizes = builder.apply(Absolute(), x, shape=x.shape)
        return builder.apply(REDUCTIONS[order](dims, given["keepdim"]), sizes)


@rule_for("aten.norm.ScalarOpt_dim")
class Norm(VectorNorm):
    """The norm that ``torch.nn.functional.pairwise_distance`` calls."""

    op = torch.ops.aten.norm.ScalarOpt_dim
    order = "p"
