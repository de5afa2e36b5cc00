"""All tensors of a model (parameters, buffers, plain attributes), and casts to another dtype."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MODULE_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: no parameters, buffers, submodules or hooks."""
    return {name: value for name, value in vars(module).items() if name not in MODULE_OWN}


def all_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the tensors among the plain attributes of all modules, each once.

    The tensors may be in lists, tuples and dicts.
    """
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        leaves = pytree.tree_leaves(list(plain_attributes(module).values()))
        found += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return list({id(t): t for t in found}.values())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor cast to a dtype; other tensors as they are. Parameters stay parameters."""
    if not tensor.is_floating_point():
        return tensor
    made = tensor.detach().to(dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
