"""Inlines the parts of a forward that ``torch.export`` makes graphs of their own.

These are the parts under ``no_grad``, ``enable_grad`` and ``autocast``.
"""

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

# Names of the nodes that call a part. Arguments of the first: enabled, part, inputs of the part.
GRAD = "wrap_with_set_grad_enabled"
# Arguments: device, dtype, enabled, whether it caches, part, inputs of the part.
AUTOCAST = "wrap_with_autocast"


class CastingPart(ValueError):
    """A part of the forward computes in another precision than the model's."""


def inline_parts(exported: torch.export.ExportedProgram) -> None:
    """Inline the parts, and keep the module that made each of their nodes.

    Decompositions would inline them too, but lose the modules of convolutions and linear calls.

    Args:
        exported: The exported program; it is changed.

    Raises:
        CastingPart: If autocast is on in a part.
    """
    renamed: dict[str, str] = {}
    _inline(exported.graph_module, _device(exported), renamed)
    for old, new in renamed.items():
        exported.graph_signature.replace_all_uses(old, new)


def _device(exported: torch.export.ExportedProgram) -> str:
    """The kind of device that the model computes on."""
    values = (node.meta.get("val") for node in exported.graph.nodes)
    return next((value.device.type for value in values if isinstance(value, torch.Tensor)), "cpu")


def _inline(module: GraphModule, device: str, renamed: dict[str, str]) -> None:
    """Inline the parts of one graph, the innermost first.

    Args:
        module: The graph.
        device: Kind of device that the model computes on.
        renamed: Gets the old name of each output of a part -> its new name.
    """
    for node in list(module.graph.nodes):
        found = _part_of(node, device)
        if found is None:
            continue
        place, inputs = found
        part = cast("GraphModule", module.get_submodule(str(place.target)))
        _inline(part, device, {})
        _put_before(node, part, inputs, renamed)
        module.graph.erase_node(place)
        module.delete_submodule(str(place.target))
    module.recompile()


def _part_of(node: Node, device: str) -> tuple[Node, tuple[Any, ...]] | None:
    """The part that a node calls, and the inputs of the part; ``None`` for other nodes.

    Raises:
        CastingPart: If autocast is on in the part.
    """
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == GRAD:
        return node.args[1], node.args[2:]  # type: ignore[return-value]
    if name != AUTOCAST:
        return None
    kind, dtype, enabled, _, place, *inputs = node.args
    if enabled and kind == device:
        msg = (
            "The model must compute in its own precision. "
            f"Got torch.autocast to {dtype} in its forward: leave it out."
        )
        raise CastingPart(msg)
    return place, tuple(inputs)  # type: ignore[return-value]


def _put_before(
    node: Node, part: GraphModule, inputs: tuple[Any, ...], renamed: dict[str, str]
) -> None:
    """Copy a part in front of the node that calls it, and use its outputs instead of the node's."""
    graph = node.graph
    placeholders = [inner for inner in part.graph.nodes if inner.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(node):
        for inner in part.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
    outputs = part.graph.output_node().args[0]
    for taker in list(node.users):  # getitem(node, number of the output)
        new = copies[outputs[taker.args[1]]]  # type: ignore[index]
        taker.replace_all_uses_with(new)
        renamed[taker.name] = new.name
        graph.erase_node(taker)
    graph.erase_node(node)
