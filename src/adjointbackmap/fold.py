"""The equivalent network of eq. 3.6: batch norm and scalar multipliers merged into the kernels before them."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adjointbackmap.capture import Capture, capture, is_getitem, module_of
from adjointbackmap.trace import KERNEL_MODULES, batch_of, check_eval

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
PRODUCT = "aten.mul.Tensor"


@dataclass(frozen=True)
class Fold:
    """A folded network.

    Attributes:
        model: A deep copy of the module, with the same module names; a merged batch norm is an identity, a merged
            multiplier is 1, and the convolution has the kernel and the bias of the equivalent network.
        merged: Batch norm or multiplier -> the layer that took it.
        left: Batch norm or multiplier that could not be merged -> why.
    """

    model: nn.Module
    merged: dict[str, str]
    left: dict[str, str]


def fold(model: nn.Module, example: Tensor) -> Fold:
    r"""Merge batch norm and scalar multipliers into the convolution or linear layer that feeds them.

    :math:`w' = s w` and :math:`b' = \beta + s (b - \mu)` with :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}`
    [Wan2022, eq. 3.6]. What feeds what is read off the data flow, not off the order of the modules; a scalar
    that is added stays a scalar.

    Args:
        model: Module in eval mode; it is left as it was.
        example: A batch as for :func:`trace`.

    Returns:
        The folded copy, what was merged, and what was left and why.

    Raises:
        ValueError: If the model is in train mode or cannot be captured.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> fold(model, torch.rand(1, 3, 8, 8)).merged
        {'1': '0'}
    """
    check_eval(model, ValueError)
    captured = capture(model, batch_of(example))
    result = Fold(copy.deepcopy(model), {}, {})
    for node in captured.nodes:
        if str(node.target) in (BATCH_NORM, PRODUCT):
            _merge(captured, node, result)
    return result


def _merge(captured: Capture, node: torch.fx.Node, result: Fold) -> None:
    """Merge one batch norm or multiplier, or note why not."""
    name, data = _factor(captured, node)
    if name is None:
        return
    source = _source(captured, data)
    reason = _obstacle(captured, node, name, source, result)
    if reason:
        result.left[name] = reason
        result.merged.pop(name, None)
        return
    path = module_of(source)[0]
    if str(node.target) == BATCH_NORM:
        _merge_batch_norm(result.model, path, name)
    else:
        _scale(result.model.get_submodule(path), getattr(*_owner(result.model, name)).detach())
        getattr(*_owner(result.model, name)).data.fill_(1)
    result.merged[name] = path


def _factor(captured: Capture, node: torch.fx.Node) -> tuple[str | None, torch.fx.Node | None]:
    """Name of the batch norm or of the multiplier's parameter, and the node that it multiplies."""
    if str(node.target) == BATCH_NORM:
        return module_of(node)[0], node.args[0]
    nodes = [a for a in node.args[:2] if isinstance(a, torch.fx.Node)]
    named = [a for a in nodes if a.name in captured.parameters and a.meta["val"].numel() == 1]
    if len(nodes) != 2 or len(named) != 1:
        return None, None
    return captured.parameters[named[0].name], next(a for a in nodes if a is not named[0])


def _source(captured: Capture, node: torch.fx.Node) -> torch.fx.Node:
    """The node that made a value, through merged batch norms and products."""
    while is_getitem(node) or str(node.target) in (BATCH_NORM, PRODUCT):
        node = node.args[0] if is_getitem(node) else _factor(captured, node)[1] or node.args[0]
    return node


def _obstacle(captured: Capture, node: torch.fx.Node, name: str, source: torch.fx.Node, result: Fold) -> str:
    """Why a factor cannot be merged into ``source``; empty if it can."""
    module = result.model.get_submodule(module_of(source)[0])
    if not isinstance(module, KERNEL_MODULES) or str(source.target) not in _kernel_ops():
        return f"it follows {getattr(source.target, '_opname', source.name)}, not a convolution or linear layer of its own"
    path = module_of(source)[0]
    if sum(module_of(n)[0] == path and str(n.target) in _kernel_ops() for n in captured.nodes) > 1:
        return f"{path} is used more than once"
    if sum(_factor(captured, n)[0] == name for n in captured.nodes if str(n.target) in (BATCH_NORM, PRODUCT)) > 1:
        return "it is used more than once"
    current = node
    while current is not source:
        current = current.args[0] if is_getitem(current) else _factor(captured, current)[1]
        if len(_users(current)) > 1:
            return f"the output of {path} is used elsewhere too"
        between = _factor(captured, current)[0] if str(current.target) in (BATCH_NORM, PRODUCT) else None
        if between is not None and between in result.left:
            return f"{between} before it is left"
    shared = [n for n, p in result.model.named_parameters(remove_duplicate=False) if p is module.weight]
    return f"the kernel of {path} is shared as {', '.join(shared)}" if len(shared) > 1 else ""


def _users(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operations that use a value, without the copies that the capture keeps of every layer's output."""
    return [u for u in node.users if u.op == "call_function" and not (str(u.target) == "aten.clone.default" and not _used(u))]


def _used(clone: torch.fx.Node) -> bool:
    return any(u.op != "output" for u in clone.users)


def _kernel_ops() -> tuple[str, ...]:
    from adjointbackmap.rules.kernels import Convolution, Linear

    return (*Convolution.ops, *Linear.ops)


def _merge_batch_norm(model: nn.Module, path: str, name: str) -> None:
    norm = model.get_submodule(name)
    module = model.get_submodule(path)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps) * (1 if norm.weight is None else norm.weight.detach().double())
    _scale(module, scale)
    offset = -mean * scale + (0 if norm.bias is None else norm.bias.detach().double())
    bias = torch.zeros_like(mean) if module.bias is None else module.bias.detach().double()
    module.bias = nn.Parameter((bias + offset).to(module.weight.dtype), requires_grad=module.weight.requires_grad)
    model.set_submodule(name, nn.Identity().eval())


def _scale(module: nn.Module, scale: Tensor) -> None:
    """Multiply the kernel's out-channels, and the bias, by a factor each."""
    scale = scale.double().reshape(-1)
    weight = module.weight
    weight.data = (weight.detach().double() * scale.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)
    if module.bias is not None:
        module.bias.data = (module.bias.detach().double() * scale).to(weight.dtype)


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
