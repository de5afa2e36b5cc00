"""Nearest interpolation whose derivative is that of its forward pass.

In one and three dimensions PyTorch's own derivative (torch 2.13, CPU) goes to other positions than
those that were read, for factors such as 2.1. An index has the derivative of what it reads.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

NEAREST = ("nearest", "nearest-exact")
WRONG = (3, 5)  # dimensions of the maps, with images and channels


class NearestByIndex(TorchFunctionMode):
    """Computes ``F.interpolate`` by an index, where PyTorch's derivative may be wrong."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, or read the positions that it reads."""
        kwargs = kwargs or {}
        if func is not F.interpolate:
            return func(*args, **kwargs)
        given = dict(zip(("input", "size", "scale_factor", "mode"), args, strict=False)) | kwargs
        x: Tensor = given.pop("input")
        if given.get("mode", "nearest") not in NEAREST or x.dim() not in WRONG:
            return func(*args, **kwargs)
        places = torch.arange(prod(x.shape[2:]), dtype=torch.float64, device=x.device)
        read = F.interpolate(places.reshape(1, 1, *x.shape[2:]), **given).long()
        return x.flatten(2)[:, :, read.flatten()].unflatten(2, read.shape[2:])
