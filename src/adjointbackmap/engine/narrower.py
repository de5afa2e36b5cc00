"""Operations that PyTorch computes in a narrower dtype than the network's, so that they round.

``0.3 * (x > 0)`` has PyTorch's default dtype, whatever the dtype of ``x``. Masks and numbers with
few bits, as in ``1 - mask``, are exact in any dtype.
"""

from typing import Any

import torch
from torch import Tensor

from adjointbackmap.capture.graph import op_name
from adjointbackmap.rules import Constant, Mask

# Numbers up to this, in steps of its inverse: their sums and products are exact in float16 too.
FEW_BITS = 2.0**10
# Operations that multiply by the inverse of a number.
INVERTED = {"div", "true_divide"}


def rounding(node: torch.fx.Node, arguments: tuple[Any, ...], dtype: torch.dtype) -> str:
    """Why an operation on data rounds more than the network does; empty if it does not.

    Args:
        node: The operation, in a graph that was captured in the network's dtype.
        arguments: The arguments of its rule.
        dtype: The network's dtype.
    """
    made = node.meta.get("val")
    own = made.dtype if isinstance(made, Tensor) else dtype
    if not own.is_floating_point or torch.finfo(own).eps <= torch.finfo(dtype).eps:
        return ""
    numbers = [_numbers(argument) for argument in arguments]
    given = torch.cat([n for n in numbers if n is not None] or [torch.zeros(0)])
    op = op_name(node)
    if op == "mean":
        given = torch.tensor([float(_averaged(node))], dtype=torch.float64)
    if op in {"mean", *INVERTED}:
        given = 1 / given
    if op == "mul" and any(isinstance(argument, Mask) for argument in arguments):
        exact = given.to(own).double() == given  # a mask is 0 or 1, so the product is exact
    else:
        exact = (given.abs() <= FEW_BITS) & ((given * FEW_BITS).frac() == 0)
    if exact.all():
        return ""
    advice = "give its mask or its numbers the dtype of x, such as mask.to(x.dtype)"
    return f"it computes in {own}, and the network in {dtype}: {advice}"


def _numbers(argument: Any) -> Tensor | None:
    """The numbers of a constant argument, in float64; ``None`` for data."""
    if isinstance(argument, Constant):
        return argument.tensor.detach().flatten().double().cpu()
    if isinstance(argument, int | float):
        return torch.tensor([float(argument)], dtype=torch.float64)
    return None


def _averaged(node: torch.fx.Node) -> int:
    """Number of elements that a mean averages."""
    whole = node.all_input_nodes[0].meta["val"].shape[1:].numel()
    return whole // max(node.meta["val"].shape[1:].numel(), 1)
