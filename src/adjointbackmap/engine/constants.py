"""The constants of a graph: what it computes without the image.

Each constant keeps its source: a tensor of the model, or a node of the graph.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from adjointbackmap.capture.graph import (
    MADE_IN_FORWARD,
    Capture,
    call_name,
    first_input,
    is_getitem,
    module_of,
    op_name,
)
from adjointbackmap.rules import Constant, ConstantSource, Refused

# Operations that only move the elements of a tensor, so that the source stays known.
MOVEMENTS = {
    "aten.alias.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.expand.default",
    "aten.expand_as.default",
    "aten.flatten.using_ints",
    "aten.permute.default",
    "aten.reshape.default",
    "aten.reshape_as.default",
    "aten.select.int",
    "aten.slice.Tensor",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.t.default",
    "aten.transpose.int",
    "aten.unsqueeze.default",
    "aten.view.default",
    "aten.view_as.default",
}

# Such operations with several outputs.
DIVISIONS = {
    "aten.chunk.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.unbind.int",
}

# Changes of dtype. The source stays known if nothing is rounded.
CASTS = {
    "aten._to_copy.default",
    "aten.to.device",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.other",
    "aten.type_as.default",
}

# Operations that read only the shape of their data, so that their output is a constant.
SHAPE_ONLY = {
    "aten.fill.Scalar",
    "aten.fill.Tensor",
    "aten.full_like.default",
    "aten.new_full.default",
    "aten.new_ones.default",
    "aten.new_zeros.default",
    "aten.ones_like.default",
    "aten.zero.default",
    "aten.zeros_like.default",
}

# Operations whose output is uninitialised memory, for a forward to write into. We make it zeros,
# which have no entries.
UNWRITTEN = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
SHAPE_ONLY |= UNWRITTEN

# Operations that read only shape and dtype of the arguments after the first.
LIKE_SECOND = {
    "aten.type_as.default",
    "aten.to.other",
    "aten.expand_as.default",
    "aten.view_as.default",
    "aten.reshape_as.default",
}

# Operations whose output is the same number everywhere: one entry of b, not one for each element.
FILLED = {
    *SHAPE_ONLY,
    *(f"aten.{name}.default" for name in "full ones zeros scalar_tensor".split()),
}

# torch.export puts this operation where the model casts; its last argument is the dtype before.
DTYPE_ASSERTION = "aten._assert_tensor_metadata.default"
# Types of numbers that depend on the batch or on data.
SYMBOLS = torch.SymInt | torch.SymFloat | torch.SymBool


class Constants:
    """The constants of a graph in one dtype, computed node by node in the order of execution.

    Args:
        capture: The captured graph.
        tensors: Parameters and buffers by the model's names; they are cast to ``dtype``.
        dtype: Dtype of the parameters and buffers. A constant that is computed from them has the
            dtype that PyTorch gives it.
        device: Device of the constants.

    Attributes:
        numbers: Name of a node -> the Python number that it reads from constants.
        uses: Source of a constant -> number of its uses, without those as an entry of ``b``.
    """

    def __init__(
        self,
        capture: Capture,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capture = capture
        self.tensors = tensors
        self.dtype = dtype
        self.device = device
        self.is_cast = dtype != capture.image.meta["val"].dtype
        self.numbers: dict[str, Any] = {}
        self.uses: Counter[ConstantSource] = Counter()
        self._known: dict[str, Constant] = {}
        self._several: dict[str, list[Constant]] = {}  # node with several outputs -> its outputs

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def get(self, name: str) -> Constant | None:
        """The constant of a node; ``None`` for other nodes."""
        return self._known.get(name)

    def take(self, node: torch.fx.Node) -> None:
        """Add an input of the graph that is not the image."""
        name = self.capture.parameters.get(node.name)
        if name is not None:
            tensor = self.tensors[name]
            source = ConstantSource(name)
        else:
            tensor = self.capture.tensors[node.name]
            source = ConstantSource(self.capture.names[node.name], node.name)
        own = tensor.detach()
        if self.is_cast and own.is_floating_point():
            own = own.to(self.dtype)
        self._known[node.name] = _entry_each(own, source)

    def read(self, node: torch.fx.Node) -> None:
        """Compute a number that a node reads from constants.

        A number that depends on the data or on the batch stays a symbol.
        """
        inputs = [n.name for n in node.all_input_nodes]
        if inputs and all(name in self._known or name in self.numbers for name in inputs):
            args, kwargs = self._arguments(node, ())
            self.numbers[node.name] = cast("Callable[..., Any]", node.target)(*args, **kwargs)

    def fold(self, node: torch.fx.Node, data: Container[str]) -> None:
        """Compute an operation on constants, for a batch of one.

        Args:
            node: The operation.
            data: Names of the nodes that depend on the image; only their shapes are read.

        Raises:
            Refused: If it depends on the number of images.
        """
        if is_getitem(node) and first_input(node).name in self._several:
            outputs = self._several[first_input(node).name]
            self._known[node.name] = outputs[cast("int", node.args[1])]
            return
        kind = str(node.target)
        op = cast("Callable[..., Any]", node.target)
        args, kwargs = self._arguments(node, data)
        made = op(*args, **kwargs)
        if kind in UNWRITTEN:
            made = torch.zeros_like(made)
        own = ConstantSource(self._shown(node), node.name)
        if kind in MOVEMENTS:
            first = self._known[first_input(node).name]
            index = op(first.index, *args[1:], **kwargs)  # moved like the elements
            self._known[node.name] = Constant(made, first.source, first.base, index)
        elif kind in DIVISIONS:
            whole = self._known[first_input(node).name]
            parts = zip(made, op(whole.index, *args[1:], **kwargs), strict=True)
            self._several[node.name] = [Constant(t, whole.source, whole.base, i) for t, i in parts]
        elif not isinstance(made, Tensor):
            self._several[node.name] = [
                _entry_each(part, ConstantSource(own.name, f"{node.name}[{i}]"))
                for i, part in enumerate(made)
            ]
        elif kind in CASTS and torch.equal(made.to(args[0].dtype), args[0]):
            first = self._known[first_input(node).name]
            self._known[node.name] = Constant(made, first.source, first.base, first.index)
        else:
            if kind in CASTS:  # it rounds, so the constant is no longer the parameter
                self.uses[self._known[first_input(node).name].source] += 1
            self._known[node.name] = (_one_entry if kind in FILLED else _entry_each)(made, own)

    def _shown(self, node: torch.fx.Node) -> str:
        path, call = module_of(node)
        return ".".join(p for p in (call_name(path, call), op_name(node)) if p)

    def _arguments(
        self, node: torch.fx.Node, data: Container[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, with tensors and numbers in place of nodes.

        Raises:
            Refused: If a number depends on the number of images, or on the data.
        """
        moves = str(node.target) in MOVEMENTS | DIVISIONS | CASTS
        given = (*node.args, *node.kwargs.values())
        # a symbol inside of a shape is no argument of its own, and allowed
        direct = [a for a in given if isinstance(a, torch.fx.Node)]
        symbols = [a for a in direct if isinstance(a.meta.get("val"), SYMBOLS)]
        if not moves and any(a.name not in self.numbers for a in symbols):
            msg = "its constant depends on the number of images, or on the data"
            raise Refused(msg)

        def argument(node: torch.fx.Node) -> Any:
            constant = self._known.get(node.name)
            if constant is not None:
                self.uses[constant.source] += not moves
                return constant.tensor
            if node.name in data:
                return self._like(node.meta["val"])
            if node.name in self.numbers:
                return self.numbers[node.name]
            return self._for_one_image(node)

        return torch.fx.map_arg(node.args, argument), torch.fx.map_arg(node.kwargs, argument)

    def _like(self, data: Tensor) -> Tensor:
        """Zeros in place of data, for one image."""
        dtype = self.dtype if self.is_cast and data.is_floating_point() else data.dtype
        shape = [n if isinstance(n, int) else 1 for n in data.shape]  # the batch is a symbol
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _for_one_image(self, node: torch.fx.Node) -> Any:
        return self.number_of(node, 1)

    def number_of(self, node: torch.fx.Node, images: int) -> Any:
        """The value of a number in the graph, such as an extent, for a batch of some images.

        Raises:
            Refused: If it depends on anything but the batch.
        """
        if node.name in self.numbers:
            return self.numbers[node.name]
        symbol = node.meta["val"]
        batch = self.capture.image.meta["val"].shape[0].node.expr
        if not isinstance(symbol, SYMBOLS) or symbol.node.expr.free_symbols - batch.free_symbols:
            msg = "its shape or a number in it is read from the data"
            raise Refused(msg)
        return symbol.node.pytype(symbol.node.expr.subs(batch, images))


def depends_on_dtype(capture: Capture, wanted: Container[torch.fx.Node]) -> bool:
    """Whether constants may have other values if the model has another dtype.

    They may if the forward casts, reads floating numbers, or makes tensors from numbers.

    Args:
        capture: The captured graph.
        wanted: The nodes that the network's end depends on.
    """
    nodes = [node for node in capture.nodes if node in wanted or _asserts(node, wanted)]
    return capture.reads_floats or any(_names_dtype(node, capture) for node in nodes)


def _asserts(node: torch.fx.Node, wanted: Container[torch.fx.Node]) -> bool:
    return str(node.target) == DTYPE_ASSERTION and first_input(node) in wanted


def _names_dtype(node: torch.fx.Node, capture: Capture) -> bool:
    """Whether the dtype of a node's output is not that of the model's tensors."""
    is_made = capture.names.get(node.name) == MADE_IN_FORWARD
    if is_made and capture.tensors[node.name].is_floating_point():
        return True
    if node.op != "call_function":
        return False
    if not node.all_input_nodes:  # a tensor made of numbers
        return True
    given = (*node.args, *node.kwargs.values())
    if _is_floating(node) and not any(map(_is_floating, node.all_input_nodes)):
        return True  # it has PyTorch's default dtype, as 0.3 * mask has
    return str(node.target) in CASTS or any(
        isinstance(a, torch.dtype) and a.is_floating_point for a in given
    )


def _is_floating(node: torch.fx.Node) -> bool:
    made = node.meta.get("val")
    return isinstance(made, Tensor) and made.is_floating_point()


def _one_entry(tensor: Tensor, source: ConstantSource) -> Constant:
    """A constant that is the same number everywhere and has one entry."""
    index = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
    return Constant(tensor, source, tensor.flatten()[:1], index)


def _entry_each(tensor: Tensor, source: ConstantSource) -> Constant:
    """A constant with an entry for each element."""
    index = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
    return Constant(tensor, source, tensor, index)
