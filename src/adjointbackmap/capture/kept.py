"""The graphs of the shipped networks, kept as JSON: reading one needs no ``torch.export``.

The import of ``torch.export`` and the capture take some two seconds, reading takes some
milliseconds. A kept graph is that of the shipped module itself, not of a changed one.
"""

import json
import operator
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.capture.graph import MODULE, Capture, module_of

GETITEM = "getitem"  # target of a node that is one of several outputs
NODE = "node"  # key of an argument that is a node
# Extent that stands for any number of images. It is a prime, so that no other extent is equal.
IMAGES = 65_521


def kept_graph(name: str) -> Capture | None:
    """The graph of a shipped network; ``None`` if none is kept, or this PyTorch lacks an operation.

    Args:
        name: One of :func:`adjointbackmap.models.names`.
    """
    path = files("adjointbackmap") / "assets" / f"{name}.graph.json"
    if not path.is_file():
        return None
    try:
        return capture_from(json.loads(path.read_text()))
    except AttributeError:  # of torch.ops
        return None


def described(captured: Capture) -> dict[str, Any]:
    """A graph as JSON.

    Raises:
        ValueError: If it has tensors of its own, or an argument that JSON cannot hold.
    """
    if captured.tensors:
        msg = f"A graph that is kept must read parameters alone. Got {', '.join(captured.tensors)}."
        raise ValueError(msg)
    return {
        "nodes": [_node(node) for node in captured.nodes],
        "image": captured.image.name,
        "outputs": {name: node.name for name, node in captured.outputs.items()},
        "layers": {name: node.name for name, node in captured.layers.items()},
        "parameters": captured.parameters,
        "reads_floats": captured.reads_floats,
        "read": sorted(captured.read),
    }


def _node(node: torch.fx.Node) -> dict[str, Any]:
    target = GETITEM if node.target is operator.getitem else str(node.target)
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_argument(each) for each in node.args],
        "kwargs": {name: _argument(each) for name, each in node.kwargs.items()},
        "value": _value(node.meta.get("val")),
        "module": list(module_of(node)),
    }


def _argument(value: Any) -> Any:
    """An argument as JSON.

    Raises:
        ValueError: If JSON cannot hold it.
    """
    if isinstance(value, torch.fx.Node):
        return {NODE: value.name}
    if isinstance(value, list | tuple):
        return [_argument(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    msg = f"An argument that is kept must be numbers or nodes. Got {value!r}."
    raise ValueError(msg)


def _value(value: Any) -> Any:
    """Shape and dtype of a node's output, or of several.

    Raises:
        ValueError: If it is no tensor, or an extent other than the first one is not a number.
    """
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    if not isinstance(value, Tensor) or any(not isinstance(n, int) for n in value.shape[1:]):
        msg = f"A value that is kept must be a tensor with a batch of any size. Got {value!r}."
        raise ValueError(msg)
    shape = [n if isinstance(n, int) else IMAGES for n in value.shape]
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def capture_from(found: dict[str, Any]) -> Capture:
    """The graph that :func:`described` gave as JSON.

    Raises:
        AttributeError: If this PyTorch has no such operation.
    """
    graph = torch.fx.Graph()
    nodes: dict[str, torch.fx.Node] = {}
    for each in found["nodes"]:
        args = tuple(_read_argument(value, nodes) for value in each["args"])
        kwargs = {name: _read_argument(value, nodes) for name, value in each["kwargs"].items()}
        node = graph.create_node(each["op"], _target(each), args, kwargs, each["name"])
        node.meta["val"] = _read_value(each["value"])
        node.meta[MODULE] = tuple(each["module"])
        nodes[each["name"]] = node
    outputs = {name: nodes[node] for name, node in found["outputs"].items()}
    layers = {name: nodes[node] for name, node in found["layers"].items()}
    graph.output((*outputs.values(), *layers.values()))
    return Capture(
        nodes=tuple(nodes.values()),
        image=nodes[found["image"]],
        outputs=outputs,
        layers=layers,
        parameters=found["parameters"],
        tensors={},
        names={},
        reads_floats=found["reads_floats"],
        read=frozenset(found["read"]),
    )


def _target(node: dict[str, Any]) -> Any:
    if node["op"] != "call_function":
        return node["target"]
    if node["target"] == GETITEM:
        return operator.getitem
    space, name, overload = node["target"].split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)


def _read_argument(value: Any, nodes: dict[str, torch.fx.Node]) -> Any:
    if isinstance(value, dict):
        return nodes[value[NODE]]
    return [_read_argument(each, nodes) for each in value] if isinstance(value, list) else value


def _read_value(found: Any) -> Any:
    if isinstance(found, list):
        return tuple(_read_value(each) for each in found)
    return torch.empty(found["shape"], dtype=getattr(torch, found["dtype"]), device="meta")
