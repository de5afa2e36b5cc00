"""The layers of a network: their names, shapes and modes, from the captured graph."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import nn

from adjointbackmap.capture.batch_places import (
    FIRST,
    PLACE,
    Place,
    place_in,
    with_batch_first,
)
from adjointbackmap.capture.graph import (
    Capture,
    ancestors,
    call_name,
    module_of,
    op_name,
    path_of,
    pick,
    source_of,
)
from adjointbackmap.display import Shown, ShownDict, Summary
from adjointbackmap.engine import showing
from adjointbackmap.engine.program import KernelCall, Program
from adjointbackmap.rules import RULES, Value, field_size
from adjointbackmap.rules.kernels import Kernel

KERNEL_MODULES = (nn.modules.conv._ConvNd, nn.Linear)
OUTPUT = "output"  # name of the layer that is the network's output


@dataclass(frozen=True, repr=False)
class Layer(Shown):
    """A layer of a network.

    Attributes:
        name: The module's name, ``name:1`` for its second call, ``block.conv2d`` for a functional
            call. A second layer with the same name gets ``#1``. A module called ``output`` that
            is not the last gets it too.
        kind: ``"Conv2d"``, ``"Linear"``, ... or the operation of a functional call.
        modes: Reconstruction modes of the layer, from ``"RM4"`` to ``"RM0"``.
        in_shape: Shape of its input without the batch; ``None`` for a module without a kernel.
        out_shape: Shape of its output without the batch.
        receptive_field: Number of pixels along each axis that one of its units depends on.
        kernel: Name of the node of its convolution or linear call; ``None`` without one.
        call: Name of that call, as ``adjointbackmap.engine.observe`` counts the calls.
        module: Name of the module's call, as :func:`adjointbackmap.capture.graph.listening` gives
            it; ``None`` for functional calls.
        value: Its output in the program.
        place: Where the module's tensors have the batch. The layer's shapes have it first.
    """

    name: str
    kind: str
    modes: tuple[str, ...]
    in_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...]
    receptive_field: tuple[int, ...]
    kernel: str | None
    call: str | None
    module: str | None
    value: Value
    place: Place = FIRST

    def _summary(self) -> Summary:
        return showing.of_layer(self)


def end_node(
    model: nn.Module, captured: Capture, until: str | None, output: int | str | None
) -> torch.fx.Node:
    """The node that ends a network.

    Args:
        model: The module.
        captured: Its graph.
        until: Name of the layer that ends the network; ``None`` for the module's output.
        output: Which of several outputs that is.

    Raises:
        ValueError: If there is no such layer or output.
    """
    if until is None or until == OUTPUT:
        return pick(captured.outputs, output)
    by_name = {end.name: end.node for end in ends_of(model, captured)}
    if until not in by_name:
        msg = (
            f"until must be one of {', '.join(by_name)}. "
            f"Got {until!r}: give one of these names, or a module."
        )
        raise ValueError(msg)
    return by_name[until]


@dataclass(frozen=True)
class End:
    """The node that gives a layer's output; see :class:`Layer` for the attributes."""

    name: str
    node: torch.fx.Node
    module: str | None
    kernel: torch.fx.Node | None
    call: str | None


def ends_of(model: nn.Module, captured: Capture, last: torch.fx.Node | None = None) -> list[End]:
    """The ends of all layers: of the calls of modules, and of functional calls.

    A module called ``output`` keeps its name only if its output is ``last``, the model's output.
    """
    kernels = list(_kernel_nodes(model, captured))
    own = {heard: (node, call) for node, heard, _, call in kernels if heard is not None}
    heard = {**{name: node for name, (node, _) in own.items()}, **captured.layers}
    is_last = last is not None and OUTPUT in heard and source_of(heard[OUTPUT]) is source_of(last)
    taken = {name for name in heard if name != OUTPUT} | {OUTPUT}
    ends = []
    for name, node in heard.items():
        shown = name if name != OUTPUT or is_last else _free_name(name, taken)
        ends.append(End(shown, source_of(node), name, *own.get(name, (None, None))))
    for node, module, name, call in kernels:
        # PyTorch's own code for attention, which has the batch second, calls them out of sight
        if module is None and place_in(node).is_first:
            ends.append(End(_free_name(name, taken), node, None, node, call))
    return ends


def _free_name(name: str, taken: set[str]) -> str:
    """The name, or the first of ``name#1``, ``name#2``, ... that is free; it is taken then."""
    free = next(n for n in chain((name,), (f"{name}#{i}" for i in count(1))) if n not in taken)
    taken.add(free)
    return free


def _kernel_nodes(
    model: nn.Module, captured: Capture
) -> Iterator[tuple[torch.fx.Node, str | None, str, str]]:
    """All convolution and linear calls.

    Yields:
        The node; the name of the module's call if the call is the module's own, else ``None``; its
        name as a functional call; and its name as ``adjointbackmap.engine.observe`` counts it.
    """
    seen: dict[str, int] = {}
    for node in captured.nodes:
        rule = RULES.get(str(node.target))
        if rule is None or not issubclass(rule, Kernel) or PLACE in node.meta:
            continue  # a copy counts as its original
        path, call = module_of(node)
        op = op_name(node)
        inside = f"{call_name(path, call)}/{op}"
        seen[inside] = seen.get(inside, -1) + 1
        functional = call_name(f"{path}.{op}" if path else op, seen[inside])
        is_kernel_module = isinstance(model.get_submodule(path), KERNEL_MODULES)
        is_own = bool(path) and is_kernel_module and seen[inside] == 0
        module_call = call_name(path, call) if is_own else None
        yield with_batch_first(node), module_call, functional, f"{inside}:{seen[inside]}"


def layers_in_graph(
    model: nn.Module, captured: Capture, target: torch.fx.Node, program: Program, is_cut: bool
) -> dict[str, Layer]:
    """The layers that a network's end depends on, by name, in the order of execution.

    Args:
        model: The module.
        captured: Its graph.
        target: Node that ends the network.
        program: The steps of the network.
        is_cut: Whether the network ends before the model's output.

    Raises:
        ValueError: If the network's output does not depend on the image, or has no dimension
            other than the batch.
    """
    wanted = ancestors(target)
    ends = [
        end for end in ends_of(model, captured, None if is_cut else target) if end.node in wanted
    ]
    if not any(end.name == OUTPUT for end in ends):
        ends.append(End(OUTPUT, target, None, None, None))
    order = {node: i for i, node in enumerate(captured.nodes)}
    # inner modules come before those that only pass their output on, and "output" comes last
    ends.sort(key=lambda end: (order[end.node], end.name == OUTPUT, -end.name.count(".")))
    layers: ShownDict[Layer] = ShownDict("Layers")
    for end in ends:
        value = program.values.get(end.node.name)
        if value is not None and value.shape:
            layers[end.name] = _layer(model, program, end, value, wanted)
    if OUTPUT not in layers:
        output = target.meta["val"]
        shape = ", ".join(["N", *map(str, output.shape[1:])])
        msg = (
            "The output must be numbers that depend on the input, with a dimension beside the "
            f"batch. Got ({shape}) of {output.dtype}: choose another with output=, or until=."
        )
        raise ValueError(msg)
    return layers


def _layer(
    model: nn.Module, program: Program, end: End, value: Value, wanted: set[torch.fx.Node]
) -> Layer:
    """The layer of an end whose output is a value of the program."""
    node = end.kernel.name if end.kernel is not None and end.kernel in wanted else None
    kernel = program.kernels[node] if node is not None else None
    return Layer(
        name=end.name,
        kind=_kind_of(model, end),
        modes=_modes_of(kernel, value.shape),
        in_shape=kernel.input.shape if kernel else None,
        out_shape=value.shape,
        receptive_field=field_size(program.fields[value.slot], program.image.shape[1:]),
        kernel=node,
        call=end.call if kernel is not None else None,
        module=end.module,
        value=value,
        place=place_in(end.node),
    )


def _kind_of(model: nn.Module, end: End) -> str:
    """The module's class, the operation of a functional call, or ``output``."""
    if end.module is not None:
        return type(model.get_submodule(path_of(end.module))).__name__
    return op_name(end.kernel) if end.kernel is not None else end.name


def _modes_of(kernel: KernelCall | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    if len(shape) == 1:
        return ("RM0",)
    if kernel is None:
        return ("RM2", "RM1")
    return ("RM4", "RM3", "RM2", "RM1") if kernel.weight.dim() > 2 else ("RM2",)


def layer_of_module(model: nn.Module, module: nn.Module, calls: Mapping[str, str | None]) -> str:
    """Name of the layer that is the output of a module.

    Args:
        model: The model.
        module: The module.
        calls: Name of a layer -> name of the module's call that gives it.

    Raises:
        ValueError: If it gives none of them, or several.
    """
    paths = [path for path, other in model.named_modules(remove_duplicate=False) if other is module]
    kind = type(module).__name__
    if not paths:
        msg = (
            f"A layer must be a module of the model, or a name. Got another {kind}: "
            "take it from network.model."
        )
        raise ValueError(msg)
    names = [name for name, call in calls.items() if call is not None and path_of(call) in paths]
    if not names:
        msg = (
            f"A layer must be one of {', '.join(calls)}. Got {kind} {paths[0]!r}, which gives "
            "none of them: take a module that the output depends on."
        )
        raise ValueError(msg)
    if len(names) > 1:
        listed = ", ".join(map(repr, names))
        msg = (
            f"A layer's module must be called once. Got {kind} with {len(names)} calls: "
            f"give one of the names {listed}."
        )
        raise ValueError(msg)
    return names[0]
