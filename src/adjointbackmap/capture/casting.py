"""The tensors of a model, and what each is in another dtype: parameters, buffers and plain attributes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MODULE_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: no parameters, buffers, submodules or hooks."""
    return {name: value for name, value in vars(module).items() if name not in MODULE_OWN}


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and every tensor that is a plain attribute of a module, also in lists, tuples and dicts."""
    plain = [
        leaf
        for module in model.modules()
        for leaf in pytree.tree_leaves(list(attributes_of(module).values()))
    ]
    found = [
        *model.parameters(),
        *model.buffers(),
        *(leaf for leaf in plain if isinstance(leaf, Tensor)),
    ]
    return list({id(t): t for t in found}.values())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in a dtype, a parameter as a parameter; any other tensor as it is."""
    if not tensor.is_floating_point():
        return tensor
    made = tensor.detach().to(dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
