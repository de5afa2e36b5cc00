"""The equivalent network of eq. 3.6: batch norm and multipliers merged into kernels."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adjointbackmap.capture.graph import (
    CLONE,
    Capture,
    call_name,
    capture,
    explained,
    first_input,
    is_getitem,
    listening,
    module_of,
    named,
    op_name,
    source_of,
)
from adjointbackmap.capture.model_check import batch_of
from adjointbackmap.capture.parametrizations import plain_copy
from adjointbackmap.capture.precision import exact
from adjointbackmap.display import ShownFields
from adjointbackmap.engine.auditing import AUDIT_TOLERANCE
from adjointbackmap.engine.layers import KERNEL_MODULES
from adjointbackmap.engine.network import check_eval
from adjointbackmap.rules import RULES
from adjointbackmap.rules.kernels import Kernel

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
LINEAR = "aten.linear.default"
MULTIPLICATION = "aten.mul.Tensor"
# If the output cancels, differences may be this many roundings of the largest value on the way.
ROUNDINGS_LEFT = 100

KernelModule = nn.modules.conv._ConvNd | nn.Linear


@dataclass(frozen=True, repr=False)
class Fold(ShownFields):
    """A folded network.

    Attributes:
        model: A deep copy of the module, with the same module names. A merged batch norm is an
            identity, a merged multiplier is 1, and the convolution has the kernel and the bias of
            the equivalent network. Weights that a parametrization or pruning computes are plain
            parameters.
        merged: Batch norm or multiplier -> the layer that it was merged into.
        left: Batch norm or multiplier that could not be merged -> the reason.
    """

    model: nn.Module
    merged: dict[str, str]
    left: dict[str, str]


def fold(model: nn.Module, example: Tensor) -> Fold:
    r"""Merge batch norm and scalar multipliers into the kernels before them.

    :math:`w' = s w` and :math:`b' = \beta + s (b - \mu)` with
    :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` [Wan2022, eq. 3.6]. A factor is merged only if
    the captured graph shows a plain batch norm or multiplier on a layer's own kernel. Others are
    left, with a reason. A scalar that is added stays a scalar. Before it is returned, the folded
    model is compared with the model on the example and on a random input.

    Args:
        model: Module in eval mode; it is not changed.
        example: A batch as for :func:`trace`.

    Returns:
        The folded copy, what was merged, and what was left and why.

    Raises:
        ValueError: If the model is in train mode or cannot be captured.
        TypeError: If the model cannot be copied.
        RuntimeError: If the folded model gives other outputs than the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> fold(model, torch.rand(1, 3, 8, 8)).merged
        {'1': '0'}
    """
    check_eval(model, ValueError)
    batch = batch_of(example)
    copied = plain_copy(model)
    lent = _lend_biases(copied)
    result = Fold(copied, {}, {})
    folding = _Folding(capture(copied, batch), result)
    for factor in folding.factors.values():
        folding.fold(factor)
    for module in lent - folding.given:
        module.bias = None
    if batch.device.type != "meta":
        _check_same(model, result, batch)
    return result


def _lend_biases(model: nn.Module) -> set[KernelModule]:
    """Give every kernel without a bias a bias of zeros.

    The graph then shows whether the forward would add it. Returns the modules that got one.
    """
    lent: set[KernelModule] = set()
    for module in model.modules():
        if not isinstance(module, KERNEL_MODULES) or module.bias is not None:
            continue
        if isinstance(module.weight, Tensor):
            zeros = module.weight.new_zeros(_out_channels(module))
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
            lent.add(module)
    return lent


@dataclass(frozen=True)
class _Factor:
    """A batch norm or a multiplier.

    Attributes:
        name: Name of the batch norm's module, or of the multiplier's parameter.
        node: The operation.
        data: The value that it multiplies.
    """

    name: str
    node: torch.fx.Node
    data: torch.fx.Node

    @property
    def is_norm(self) -> bool:
        return str(self.node.target) == BATCH_NORM


class _Folding:
    """Merges the factors of a graph one by one, and notes the results."""

    def __init__(self, captured: Capture, result: Fold) -> None:
        self.captured = captured
        self.result = result
        self.model = result.model
        parameters = self.model.named_parameters(remove_duplicate=False)
        buffers = self.model.named_buffers(remove_duplicate=False)
        self.tensors: dict[str, Tensor] = {**dict(parameters), **dict(buffers)}
        self.given: set[KernelModule] = set()  # kernels whose bias is used now
        outputs = {id(leaf) for leaf in pytree.tree_leaves(captured.outputs)}
        # the capture copies the output of every layer; such a copy is no use of a value
        self.copies = {node for node in captured.layers.values() if id(node) not in outputs}
        self.uses: dict[str, list[torch.fx.Node]] = defaultdict(list)  # by a parameter's first name
        for node in captured.nodes:
            if node.name in captured.parameters:
                self.uses[captured.parameters[node.name]] += self._users(node)
        self.factors = {factor.node: factor for factor in self._factors()}
        self.calls = Counter(factor.name for factor in self.factors.values())

    def _factors(self) -> Iterator[_Factor]:
        functions: Counter[str] = Counter()
        for node in self.captured.nodes:
            path = module_of(node)[0]
            if str(node.target) == BATCH_NORM:
                name = path
                if not isinstance(self.model.get_submodule(path), nn.modules.batchnorm._BatchNorm):
                    stem = f"{path}.batch_norm" if path else "batch_norm"
                    name = call_name(stem, functions[stem])
                    functions[stem] += 1
                yield _Factor(name, node, first_input(node))
            elif str(node.target) == MULTIPLICATION and len(node.all_input_nodes) == 2:
                scalars = [n for n in node.all_input_nodes if self._is_scalar(n)]
                if len(scalars) == 1:
                    data = next(n for n in node.all_input_nodes if n is not scalars[0])
                    yield _Factor(self.captured.parameters[scalars[0].name], node, data)

    def _is_scalar(self, node: torch.fx.Node) -> bool:
        return node.name in self.captured.parameters and node.meta["val"].numel() == 1

    def _tensor(self, node: object) -> Tensor | None:
        """The parameter or buffer of a node; ``None`` for other nodes."""
        name = self.captured.parameters.get(getattr(node, "name", ""))
        return None if name is None else self.tensors.get(name)

    def _users(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """The operations that use a value, without the capture's copies of every layer's output."""
        return [user for user in node.users if user not in self.copies]

    def _before(self, node: torch.fx.Node) -> torch.fx.Node:
        """The value that a factor multiplies, or the first argument of another operation."""
        return self.factors[node].data if node in self.factors else first_input(node)

    def source(self, node: torch.fx.Node) -> torch.fx.Node:
        """The node that a value starts from, before batch norms, products and copies."""
        while node in self.factors or is_getitem(node) or str(node.target) == CLONE:
            node = self._before(node)
        return node

    def fold(self, factor: _Factor) -> None:
        """Merge one factor, or note why it is left."""
        source = self.source(factor.data)
        reason = (
            self.of_kernel(source)
            or (self.of_norm(factor, source) if factor.is_norm else self.of_multiplier(factor))
            or self.of_uses(factor, source)
            or self.of_values_between(factor, source)
        )
        if reason:
            self.result.left[factor.name] = reason
            return
        path = module_of(source)[0]
        module = cast("KernelModule", self.model.get_submodule(path))
        if factor.is_norm:
            self._merge_norm(module, factor)
        else:
            multiplier = self.tensors[factor.name]
            _scale(module, multiplier.detach())
            # not in place, because its memory may be a part of another tensor
            multiplier.data = torch.ones_like(multiplier)
        self.result.merged[factor.name] = path

    # Each of these methods gives the reason why a factor cannot be merged; empty if it can.

    def of_kernel(self, source: torch.fx.Node) -> str:
        """The kernel must be the module's own parameter, and the module called once."""
        path = module_of(source)[0]
        module = self.model.get_submodule(path)
        if not isinstance(module, KERNEL_MODULES) or not _is_kernel_call(source):
            made_by = self._described(source)
            return f"it follows {made_by}, not a convolution or linear layer of its own"
        weight, bias, *_ = (*source.args[1:], None)
        calls = [n for n in self.captured.nodes if _is_kernel_call(n) and module_of(n)[0] == path]
        parameters = ((p, t) for p, m in self.model.named_modules() for t in m.parameters(False))
        names = [f"{p}.weight" for p, t in parameters if t is module.weight]
        computed = f"the kernel of {path} is computed in its forward, and is not {path}.weight"
        unread = f"the forward of {path} does not read {path}.bias, which would take the offset"
        return _first(
            (len(calls) > 1, f"{path} is used more than once"),
            (self._tensor(weight) is not module.weight, computed),
            (self._tensor(bias) is not module.bias, unread),
            (len(names) > 1, f"the kernel of {path} is shared as {', '.join(names)}"),
        )

    def of_norm(self, factor: _Factor, source: torch.fx.Node) -> str:
        """The module must compute a batch norm over features, from constants, and nothing else."""
        path = module_of(factor.node)[0]
        module = self.model.get_submodule(path)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        constants = [self._tensor(n) for n in factor.node.args[1:5] if n is not None]
        is_known = all(t is not None for t in constants)
        by_position = str(source.target) == LINEAR and source.meta["val"].dim() > 2
        positions = f"it scales the positions of {module_of(source)[0]}, not its features"
        return _first(
            (factor.name != path, "it is a function call, not a module of its own"),
            (self.calls[factor.name] > 1, "it is used more than once"),
            (bool(hooks), "a hook is registered on it, which an identity would lose"),
            (not self._is_plain(path), "its module computes more than batch norm"),
            (not is_known, "its statistics or its scale are computed in the forward"),
            (by_position, positions),
        )

    def _is_plain(self, path: str) -> bool:
        """Whether a module computes one batch norm, returns it, and computes nothing else."""
        inside = [n for n in self.captured.nodes if f"{module_of(n)[0]}.".startswith(f"{path}.")]
        norm = [n for n in inside if str(n.target) == BATCH_NORM or is_getitem(n)]
        others = set(inside) - set(norm) - self.copies
        end = source_of(self.captured.layers[path]) if path in self.captured.layers else None
        return not others and end in norm

    def of_multiplier(self, factor: _Factor) -> str:
        """The multiplier must be a real number that is used once."""
        return _first(
            (self.calls[factor.name] > 1, "it is used more than once"),
            (self.tensors[factor.name].is_complex(), "it is a complex number"),
        )

    def of_uses(self, factor: _Factor, source: torch.fx.Node) -> str:
        """Nothing else may read the parameters that would change."""
        inputs = (*source.all_input_nodes, *factor.node.all_input_nodes)
        names = [self.captured.parameters[n.name] for n in inputs if self._tensor(n) is not None]
        read = self.captured.read
        elsewhere = [name for name in names if len(self.uses[name]) > 1 or name in read]
        return f"{', '.join(elsewhere)} is used elsewhere too" if elsewhere else ""

    def of_values_between(self, factor: _Factor, source: torch.fx.Node) -> str:
        """Nothing else may read the values between kernel and factor, which would change."""
        current = factor.node
        while current is not source:
            before = self.factors.get(current)
            if before is not None and before.name in self.result.left:
                return f"{before.name} before it is left"
            current = self._before(current)
            if len(self._users(current)) > 1:
                return f"the output of {module_of(source)[0]} is used elsewhere too"
        return ""

    def _described(self, node: torch.fx.Node) -> str:
        if node is self.captured.image:
            return "the image"
        if node.op == "placeholder":
            return self.captured.parameters.get(node.name, "a constant")
        return op_name(node)

    # merging

    def _merge_norm(self, module: KernelModule, factor: _Factor) -> None:
        """Merge a batch norm into kernel and bias, and replace it by an identity."""
        gamma, beta, mean, variance = (self._tensor(n) for n in factor.node.args[1:5])
        # the last argument of the operation is epsilon
        scale = torch.rsqrt(_double(variance, 1.0) + cast("float", factor.node.args[6]))
        scale = scale * _double(gamma, 1.0)
        _scale(module, scale)
        bias = cast("Tensor", module.bias)
        offset = _double(beta, 0.0) - _double(mean, 0.0) * scale
        bias.data = (bias.detach().double() + offset).to(bias.dtype)
        self.given.add(module)
        norm = self.model.get_submodule(factor.name)
        identity = nn.Identity().eval()
        for name, child in norm.named_children():
            identity.add_module(name, child)
        for path, one in list(self.model.named_modules(remove_duplicate=False)):
            if one is norm:
                self.model.set_submodule(path, identity)


def _double(tensor: Tensor | None, default: float) -> Tensor:
    """A parameter in double precision, or the default if there is none."""
    if tensor is None:
        return torch.tensor(default, dtype=torch.float64)
    return tensor.detach().double()


def _first(*cases: tuple[bool, str]) -> str:
    """The reason of the first case that is true; empty if none is."""
    return next((reason for holds, reason in cases if holds), "")


def _is_kernel_call(node: torch.fx.Node) -> bool:
    rule = RULES.get(str(node.target))
    return rule is not None and issubclass(rule, Kernel)


def _out_channels(module: KernelModule) -> int:
    """Number of out-channels, from the kernel."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # (in, out / groups, ...)
        return module.weight.shape[1] * module.groups
    return module.weight.shape[0]


def _scale(module: KernelModule, scale: Tensor) -> None:
    """Multiply the kernel's out-channels, and the bias, by one factor each."""
    scale = scale.double().reshape(-1)
    weight = module.weight
    bias = cast("Tensor", module.bias)
    weight.data = (weight.detach().double() * _along_kernel(module, scale)).to(weight.dtype)
    bias.data = (bias.detach().double() * scale).to(bias.dtype)


def _along_kernel(module: KernelModule, scale: Tensor) -> Tensor:
    """Factors of the out-channels (one each, or one for all), shaped to multiply the kernel."""
    axes = (1,) * (module.weight.dim() - 2)
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return scale.view(-1, 1, *axes)
    # a transposed kernel is (in, out / groups, ...): all in-channels of a group have the same row
    of_groups = scale.expand(_out_channels(module)).view(module.groups, -1)
    channels = module.weight.shape[0]
    return of_groups.repeat_interleave(channels // module.groups, 0).view(channels, -1, *axes)


# the folded model against the model


def _check_same(model: nn.Module, result: Fold, batch: Tensor) -> None:
    """Compare the outputs on the example and on one random input.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.shape[1:], generator=generator, dtype=torch.float64)
    images = torch.cat([batch, noise.to(batch)[None]])
    largest = [_largest(images)]

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        largest.append(_largest(output))

    with exact(batch.device):
        with listening(model, keep):
            theirs = _real_tensors(model(images.clone()))
        ours = _outputs(result, images.clone())
    eps = torch.finfo(batch.dtype).eps
    tolerance = AUDIT_TOLERANCE.get(batch.dtype, eps**0.5)
    for i, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        difference = _largest_difference(mine, expected)
        scale = _largest(expected)
        if not difference <= tolerance * scale + ROUNDINGS_LEFT * eps * max(largest):
            merged = ", ".join(f"{name} into {path}" for name, path in result.merged.items())
            msg = (
                f"The folded model must repeat the model to {tolerance:.0e} of its output. "
                f"Got a difference of {difference:.2e} where output {i} reaches {scale:.2e}, with "
                f"{merged or 'nothing'} merged: the forward computes what the captured graph does "
                "not show, or jumps at a value that rounding moves; give another example, or fold "
                "the model in float64."
            )
            raise RuntimeError(msg)


def _outputs(result: Fold, images: Tensor) -> list[Tensor]:
    """The tensors that the folded model returns.

    Raises:
        RuntimeError: If the folded model raises an error.
    """
    try:
        return _real_tensors(result.model(images))
    except Exception as error:
        merged = ", ".join(result.merged)
        msg = (
            f"The folded model must run on the example. Got {explained(error).removesuffix('.')}, "
            f"with {merged or 'nothing'} merged: write a forward that only calls the batch norm, "
            "and reads nothing of it."
        )
        raise RuntimeError(msg) from error


def _real_tensors(result: Any) -> list[Tensor]:
    """All tensors that a model returns, as real numbers in double precision."""
    leaves: Iterable[Any] = pytree.tree_leaves(list(named(result).values()))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [(torch.view_as_real(t) if t.is_complex() else t).double() for t in tensors]


def _largest(value: object) -> float:
    """The largest finite absolute number of a tensor; 0 for anything else."""
    if not isinstance(value, Tensor) or not value.numel() or not value.is_floating_point():
        return 0.0
    return float(value.detach().nan_to_num(0, 0, 0).abs().max())


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; equal infinities, and NaN at the same place, make none."""
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    gaps = (ours - theirs).abs().masked_fill(same, 0).nan_to_num(float("inf"))
    return float(gaps.max()) if gaps.numel() else 0.0
