"""What of a graph depends on the number of images, which is a symbol in it: shapes and numbers."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.capture.graph import op_name
from adjointbackmap.engine.constants import SYMBOLS

# Types of arguments that an operation computes with. Extents have other types.
NUMBERS_TAKEN = {"Tensor", "number", "Optional[number]"}

# Operations in which a number is a value, not an index or an extent.
COMPUTES_WITH_NUMBERS = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "clamp",
    "clamp_min",
    "clamp_max",
    "masked_fill",
    "where",
}


def has_batch_first(node: torch.fx.Node, images: int | torch.SymInt) -> bool:
    """Whether an operation's first output has the batch as its first dimension and nowhere else."""
    output = outputs_of(node)[0]
    if not output.dim() or output.shape[0] != images:
        return False
    return not any(isinstance(n, torch.SymInt) for n in output.shape[1:])


def has_unknown_numbers(node: torch.fx.Node, known: Container[str]) -> bool:
    """Whether an operation computes with a number that is not read from constants.

    Args:
        node: The operation.
        known: Names of the nodes whose numbers are read from constants.
    """
    if op_name(node) not in COMPUTES_WITH_NUMBERS:
        return False
    given = [a for a in node.args if isinstance(a, torch.fx.Node)]
    symbols = [a for a in given if isinstance(a.meta.get("val"), SYMBOLS)]
    return any(a.name not in known for a in symbols)


def takes_count(node: torch.fx.Node, images: int | torch.SymInt) -> bool:
    """Whether an operation computes with the number of images.

    Shapes may depend on it, but numbers may not.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    by_place = list(zip(arguments, node.args, strict=False))
    by_name = [(a, node.kwargs[a.name]) for a in arguments if a.name in node.kwargs]
    given = by_place + by_name
    taken = [v for a, v in given if isinstance(v, torch.fx.Node) and str(a.type) in NUMBERS_TAKEN]
    return any(_symbols(node.meta.get("val")) & _symbols(images) for node in taken)


def _symbols(number: Any) -> set[Any]:
    """The symbols that a number depends on; none if it is known."""
    if not isinstance(number, torch.SymInt | torch.SymFloat):
        return set()
    return number.node.expr.free_symbols


def outputs_of(node: torch.fx.Node) -> list[Tensor]:
    """The outputs of an operation, as tensors of its shapes and dtypes."""
    value = node.meta["val"]
    return list(value) if isinstance(value, tuple | list) else [value]


def without_batch(tensor: Tensor) -> tuple[int, ...]:
    """Shape without the batch; an extent that depends on the batch, which is refused, as 1."""
    return tuple(n if isinstance(n, int) else 1 for n in tensor.shape[1:])
