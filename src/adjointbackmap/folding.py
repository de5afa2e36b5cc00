"""The equivalent network of eq. 3.6: batch norm and scalar multipliers merged into the kernels before them."""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from adjointbackmap.capture import CLONE, Capture, capture, first_input, is_getitem, module_of, op_name
from adjointbackmap.network import KERNEL_MODULES, batch_of, check_eval
from adjointbackmap.rules import RULES
from adjointbackmap.rules.kernels import Kernel

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
LINEAR = "aten.linear.default"
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
    factor = _factor(captured, node)
    if factor is None:
        return
    source = _source(captured, factor.data)
    reason = _obstacle(captured, node, factor.name, source, result)
    if reason:
        result.left[factor.name] = reason
        result.merged.pop(factor.name, None)
        return
    path = module_of(source)[0]
    if str(node.target) == BATCH_NORM:
        _merge_batch_norm(result.model, path, factor.name)
    else:
        multiplier = {**dict(result.model.named_parameters()), **dict(result.model.named_buffers())}[factor.name]
        _scale(_kernel_module(result.model, path), multiplier.detach())
        multiplier.data.fill_(1)
    result.merged[factor.name] = path


@dataclass(frozen=True)
class _Factor:
    """A batch norm or a multiplier by its name, and the node of what it multiplies."""

    name: str
    data: torch.fx.Node


def _factor(captured: Capture, node: torch.fx.Node) -> _Factor | None:
    if str(node.target) == BATCH_NORM:
        return _Factor(module_of(node)[0], first_input(node))
    if str(node.target) != PRODUCT or len(node.all_input_nodes) != 2:
        return None
    by_name = {n: captured.parameters[n.name] for n in node.all_input_nodes if _is_scalar_parameter(captured, n)}
    if len(by_name) != 1:
        return None
    return _Factor(next(iter(by_name.values())), next(n for n in node.all_input_nodes if n not in by_name))


def _is_scalar_parameter(captured: Capture, node: torch.fx.Node) -> bool:
    return node.op == "placeholder" and node.name in captured.parameters and node.meta["val"].numel() == 1


def _source(captured: Capture, node: torch.fx.Node) -> torch.fx.Node:
    """The node that made a value, through batch norms and products."""
    while True:
        factor = _factor(captured, node)
        if factor is None and not is_getitem(node):
            return node
        node = factor.data if factor else first_input(node)


def _obstacle(captured: Capture, node: torch.fx.Node, name: str, source: torch.fx.Node, result: Fold) -> str:
    """Why a factor cannot be merged into ``source``; empty if it can."""
    path = module_of(source)[0]
    module = result.model.get_submodule(path)
    if not isinstance(module, KERNEL_MODULES) or not _is_kernel_call(source):
        return f"it follows {op_name(source)}, not a convolution or linear layer of its own"
    if sum(module_of(n)[0] == path and _is_kernel_call(n) for n in captured.nodes) > 1:
        return f"{path} is used more than once"
    if sum(f is not None and f.name == name for f in (_factor(captured, n) for n in captured.nodes)) > 1:
        return "it is used more than once"
    if str(node.target) == BATCH_NORM and str(source.target) == LINEAR and source.meta["val"].dim() > 2:
        return f"it scales the positions of {path}, not its features"
    shared = [n for n, p in result.model.named_parameters(remove_duplicate=False) if p is module.weight]
    if len(shared) > 1:
        return f"the kernel of {path} is shared as {', '.join(shared)}"
    constants = [n for n in (*source.all_input_nodes, *node.all_input_nodes) if n.op == "placeholder"]
    elsewhere = [captured.parameters[n.name] for n in constants if n.name in captured.parameters and len(_users(n)) > 1]
    if elsewhere:
        return f"{', '.join(elsewhere)} is used elsewhere too"
    return _obstacle_between(captured, node, path, source, result)


def _obstacle_between(captured: Capture, node: torch.fx.Node, path: str, source: torch.fx.Node, result: Fold) -> str:
    """Why the values between a factor and the kernel cannot change; empty if they can."""
    current = node
    while current is not source:
        factor = _factor(captured, current)
        if factor is not None and factor.name in result.left:
            return f"{factor.name} before it is left"
        current = factor.data if factor else first_input(current)
        if len(_users(current)) > 1:
            return f"the output of {path} is used elsewhere too"
    return ""


def _users(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operations that use a value, without the copies that the capture keeps of every layer's output."""
    return [u for u in node.users if not (str(u.target) == CLONE and all(v.op == "output" for v in u.users))]


def _is_kernel_call(node: torch.fx.Node) -> bool:
    rule = RULES.get(str(node.target))
    return rule is not None and issubclass(rule, Kernel)


def _merge_batch_norm(model: nn.Module, path: str, name: str) -> None:
    norm = cast("nn.BatchNorm2d", model.get_submodule(name))
    module = _kernel_module(model, path)
    mean, variance = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    scale = torch.rsqrt(variance + norm.eps)
    offset = torch.zeros_like(mean)
    if norm.affine:
        scale, offset = scale * norm.weight.detach().double(), norm.bias.detach().double()
    _scale(module, scale)
    own = offset if module.bias is None else offset + module.bias.detach().double()
    bias = (own - mean * scale).to(module.weight.dtype)
    module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)
    model.set_submodule(name, nn.Identity().eval())


def _scale(module: nn.modules.conv._ConvNd | nn.Linear, scale: Tensor) -> None:
    """Multiply the kernel's out-channels, and the bias, by a factor each."""
    scale = scale.double().reshape(-1)
    weight = module.weight
    weight.data = (weight.detach().double() * _along_kernel(module, scale)).to(weight.dtype)
    if module.bias is not None:
        module.bias.data = (module.bias.detach().double() * scale).to(weight.dtype)


def _along_kernel(module: nn.modules.conv._ConvNd | nn.Linear, scale: Tensor) -> Tensor:
    """A factor for each out-channel, or one for all, where the kernel has it: a transposed one is ``(in, out / groups, ...)``."""
    axes = (1,) * (module.weight.dim() - 2)
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return scale.view(-1, 1, *axes)
    of_groups = scale.expand(module.out_channels).view(module.groups, -1)
    return of_groups.repeat_interleave(module.in_channels // module.groups, 0).view(module.in_channels, -1, *axes)


def _kernel_module(model: nn.Module, path: str) -> nn.modules.conv._ConvNd | nn.Linear:
    return cast("nn.modules.conv._ConvNd | nn.Linear", model.get_submodule(path))
