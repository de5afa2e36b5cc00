"""A model in another dtype for as long as a block runs: what ``model.double()`` does, and its plain tensor attributes too."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    plain = [leaf for module in model.modules() for leaf in pytree.tree_leaves(list(attributes_of(module).values()))]
    found = [*model.parameters(), *model.buffers(), *(leaf for leaf in plain if isinstance(leaf, Tensor))]
    return list({id(t): t for t in found}.values())


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run a block with every floating tensor of a model in a dtype; what the forward sets meanwhile is put back, too.

    Args:
        model: Any module.
        dtype: A floating dtype.
    """
    casts: dict[int, tuple[Tensor, Tensor]] = {}  # a shared tensor stays shared; the original keeps its id taken

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in casts:
            made = value.detach().to(dtype)
            is_parameter = isinstance(value, nn.Parameter)
            casts[id(value)] = (value, nn.Parameter(made, requires_grad=False) if is_parameter else made)
        return casts[id(value)][1]

    holders = [h for m in model.modules() for h in (m._parameters, m._buffers, attributes_of(m))]
    owners = [o for m in model.modules() for o in (m._parameters, m._buffers, m.__dict__)]
    before = [(owner, dict(holder)) for owner, holder in zip(owners, holders, strict=True)]
    try:
        for owner, values in before:
            owner.update({name: pytree.tree_map(cast, value) for name, value in values.items()})
        yield
    finally:
        for owner, values in before:
            owner.update(values)
