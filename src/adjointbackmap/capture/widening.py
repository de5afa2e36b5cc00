"""A forward in a wider dtype than the model's, in which its own casts do not round.

Language models cast norms and softmaxes to float32. If such a model computes in float64, these
casts would round. They become casts to float64.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CASTS = {torch.float32: "float", torch.float64: "double"}
"""Dtype -> the method of a tensor that casts to it."""


class Widened(TorchFunctionMode):
    """Replaces a dtype by a wider one wherever the forward names it.

    Args:
        narrow: The model's own dtype.
        wide: The dtype in which it computes.
    """

    def __init__(self, narrow: torch.dtype, wide: torch.dtype) -> None:
        super().__init__()
        self.narrow = narrow
        self.wide = wide

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.dtype, lambda d: self.wide if d == self.narrow else d, (args, kwargs or {})
        )
        name = CASTS.get(self.narrow)
        if name is not None and func is getattr(torch.Tensor, name):
            return args[0].to(self.wide)
        return func(*args, **kwargs)


def widened(narrow: torch.dtype, wide: torch.dtype) -> AbstractContextManager[Any]:
    """A mode for the forward of a model; nothing where the dtype is not wider than its own."""
    is_wider = torch.finfo(wide).bits > torch.finfo(narrow).bits
    return Widened(narrow, wide) if is_wider else nullcontext()
