"""A module and an example -> the graph of ATen operations that ``torch.export`` sees, with every layer's output."""

import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adjointbackmap.capture.casting import tensors_of
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.decompositions import decompositions
from adjointbackmap.capture.inlining import CastingPart, inline
from adjointbackmap.capture.model_check import advice, batch_of, is_exported, takes
from adjointbackmap.capture.precision import exact, while_torch_sets
from adjointbackmap.capture.process import CAPTURING, quiet
from adjointbackmap.capture.readings import FixedBatch, ForeignTensor, Readings, Replay, readings_of

CLONE = "aten.clone.default"
ROOT = "model"  # name of the user's module inside the one that is exported
MODULE = "module and call"  # where a node of a module with several names says by which one it goes
CALL = re.compile(r":\d+$")
MADE_IN_FORWARD = "constant"
LIFTED = re.compile(r"lifted_tensor_\d+$")  # a tensor that the forward makes of numbers
WRAPPER = "jaxtyping"  # its frames may stand between the model's code and ours
MOST_IMAGES = (
    65_535  # a capture on a CUDA device may hold for no larger batch, and nothing here needs one
)


@dataclass(frozen=True)
class Capture:
    """The graph of a module in the order of execution.

    Attributes:
        nodes: Every node but the one that gives the outputs.
        image: The node of the image.
        outputs: Name of an output -> its node, see :func:`named`.
        layers: Name of a module's call -> the node of what it returned.
        parameters: Name of a node -> the module's name for the parameter or buffer that it stands for.
        tensors: Name of a node -> tensor that the graph holds itself.
        names: Name of such a node -> the module's name for the plain attribute that it is, or ``MADE_IN_FORWARD``.
        reads_floats: Whether the forward reads floating numbers from constants, which are rounded to their dtype.
    """

    nodes: tuple[torch.fx.Node, ...]
    image: torch.fx.Node
    outputs: dict[str, Any]
    layers: dict[str, torch.fx.Node]
    parameters: dict[str, str]
    tensors: dict[str, Tensor]
    names: dict[str, str]
    reads_floats: bool


def call_name(path: str, call: int) -> str:
    """Name of a module's call: the module's own, then ``:1`` for its second call and so on.

    A module whose own name ends so has the number at its first call too.
    """
    return f"{path}:{call}" if call or CALL.search(path) else path


def path_of(call: str) -> str:
    """The module's name in the name of its call."""
    return CALL.sub("", call)


def paths_of(model: nn.Module) -> list[str]:
    """The first name of every submodule."""
    return [path for path, _ in model.named_modules() if path]


@contextmanager
def listening(
    model: nn.Module,
    hook: Callable[[str, nn.Module, tuple[Any, ...], object], None],
    paths: Sequence[str] | None = None,
) -> Iterator[None]:
    """Call ``hook(name, module, inputs, output)`` after every call of a submodule; nothing stays behind."""
    calls: dict[str, int] = {}
    handles = []

    def listen(path: str) -> Callable[..., Any]:
        def after(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            calls[path] = calls.get(path, -1) + 1
            hook(call_name(path, calls[path]), module, inputs, output)

        return after

    try:
        for path in paths_of(model) if paths is None else paths:
            handles.append(model.get_submodule(path).register_forward_hook(listen(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Listened(nn.Module):
    """Returns the module's outputs and what every submodule returned, so that the graph names them exactly."""

    def __init__(self, model: nn.Module, readings: Readings | None = None) -> None:
        super().__init__()
        # while it is exported, a module with two names looks like two
        self.model = model
        self.paths = paths_of(model)
        self.readings = readings

    def forward(self, x: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        outputs: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.clone()  # a later operation in place does not reach it

        replayed = Replay(self.readings, x.shape[0]) if self.readings else nullcontext()
        with listening(self.model, keep, self.paths), replayed:
            return named(self.model(x)), outputs


def capture(model: nn.Module, example: Tensor) -> Capture:
    """Capture a module in eval mode with a batch of any size up to ``MOST_IMAGES``.

    Args:
        model: The module; it is left as it was.
        example: A batch of inputs.

    Raises:
        CastingPart: If the module turns autocast on.
        TypeError: If the example is no tensor.
        ValueError: If the module does not take the example, ``torch.export`` cannot follow it, or it changes its buffers.
    """
    batch = batch_of(example)
    readings = _run(model, example, batch)
    copied = structural_copy(model)  # torch.export puts fake tensors into it
    wrapper = _Listened(copied, readings)
    wrapper.training = model.training
    shapes = ({0: torch.export.Dim("batch", max=MOST_IMAGES)},)
    try:
        with CAPTURING, exact(batch.device), while_torch_sets(), quiet():
            exported = _exported(wrapper, batch, shapes)
            inline(exported)
            with torch.no_grad():
                exported = exported.run_decompositions(dict(decompositions()))
    except CastingPart:
        raise
    except Exception as error:
        if _fixes_batch(error) and takes(_with_own_buffers(model), lambda: example[None]):
            msg = f"The example must be a batch (N, ...). Got {tuple(example.shape)}, which is one image: pass example[None]."
            raise ValueError(msg) from error
        msg = f"The model must be a graph that torch.export can capture for any batch size. Got {explained(error)}"
        if _fixes_batch(error) and is_exported(model):
            msg = "The model must take any batch size. Got an export that fixes it: export it with dynamic_shapes for the batch."
        raise ValueError(msg) from error
    return _read(exported, _first_names(model), readings.floats)


def _exported(wrapper: nn.Module, example: Tensor, shapes: Any) -> torch.export.ExportedProgram:
    """What ``torch.export`` captures without gradients or, where the forward turns them on, which it cannot follow, with them."""
    try:
        with torch.no_grad():
            return torch.export.export(wrapper, (example,), dynamic_shapes=shapes, strict=False)
    except IndexError:
        with torch.enable_grad():
            return torch.export.export(wrapper, (example,), dynamic_shapes=shapes, strict=False)


def _run(model: nn.Module, example: Tensor, batch: Tensor) -> Readings:
    """Run a copy of the model on the example as a batch, whose buffers are its own: a forward may change them.

    Returns:
        What it read from its parameters and buffers.

    Raises:
        ValueError: If the model does not take the example.
    """
    copied = _with_own_buffers(model)
    try:
        return readings_of(_Listened(copied), tensors_of(copied), batch)
    except Exception as error:
        shape = ", ".join(map(str, ("N", *example.shape[1:])))
        reason = explained(error).removesuffix(".")
        what = advice(copied, example)
        msg = (
            f"The model must run on a batch of the example's shape ({shape}). Got {reason}: {what}."
        )
        raise ValueError(msg) from error


def _with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy of a model to run: it may change its buffers."""
    buffers = {id(buffer) for buffer in model.buffers()}
    return structural_copy(
        model, lambda tensor: tensor.clone() if id(tensor) in buffers else tensor
    )


def explained(error: Exception) -> str:
    """The first line of an error, the line of the model's code that caused it, and what to do where that is known."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    inside = (Path(torch.__file__).parent, Path(__file__).parents[1])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_file()]
    theirs = [
        f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in inside)
    ]
    theirs = [f for f in theirs if WRAPPER not in Path(f.filename).parts]
    where = f" at {theirs[-1].filename}:{theirs[-1].lineno} ({theirs[-1].line})" if theirs else ""
    if _fixes_batch(error):
        return f"a model that fixes the batch{where}: write x.shape[0] in place of len(x) or a number, and give a batch (N, ...)."
    if isinstance(error, ForeignTensor):
        what = "a number of a tensor that is no parameter, buffer or attribute of a module"
        return f"{what}{where}: register it as a buffer."
    if "data-dependent" in first or "DataDependent" in type(error).__name__:
        return f"a branch or a shape that depends on the data{where}: write it with torch.where."
    if "not a known type" in first:
        return f"{first.partition(',')[0].removeprefix('Found ')}: return a tensor, a tuple, a dict or a dataclass."
    return f"{type(error).__name__}: {first}{where}."


def _fixes_batch(error: Exception) -> bool:
    return "specialized it to be a constant" in str(error) or isinstance(error, FixedBatch)


def named(result: Any) -> dict[str, Any]:
    """What a module returns, by name: the keys of a mapping, the fields of an object, the places in a tuple or list."""
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    if hasattr(result, "_fields"):
        return result._asdict()
    return {
        str(i): value
        for i, value in enumerate(result if isinstance(result, tuple | list) else [result])
    }


def pick(result: Any, output: int | str | None) -> Any:
    """The output of a module that returns one, or the chosen one of several.

    Args:
        result: What the module returned: a tensor, or a tuple, list, mapping or object of these.
        output: Name, or index; ``None`` where there is only one.

    Raises:
        ValueError: If there is no such output, it is no tensor, or there are several and none is chosen.
    """
    several = named(result)
    names = list(several)
    given = [name for name in names if several[name] is not None]
    if output is None and len(given) == 1:
        output = given[0]
    if type(output) is int and str(output) not in several and -len(names) <= output < len(names):
        output = names[output]
    if str(output) not in given or type(output) not in (int, str):
        listed = ", ".join(given) or "nothing"
        msg = f"output must be one of what the model returns: {listed}. Got {output!r}: choose one with output=."
        raise ValueError(msg)
    chosen = several[str(output)]
    if not isinstance(chosen, Tensor | torch.fx.Node):
        msg = f"The output {output!r} must be a tensor. Got {type(chosen).__name__}: wrap the model in one that returns a tensor."
        raise ValueError(msg)
    return chosen


def _first_names(model: nn.Module) -> dict[str, str]:
    """Name of a module, parameter or buffer -> the first name of the same one."""
    named = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
    ]
    named += model.named_buffers(remove_duplicate=False)
    first: dict[int, str] = {}
    return {name: first.setdefault(id(one), name) for name, one in named}


def _name_by_first(nodes: Sequence[torch.fx.Node], first: Mapping[str, str]) -> None:
    """Note the module and the call that made each node of a module with several names: calls are counted over all of them."""
    several = {name for names in first.items() if names[0] != names[1] for name in names}
    calls: dict[str, list[tuple[str, int]]] = {}
    for node in nodes:
        path, call = module_of(node)
        if path in several:
            seen = calls.setdefault(first[path], [])
            if (path, call) not in seen:
                seen.append((path, call))
            node.meta[MODULE] = (first[path], seen.index((path, call)))


def _read(
    exported: torch.export.ExportedProgram, first: Mapping[str, str], reads_floats: bool
) -> Capture:
    *nodes, last = exported.graph.nodes
    for node in nodes:
        _write_by_kind(node)
    _name_by_first(nodes, first)
    signature = exported.graph_signature
    spec = exported.call_spec.out_spec
    if signature.buffers_to_mutate:
        changed = ", ".join(
            name.removeprefix(f"{ROOT}.") for name in signature.buffers_to_mutate.values()
        )
        msg = f"The model must leave its buffers as they are in eval mode. Got a forward that changes {changed}: leave that out."
        raise ValueError(msg)
    outputs, layers = pytree.tree_unflatten(
        last.args[0][-spec.num_leaves :], spec
    )  # an input that is changed comes before
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {
        **exported.constants,
        **{n: exported.state_dict[t] for n, t in parameters.items() if t in exported.state_dict},
    }
    lifted = {
        name: constants[target]
        for name, target in signature.inputs_to_lifted_tensor_constants.items()
    }
    image = next(n for n in nodes if n.name == signature.user_inputs[0])
    return Capture(
        nodes=tuple(nodes),
        image=image,
        outputs=outputs,
        layers=layers,
        parameters={
            n: first.get(t.removeprefix(f"{ROOT}."), t.removeprefix(f"{ROOT}."))
            for n, t in parameters.items()
        },
        tensors=lifted,
        names={
            n: _shown(target) for n, target in signature.inputs_to_lifted_tensor_constants.items()
        },
        reads_floats=reads_floats,
    )


def _write_by_kind(node: torch.fx.Node) -> None:
    """Write the general convolution of an exported and decomposed model as the one that it was."""
    if str(node.target) == "aten.convolution.default":
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = cast(
            "tuple[Any, ...]", node.args
        )
        op = getattr(torch.ops.aten, convolution_name(weight.meta["val"], transposed))
        rest = (output_padding, groups, dilation) if transposed else (dilation, groups)
        node.target = op.input if transposed else op.default
        node.args = (x, weight, bias, stride, padding, *rest)


def convolution_name(weight: Tensor, transposed: bool) -> str:
    """The kind of a general convolution, such as ``conv2d``."""
    return f"{'conv_transpose' if transposed else 'conv'}{weight.dim() - 2}d"


def _shown(target: str) -> str:
    """What people call a tensor that is no parameter or buffer: the attribute's name, if it is one."""
    name = target.removeprefix(f"{ROOT}.")
    return MADE_IN_FORWARD if LIFTED.match(name) else name


def module_of(node: torch.fx.Node) -> tuple[str, int]:
    """The path of the innermost module that made a node, without the wrapper's prefix, and which of its calls."""
    if MODULE in node.meta:
        return node.meta[MODULE]
    stack = [
        (key, path)
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()
        if path.startswith(ROOT)
    ]
    if not stack:
        return "", 0
    key, path = stack[-1]
    call = (
        "" if key.endswith(path) else key.rpartition("@")[2]
    )  # key: the path, then "@1" for the second call and so on
    return path.removeprefix(ROOT).removeprefix("."), int(call or 0)


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
    return (
        getattr(node.target, "_opname", None)
        or str(node.target).removeprefix("aten.").partition(".")[0]
    )


def source_of(node: torch.fx.Node) -> torch.fx.Node:
    """The node that a copy was made of."""
    while str(node.target) == CLONE:
        node = first_input(node)
    return node
