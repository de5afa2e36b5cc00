"""The graph of ATen operations of a module, from ``torch.export``, with all layers' outputs."""

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

from adjointbackmap.capture import batch_places
from adjointbackmap.capture.attention import put_batch_first
from adjointbackmap.capture.casting import all_tensors
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.decompositions import decompositions
from adjointbackmap.capture.entering import Entrance
from adjointbackmap.capture.inlining import CastingPart, inline_parts
from adjointbackmap.capture.model_check import advice, batch_of, is_exported, takes
from adjointbackmap.capture.precision import exact, while_torch_sets
from adjointbackmap.capture.process import CAPTURING, quiet
from adjointbackmap.capture.readings import FixedBatch, ForeignTensor, Readings, Replay, readings_of
from adjointbackmap.capture.widening import widened

CLONE = "aten.clone.default"
WRAPPED = "model"  # name of the user's module inside the one that is exported
FIXED_EXPORT = (
    "The model must take any batch size. Got an export that fixes it: "
    "export it with dynamic_shapes for the batch."
)
MODULE = "module and call"  # key of a node's meta: the first name of a module with several names
CALL = re.compile(r":\d+$")
MADE_IN_FORWARD = "constant"  # name of a tensor that the forward makes from numbers
LIFTED = re.compile(r"lifted_tensor_\d+$")  # torch.export's name of such a tensor
WRAPPER = "jaxtyping"  # its frames may be between the model's code and ours in a traceback
# A capture on a CUDA device may hold for no larger batch, and nothing here needs one.
MOST_IMAGES = 65_535


@dataclass(frozen=True)
class Capture:
    """The graph of a module in the order of execution.

    Attributes:
        nodes: All nodes except the output node.
        image: The node of the image.
        outputs: Name of an output -> its node, see :func:`named`.
        layers: Name of a module's call -> the node of its output.
        parameters: Name of a node -> name of its parameter or buffer in the model.
        tensors: Name of a node -> its tensor, if it is neither parameter nor buffer.
        names: Name of such a node -> name of the plain attribute that holds the tensor, or
            ``MADE_IN_FORWARD``.
        reads_floats: Whether the forward reads floating numbers from constants. Their values depend
            on the dtype of the constants.
        read: Names of the parameters and buffers from which Python reads numbers.
        given: The nodes of what the model takes, if the image enters after one of its modules.
    """

    nodes: tuple[torch.fx.Node, ...]
    image: torch.fx.Node
    outputs: dict[str, Any]
    layers: dict[str, torch.fx.Node]
    parameters: dict[str, str]
    tensors: dict[str, Tensor]
    names: dict[str, str]
    reads_floats: bool
    read: frozenset[str] = frozenset()
    given: tuple[torch.fx.Node, ...] = ()


def call_name(path: str, call: int) -> str:
    """Name of a module's call: the module's name, with ``:1`` for its second call and so on.

    The first call of a module whose own name ends like this gets ``:0``.
    """
    return f"{path}:{call}" if call or CALL.search(path) else path


def path_of(call: str) -> str:
    """The name of the module, from the name of a call of it."""
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
    """Call ``hook(name, module, inputs, output)`` after every call of a submodule.

    The hooks are removed at the end.
    """
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
    """Returns the outputs of the module and of all submodules, so that the graph has them all."""

    def __init__(
        self,
        model: nn.Module,
        readings: Readings | None = None,
        entrance: Entrance | None = None,
        own: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.own = own
        # the paths are taken here: during the export a module with two names looks like two modules
        self.model = model
        self.paths = paths_of(model)
        self.readings = readings
        self.entrance = entrance

    def forward(
        self, x: Tensor, given: tuple[Tensor, ...] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        outputs: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.clone()  # a later operation in place would change it

        replayed = Replay(self.readings, x.shape[0]) if self.readings else nullcontext()
        wide = widened(self.own or x.dtype, x.dtype)
        with listening(self.model, keep, self.paths), wide, replayed:
            if self.entrance is None:
                return named(self.model(x)), outputs
            return named(self.entrance.run(self.model, x, given)), outputs


def capture(
    model: nn.Module,
    example: Tensor,
    entrance: Entrance | None = None,
    own: torch.dtype | None = None,
) -> Capture:
    """Capture a module in eval mode with a batch of any size up to ``MOST_IMAGES``.

    Args:
        model: The module; it is not changed.
        example: A batch of inputs.
        entrance: Where they enter, if not at the beginning.
        own: The model's own dtype, if the example has a wider one; see
            :mod:`adjointbackmap.capture.widening`.

    Raises:
        CastingPart: If the module turns autocast on.
        TypeError: If the example is no tensor.
        ValueError: If the module does not take the example, ``torch.export`` cannot follow it, or
            it changes its buffers.
    """
    batch = batch_of(example)
    readings = _readings_of_run(model, example, batch, entrance, own)
    if is_exported(model) and not takes(model, lambda: torch.cat([batch, batch[:1]])):
        raise ValueError(FIXED_EXPORT)
    copied = structural_copy(model)  # torch.export puts fake tensors into it
    put_batch_first(copied)
    wrapper = _Listened(copied, readings, entrance, own)
    wrapper.training = model.training
    # an export has its own bounds, which PyTorch finds
    any_number = torch.export.Dim("batch", max=MOST_IMAGES)
    batches = {0: torch.export.Dim.DYNAMIC if is_exported(model) else any_number}
    inputs: tuple[Any, ...] = (batch,)
    shapes: tuple[Any, ...] = (batches,)
    if entrance is not None:
        given = tuple(t.clone() for t in entrance.given_for(batch))
        inputs = (batch, given)
        shapes = (batches, tuple(batches for _ in given))
    try:
        with CAPTURING, exact(batch.device), while_torch_sets(), quiet():
            exported = _exported(wrapper, inputs, shapes)
            inline_parts(exported)
            with torch.no_grad():
                exported = exported.run_decompositions(dict(decompositions()))
    except CastingPart:
        raise
    except Exception as error:
        raise ValueError(_why_not_captured(model, example, error)) from error
    return _capture_of(exported, _first_names(model), readings)


def _why_not_captured(model: nn.Module, example: Tensor, error: Exception) -> str:
    """The message for a model that could not be captured."""
    if _fixes_batch(error) and takes(_with_own_buffers(model), lambda: example[None]):
        return (
            f"The example must be a batch (N, ...). Got {tuple(example.shape)}, "
            "which is one image: pass example[None]."
        )
    if _fixes_batch(error) and is_exported(model):
        return FIXED_EXPORT
    return (
        "The model must be a graph that torch.export can capture for any batch size. "
        f"Got {explained(error)}"
    )


def _exported(
    wrapper: nn.Module, inputs: tuple[Any, ...], shapes: Any
) -> torch.export.ExportedProgram:
    """The graph without gradients; with them if the forward turns gradients on.

    ``torch.export`` cannot follow a forward that turns them on while they are off.
    """
    try:
        with torch.no_grad():
            return torch.export.export(wrapper, inputs, dynamic_shapes=shapes, strict=False)
    except IndexError:
        with torch.enable_grad():
            return torch.export.export(wrapper, inputs, dynamic_shapes=shapes, strict=False)


def _readings_of_run(
    model: nn.Module,
    example: Tensor,
    batch: Tensor,
    entrance: Entrance | None,
    own: torch.dtype | None,
) -> Readings:
    """Run a copy of the model on a batch; it has its own buffers, which the forward may change.

    Returns:
        The numbers that the model read from its constants.

    Raises:
        ValueError: If the model does not take the example.
    """
    copied = _with_own_buffers(model)
    try:
        named = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
        listened = _Listened(copied, entrance=entrance, own=own)
        return readings_of(listened, all_tensors(copied), batch, named)
    except Exception as error:
        shape = ", ".join(map(str, ("N", *example.shape[1:])))
        reason = explained(error).removesuffix(".")
        msg = (
            f"The model must run on a batch of the example's shape ({shape}). "
            f"Got {reason}: {advice(copied, example)}."
        )
        raise ValueError(msg) from error


def _with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy of a model that may change its buffers."""
    buffers = {id(buffer) for buffer in model.buffers()}
    return structural_copy(model, lambda t: t.clone() if id(t) in buffers else t)


def explained(error: Exception) -> str:
    """The first line of an error, the model's line that caused it, and advice if there is any."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    where = _line_of_model(error)
    if _fixes_batch(error):
        return (
            f"a model that fixes the batch{where}: write x.shape[0] in place of len(x), "
            "int(x.shape[0]), a loop over the images or a number, and give a batch (N, ...)."
        )
    if isinstance(error, ForeignTensor):
        what = "a number of a tensor that is no parameter, buffer or attribute of a module"
        return f"{what}{where}: register it as a buffer."
    if "data-dependent" in first or "DataDependent" in type(error).__name__:
        return f"a branch or a shape that depends on the data{where}: write it with torch.where."
    if "Constraints violated" in first:
        return (
            "a model that takes only some numbers of images: keep (N, ...) as the first dimension, "
            "and export a module with dynamic_shapes for any batch."
        )
    if "not a known type" in first:
        found = first.partition(",")[0].removeprefix("Found ")
        return f"{found}: return a tensor, a tuple, a dict or a dataclass."
    return f"{type(error).__name__}: {first}{where}."


def _line_of_model(error: Exception) -> str:
    """Where in the user's code an error was raised; empty if it was in no file of theirs."""
    ours = (Path(torch.__file__).parent, Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        is_theirs = path.is_file() and not any(path.is_relative_to(folder) for folder in ours)
        if is_theirs and WRAPPER not in path.parts:
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""


def _fixes_batch(error: Exception) -> bool:
    return "specialized it to be a constant" in str(error) or isinstance(error, FixedBatch)


def named(result: Any) -> dict[str, Any]:
    """The outputs of a module by name.

    The names are the keys of a mapping, the fields of an object, or the numbers in a tuple or list.
    """
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    if hasattr(result, "_fields"):
        return result._asdict()
    several = result if isinstance(result, tuple | list) else [result]
    return {str(i): value for i, value in enumerate(several)}


def pick(result: Any, output: int | str | None) -> Any:
    """The only output of a module, or the chosen one of several.

    Args:
        result: What the module returned: a tensor, or a tuple, list, mapping or object of tensors.
        output: Name or index; ``None`` if there is only one.

    Raises:
        ValueError: If there is no such output, it is no tensor, or there are several outputs and
            none is chosen.
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
        msg = (
            f"output must be one of what the model returns: {listed}. "
            f"Got {output!r}: choose one with output=."
        )
        raise ValueError(msg)
    chosen = several[str(output)]
    if not isinstance(chosen, Tensor | torch.fx.Node):
        msg = (
            f"The output {output!r} must be a tensor. Got {type(chosen).__name__}: "
            "wrap the model in one that returns a tensor."
        )
        raise ValueError(msg)
    return chosen


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each name of a module, parameter or buffer -> the first of its names."""
    every = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(one), name) for name, one in every}


def _name_by_first(nodes: Sequence[torch.fx.Node], first: Mapping[str, str]) -> None:
    """Write the first name, and the number of the call, to the nodes of modules with several names.

    The calls are counted over all names of a module.
    """
    several = {name for names in first.items() if names[0] != names[1] for name in names}
    calls: dict[str, list[tuple[str, int]]] = {}
    for node in nodes:
        path, call = module_of(node)
        if path in several:
            seen = calls.setdefault(first[path], [])
            if (path, call) not in seen:
                seen.append((path, call))
            node.meta[MODULE] = (first[path], seen.index((path, call)))


def _capture_of(
    exported: torch.export.ExportedProgram, first: Mapping[str, str], readings: Readings
) -> Capture:
    """The captured graph, with the names that the model uses.

    Args:
        exported: The exported wrapper.
        first: Each name of a module, parameter or buffer -> the first of its names.
        readings: What the forward reads from its constants.

    Raises:
        ValueError: If the forward changes buffers.
    """
    *nodes, last = exported.graph.nodes
    for node in nodes:
        _write_by_kind(node)
    _name_by_first(nodes, first)
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        changed = ", ".join(_in_model(name) for name in signature.buffers_to_mutate.values())
        msg = (
            "The model must leave its buffers as they are in eval mode. "
            f"Got a forward that changes {changed}: leave that out."
        )
        raise ValueError(msg)
    spec = exported.call_spec.out_spec
    returned = last.args[0][-spec.num_leaves :]  # inputs that the forward changed come before
    outputs, layers = pytree.tree_unflatten(returned, spec)
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    image = next(n for n in nodes if n.name == signature.user_inputs[0])
    given = tuple(n for n in nodes if n.name in signature.user_inputs[1:])
    nodes = batch_places.put_batch_first(nodes, image, given)
    return Capture(
        nodes=tuple(nodes),
        image=image,
        outputs=pytree.tree_map_only(torch.fx.Node, batch_places.output_with_batch_first, outputs),
        layers={name: batch_places.with_batch_first(node) for name, node in layers.items()},
        parameters={n: first.get(_in_model(t), _in_model(t)) for n, t in parameters.items()},
        tensors={name: exported.constants[target] for name, target in lifted.items()},
        names={name: _shown_name(target) for name, target in lifted.items()},
        reads_floats=readings.floats,
        read=frozenset(readings.tensors),
        given=given,
    )


def _in_model(name: str) -> str:
    """A name without the prefix of the exported wrapper."""
    return name.removeprefix(f"{WRAPPED}.")


def _write_by_kind(node: torch.fx.Node) -> None:
    """Replace the general convolution, which decompositions give, by the kind that it was."""
    if str(node.target) != "aten.convolution.default":
        return
    x, weight, bias, stride, padding, dilation, transposed, *rest = cast(
        "tuple[Any, ...]", node.args
    )
    output_padding, groups = rest
    op = getattr(torch.ops.aten, convolution_name(weight.meta["val"], transposed))
    # the arguments of both kinds have different orders
    rest = [output_padding, groups, dilation] if transposed else [dilation, groups]
    node.target = op.input if transposed else op.default
    node.args = (x, weight, bias, stride, padding, *rest)


def convolution_name(weight: Tensor, transposed: bool) -> str:
    """The kind of a general convolution, such as ``conv2d``."""
    return f"{'conv_transpose' if transposed else 'conv'}{weight.dim() - 2}d"


def _shown_name(target: str) -> str:
    """Name for people of a tensor that is no parameter or buffer: the attribute's, if it is one."""
    name = _in_model(target)
    return MADE_IN_FORWARD if LIFTED.match(name) else name


def module_of(node: torch.fx.Node) -> tuple[str, int]:
    """The path of the innermost module that made a node, and the number of its call."""
    if MODULE in node.meta:
        return node.meta[MODULE]
    stack = [
        (key, path)
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()
        if path.startswith(WRAPPED)
    ]
    if not stack:
        return "", 0
    key, path = stack[-1]
    # the key ends with the path, and "@1" after it for the second call and so on
    call = "" if key.endswith(path) else key.rpartition("@")[2]
    return path.removeprefix(WRAPPED).removeprefix("."), int(call or 0)


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
    """Whether a node is one of several outputs of an operation."""
    return node.target is operator.getitem


def first_input(node: torch.fx.Node) -> torch.fx.Node:
    """The node that is an operation's first argument."""
    return node.all_input_nodes[0]


def op_name(node: torch.fx.Node) -> str:
    """Name of a node's operation, such as ``conv2d``."""
    name = getattr(node.target, "_opname", None)
    return name or str(node.target).removeprefix("aten.").partition(".")[0]


def source_of(node: torch.fx.Node) -> torch.fx.Node:
    """The node that a chain of copies starts from; a node that is no copy is its own."""
    while str(node.target) == CLONE:
        node = first_input(node)
    return node
