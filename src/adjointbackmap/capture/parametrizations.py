"""Replaces weights that are computed at every call by plain parameters.

Weight norm, spectral norm and pruning compute them.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which every computed weight is a parameter with its value.

    Weight norm and pruning by a hook leave computed tensors among the attributes of a module.
    ``copy.deepcopy`` refuses these; this function copies them too.

    Args:
        model: A module in eval mode; it is not changed.

    Returns:
        The copy. Names such as ``conv.parametrizations.weight.original0`` become ``conv.weight``.
        A parametrization whose value changes at every call is kept.

    Raises:
        TypeError: If ``copy.deepcopy`` refuses the model for another reason.

    Example:
        >>> model = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5)).eval()
        >>> [name for name, _ in plain_copy(model).named_parameters()]
        ['0.bias', '0.weight']
    """
    copied = _copy(model)
    with torch.no_grad():
        for module in list(copied.modules()):
            if parametrize.is_parametrized(module):
                _remove_parametrizations(module)
            _remove_hooks(module)
    return copied


def _copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        kept = {name: t for name, t in vars(module).items() if isinstance(t, Tensor)}
        memo |= {id(t): t.detach().clone() for t in kept.values() if not t.is_leaf}
        # A tensor that a hook computes at every call needs no copy. It may not even have one, if
        # it belongs to a torch.func transform that has ended.
        computed = [_tensor_of(hook) for hook in module._forward_pre_hooks.values()]
        memo |= {id(kept[name]): torch.empty(0) for name in computed if name in kept}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        msg = (
            f"The model must be one that copy.deepcopy can copy. Got {type(error).__name__}: "
            f"{first}: remove what cannot be copied from its attributes."
        )
        raise TypeError(msg) from error


def _tensor_of(hook: object) -> str:
    """Name of the tensor that a hook of PyTorch computes; empty for any other hook."""
    if isinstance(hook, prune.BasePruningMethod):
        return hook._tensor_name
    return hook.name if isinstance(hook, WeightNorm | SpectralNorm) else ""


def _remove_parametrizations(module: nn.Module) -> None:
    """Replace parametrizations by their values.

    PyTorch's own function would change the class of the original module too.
    """
    lists = cast("nn.ModuleDict", module.parametrizations)
    values = {name: getattr(module, name) for name in lists}
    if not all(torch.equal(value, getattr(module, name)) for name, value in values.items()):
        return
    trained = {name: any(True for _ in lists[name].parameters()) for name in lists}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        own = value.detach().clone()
        if trained[name]:
            trainable = own.is_floating_point()
            module.register_parameter(name, nn.Parameter(own, requires_grad=trainable))
        else:
            module.register_buffer(name, own)


def _remove_hooks(module: nn.Module) -> None:
    """Remove the hooks that compute weights, those of pruning first.

    Weight norm may compute its weight from a pruned tensor.
    """
    hooks = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, _tensor_of(hook))
    for hook in hooks:
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
