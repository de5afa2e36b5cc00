"""A module and an example -> the graph of ATen operations that ``torch.export`` sees, with every layer's output."""

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLONE = "aten.clone.default"
ROOT = "model"  # name of the user's module inside the one that is exported


@dataclass(frozen=True)
class Capture:
    """The graph of a module in the order of execution.

    Attributes:
        nodes: Every node but the output.
        image: The node of the image.
        output: The node of the module's output.
        layers: Name of a module's call -> the node of what it returned.
        parameters: Name of a node -> the module's name for the parameter or buffer that it stands for.
        tensors: Name of a node -> tensor that the graph holds itself.
    """

    nodes: tuple[torch.fx.Node, ...]
    image: torch.fx.Node
    output: torch.fx.Node
    layers: dict[str, torch.fx.Node]
    parameters: dict[str, str]
    tensors: dict[str, Tensor]


def call_name(path: str, call: int) -> str:
    """Name of a module's call: the module's own, then ``:1`` for its second call and so on."""
    return f"{path}:{call}" if call else path


@contextmanager
def listening(model: nn.Module, hook: Callable[[str, nn.Module, tuple, object], None]) -> Iterator[None]:
    """Call ``hook(name, module, inputs, output)`` after every call of a submodule; nothing stays behind."""
    calls: dict[str, int] = {}
    handles = []

    def listen(path: str) -> Callable:
        def after(module: nn.Module, inputs: tuple, output: object) -> None:
            calls[path] = calls.get(path, -1) + 1
            hook(call_name(path, calls[path]), module, inputs, output)

        return after

    try:
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_hook(listen(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Listened(nn.Module):
    """Returns the module's output and what every submodule returned, so that the graph names them exactly."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[object, dict[str, Tensor]]:
        outputs: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.clone()  # a later operation in place does not reach it

        with listening(self.model, keep):
            return self.model(x), outputs


def capture(model: nn.Module, example: Tensor) -> Capture:
    """Capture a module in eval mode with a batch of any size.

    Args:
        model: The module; it is left as it was.
        example: A batch of at least two inputs.

    Raises:
        ValueError: If ``torch.export`` cannot follow the module, or it does not return one tensor.
    """
    wrapper = _Listened(model).train(model.training)
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own code
            exported = torch.export.export(wrapper, (example,), dynamic_shapes=shapes, strict=False).run_decompositions({})
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        msg = f"The model must be a graph that torch.export can capture for any batch size. Got {type(error).__name__}: {reason}"
        raise ValueError(msg) from error
    return _read(exported)


def _read(exported: torch.export.ExportedProgram) -> Capture:
    *nodes, last = exported.graph.nodes
    spec = exported.call_spec.out_spec
    first, named = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    outputs = last.args[0]
    if not first.is_leaf() or not isinstance(outputs[0], torch.fx.Node):
        kind = first.type.__name__
        msg = f"The model must return one tensor. Got {first.num_leaves} in a {kind}: wrap it in a module that returns one."
        raise ValueError(msg)
    signature = exported.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**exported.constants, **{n: exported.state_dict[t] for n, t in parameters.items() if t in exported.state_dict}}
    lifted = {name: constants[target] for name, target in signature.inputs_to_lifted_tensor_constants.items()}
    image = next(n for n in nodes if n.name == signature.user_inputs[0])
    return Capture(
        nodes=tuple(nodes),
        image=image,
        output=outputs[0],
        layers=dict(zip(named.context, outputs[1:], strict=True)),
        parameters={name: target.removeprefix(f"{ROOT}.") for name, target in parameters.items()},
        tensors=lifted,
    )


def module_of(node: torch.fx.Node) -> tuple[str, int]:
    """The path of the innermost module that made a node, without the wrapper's prefix, and which of its calls."""
    stack = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if path.startswith(ROOT)]
    if not stack:
        return "", 0
    key, path = stack[-1]
    call = key.rpartition("@")[2] if "@" in key else "0"
    return path.partition("@")[0].removeprefix(ROOT).removeprefix("."), int(call)


def ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    """A node and every node that it depends on."""
    seen: set[torch.fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return seen


def is_getitem(node: torch.fx.Node) -> bool:
    """Whether a node takes one of several outputs of an operation."""
    return node.target is operator.getitem


def first_input(node: torch.fx.Node) -> torch.fx.Node:
    """The node that is an operation's first argument."""
    return node.all_input_nodes[0]


def op_name(node: torch.fx.Node) -> str:
    """Name of a node's operation, such as ``conv2d``."""
    return getattr(node.target, "_opname", None) or str(node.target).removeprefix("aten.").partition(".")[0]


def source_of(node: torch.fx.Node) -> torch.fx.Node:
    """The node that a copy was made of."""
    while str(node.target) == CLONE:
        node = first_input(node)
    return node
