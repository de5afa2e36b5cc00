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

ORDERS = {1.0: Sum, inf: Largest, -inf: Smallest}
"""Order of a norm -> what is taken of the absolute values."""


@rule_for("aten.linalg_vector_norm.default")
class VectorNorm(Operation):
    """A norm of order 1 or infinity over dimensions: absolute values, then their sum or their maximum."""

    op = torch.ops.aten.linalg_vector_norm.default
    order = "ord"

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Two steps.

        Raises:
            Refused: If the order is another one, or it goes over the images of a batch.
        """
        given = by_name(cls.op, args, kwargs)
        x = given["self"]
        order = float(2 if given[cls.order] is None else given[cls.order])
        if order not in ORDERS:
            msg = f"a norm of order {order:g} is curved"
            raise Refused(msg)
        dims = keep_batch(given["dim"] or [0], x)
        sizes = builder.apply(Absolute(), x, shape=x.shape)
        return builder.apply(ORDERS[order](dims, given["keepdim"]), sizes)


@rule_for("aten.norm.ScalarOpt_dim")
class Norm(VectorNorm):
    """The same, as ``pairwise_distance`` takes it."""

    op = torch.ops.aten.norm.ScalarOpt_dim
    order = "p"
