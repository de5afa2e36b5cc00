"""A captured graph -> steps that are linear in the image and the bias vector, in one dtype."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from adjointbackmap.capture import Capture, ancestors, call_name, first_input, is_getitem, module_of, op_name
from adjointbackmap.rules import RULES, Axis, Constant, Entry, Field, Refused, Rule, Value
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.rules.linear import Place

IMAGE = 0  # slot of the image

# Operations that only move the elements of a tensor: an entry of b stays known through them.
MOVEMENTS = {
    "aten.alias.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.expand.default",
    "aten.flatten.using_ints",
    "aten.permute.default",
    "aten.reshape.default",
    "aten.select.int",
    "aten.slice.Tensor",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.t.default",
    "aten.transpose.int",
    "aten.unsqueeze.default",
    "aten.view.default",
}


class UnsupportedOperation(ValueError):
    """The network has operations that are not piecewise affine, or that have no rule; the message names them all."""


@dataclass(frozen=True)
class Step:
    """One rule applied to earlier values; ``shape`` is its output's without the batch."""

    rule: Rule
    inputs: tuple[Value, ...]
    output: Value
    node: str


@dataclass(frozen=True)
class KernelCall:
    """A convolution or linear call: the ATen operation, its kernel, and where its input and weighted sum are."""

    op: Any
    weight: Tensor
    rest: tuple[Any, ...]
    rule: Kernel
    input: Value
    sum: Value

    def apply(self, x: Tensor) -> Tensor:
        """The weighted sum of an input ``(N, ...)``, without bias, by PyTorch's own operation."""
        return self.op(x, self.weight, None, *self.rest)


@dataclass
class Program:
    """The steps of a network, its entries of the bias vector, and where each node's value is.

    ``kernels`` holds the convolution and linear calls by the node that made them.
    """

    image: Value
    steps: list[Step] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    kernels: dict[str, KernelCall] = field(default_factory=dict)

    def upstream(self, targets: Iterable[Value]) -> list[Step]:
        """The steps that the targets depend on, in order."""
        needed = {t.slot for t in targets}
        kept = []
        for step in reversed(self.steps):
            if step.output.slot in needed:
                needed.update(i.slot for i in step.inputs)
                kept.append(step)
        return kept[::-1]

    def fields(self) -> dict[int, Field]:
        """Receptive field of every value."""
        spatial = max(len(self.image.shape) - 1, 0)
        fields: dict[int, Field] = {e.slot: () for e in self.entries}
        fields[IMAGE] = (Axis(),) * spatial if spatial else None
        for step in self.steps:
            fields[step.output.slot] = step.rule.field(*(fields[i.slot] for i in step.inputs))
        return fields


def lower(capture: Capture, target: torch.fx.Node, tensors: dict[str, Tensor], dtype: torch.dtype) -> Program:
    """Turn the part of a graph that ``target`` depends on into steps.

    Args:
        capture: The captured graph.
        target: Node that ends the network.
        tensors: Parameters and buffers by the model's names.
        dtype: Floating dtype of the steps.

    Raises:
        UnsupportedOperation: Naming every operation without a rule, with its module path.
    """
    return _Lowering(capture, tensors, dtype).run(ancestors(target))


class _Lowering:
    """Walks the graph once; the rules' ``build`` methods call back :meth:`apply`, :meth:`offset`, :meth:`place`."""

    def __init__(self, capture: Capture, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.capture, self.tensors, self.dtype = capture, tensors, dtype
        self.program = Program(Value(IMAGE, tuple(capture.image.meta["val"].shape[1:])))
        self.constants: dict[str, Constant] = {}
        self.known: dict[str, Value] = {}
        self.names: dict[str, int] = {}
        self.slots = IMAGE
        self.node: torch.fx.Node = capture.image
        self.refused: list[str] = []

    def run(self, wanted: set[torch.fx.Node]) -> Program:
        for node in self.capture.nodes:
            if node in wanted:
                self._visit(node)
        if self.refused:
            msg = (
                f"Every operation must be piecewise affine and have a rule. Got {', '.join(self.refused)}: "
                "replace them, or cut the graph before them with until=."
            )
            raise UnsupportedOperation(msg)
        return self.program

    # what a rule may ask (see rules.base.Builder)

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape_of(self.node)

    @property
    def path(self) -> str:
        return module_of(self.node)[0]

    def apply(self, rule: Rule, *inputs: Value, shape: tuple[int, ...] | None = None) -> Value:
        self.slots += 1
        output = Value(self.slots, self.shape if shape is None else shape)
        self.program.steps.append(Step(rule, inputs, output, self.node.name))
        if isinstance(rule, Kernel):
            self._keep_kernel(rule, inputs[0], output)
        return output

    def offset(self, key: str, value: Tensor, shape: tuple[int, ...], parameter: str | None) -> Value:
        entry = self._entry(key, value, parameter)
        index = torch.arange(value.numel(), device=value.device).reshape(shape)
        return self.apply(Place(index, value.numel()), entry, shape=shape)

    def number(self, name: str, value: float) -> Value:
        tensor = torch.tensor(float(value), dtype=self.dtype, device=self._device())
        return self.offset(self._own_name(name), tensor, (1,) * len(self.shape), None)

    def place(self, constant: Any, shape: tuple[int, ...]) -> Value | None:
        if not isinstance(constant, Constant):
            return self.number(op_name(self.node), constant) if constant else None
        if not constant.is_parameter and not constant.tensor.any():
            return None
        entry = self._entry(constant.source, constant.base, constant.source if constant.is_parameter else None)
        index = constant.index.reshape(shape)
        return self.apply(Place(index, constant.base.numel()), entry, shape=shape)

    # the walk

    def _visit(self, node: torch.fx.Node) -> None:
        self.node = node
        if node is self.capture.image:
            self.program.values[node.name] = self.program.image
        elif node.op == "placeholder" or node.op == "get_attr":
            self._constant_input(node)
        elif isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            return
        elif any(n.name in self.program.values for n in node.all_input_nodes):
            self._operation(node)
        else:
            self._fold_constant(node)

    def _constant_input(self, node: torch.fx.Node) -> None:
        name = self.capture.parameters.get(node.name)
        tensor = self.tensors[name] if name is not None else self.capture.tensors[node.name]
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        self.constants[node.name] = _source(tensor, name or node.name, name is not None)

    def _fold_constant(self, node: torch.fx.Node) -> None:
        """Compute an operation on constants; a movement keeps track of the entry's elements."""
        op = cast("Callable[..., Any]", node.target)
        args = torch.fx.map_arg(node.args, lambda n: self.constants[n.name].tensor)
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: self.constants[n.name].tensor)
        tensor = op(*args, **kwargs)
        if str(node.target) in MOVEMENTS:
            first = self.constants[first_input(node).name]
            index = op(first.index, *args[1:], **kwargs)
            moved = Constant(tensor, first.source, first.base, index, first.is_parameter)
            self.constants[node.name] = moved
        elif isinstance(tensor, Tensor):
            path, call = module_of(node)
            name = ".".join(p for p in (call_name(path, call), node.name) if p)
            self.constants[node.name] = _source(tensor, name, False)
        else:
            self.refused.append(self._described(node, "it gives several constants"))

    def _operation(self, node: torch.fx.Node) -> None:
        if is_getitem(node):
            if node.args[1] == 0:
                self.program.values[node.name] = self.program.values[first_input(node).name]
            else:
                self.refused.append(self._described(node, "only the first of its outputs has a rule"))
            return
        try:
            self.program.values[node.name] = self._build(node)
        except Refused as reason:
            self.refused.append(self._described(node, str(reason)))
            self.program.values[node.name] = Value(-1, self.shape)

    def _build(self, node: torch.fx.Node) -> Value:
        rule = RULES.get(str(node.target))
        if rule is None:
            raise Refused
        value = node.meta["val"]
        first = value[0] if isinstance(value, tuple | list) else value
        batch = self.capture.image.meta["val"].shape[0]
        if not first.dim() or first.shape[0] != batch or any(isinstance(s, torch.SymInt) for s in first.shape[1:]):
            msg = "it moves the batch out of the first dimension"
            raise Refused(msg)
        convert = self._argument
        return rule.build(self, *torch.fx.map_arg(node.args, convert), **torch.fx.map_arg(node.kwargs, convert))

    def _argument(self, node: torch.fx.Node) -> Any:
        return self.program.values.get(node.name) or self.constants.get(node.name) or node.meta.get("val")

    def _keep_kernel(self, rule: Kernel, x: Value, output: Value) -> None:
        node = self.node
        call = KernelCall(node.target, rule.weight, tuple(node.args[3:]), rule, x, output)
        self.program.kernels[node.name] = call

    def _entry(self, key: str, value: Tensor, parameter: str | None) -> Value:
        if key not in self.known:
            self.slots += 1
            self.known[key] = Value(self.slots, tuple(value.shape))
            self.program.entries.append(Entry(key, value, self.slots, parameter))
        return self.known[key]

    def _own_name(self, name: str) -> str:
        path, call = module_of(self.node)
        stem = ".".join(p for p in (call_name(path, call), name) if p)
        self.names[stem] = self.names.get(stem, -1) + 1
        return f"{stem}#{self.names[stem]}" if self.names[stem] else stem

    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device if self.tensors else torch.device("cpu")

    def _described(self, node: torch.fx.Node, reason: str) -> str:
        path = module_of(node)[0]
        where = f" at {path}" if path else ""
        return f"{op_name(node)}{where}" + (f" ({reason})" if reason else "")


def _source(tensor: Tensor, name: str, is_parameter: bool) -> Constant:
    index = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
    return Constant(tensor, name, tensor, index, is_parameter)


def _shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    """Shape of an operation's first output without the batch; an extent that hangs on the batch, which is refused, as 1."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    return tuple(n if isinstance(n, int) else 1 for n in first.shape[1:])
