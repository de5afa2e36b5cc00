"""What a graph computes without the image: constants, each with the tensor of the model or the node that it is made of."""

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

# Operations that only move the elements of a tensor: an entry of b stays known through them.
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

# The same, with several outputs.
DIVISIONS = {
    "aten.chunk.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.unbind.int",
}

# Changes of dtype, which keep an element what it is where nothing is rounded.
CASTS = {
    "aten._to_copy.default",
    "aten.to.device",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.other",
    "aten.type_as.default",
}

# Operations that only read the shape of their data: what they give is a constant.
SHAPE_ONLY = {
    *(
        f"aten.{name}.default"
        for name in "zeros_like ones_like full_like zero new_zeros new_ones new_full".split()
    ),
    *("aten.fill.Scalar", "aten.fill.Tensor"),
}

# Operations that give what happens to be in memory, for a forward to write into: zeros, which are no entries.
UNWRITTEN = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
SHAPE_ONLY |= UNWRITTEN

# Operations that only read the shape and the dtype of what comes after their first argument.
LIKE_SECOND = {
    "aten.type_as.default",
    "aten.to.other",
    "aten.expand_as.default",
    "aten.view_as.default",
    "aten.reshape_as.default",
}

# Operations that give one number everywhere: one entry of b, not one for each element.
FILLED = {
    *SHAPE_ONLY,
    *(f"aten.{name}.default" for name in "full ones zeros scalar_tensor".split()),
}

DTYPE_ASSERTION = "aten._assert_tensor_metadata.default"  # where the model casts; its last argument is the dtype before
SYMBOLS = torch.SymInt | torch.SymFloat | torch.SymBool


class Constants:
    """The constants of a graph in one dtype, found node by node in the order of execution.

    Args:
        capture: The captured graph.
        tensors: Parameters and buffers by the model's names, in the dtype of the capture or to be cast.
        dtype: Dtype of the parameters and buffers: what is computed from them has the dtype that PyTorch gives it.
        device: Where they are.

    Attributes:
        numbers: Name of a node -> the Python number that it reads from constants.
        uses: How often a constant is used, less its uses as an entry of b.
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
        self._several: dict[str, list[Constant]] = {}  # node with several outputs -> these

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def get(self, name: str) -> Constant | None:
        """What a node gives, ``None`` where it is no constant."""
        return self._known.get(name)

    def take(self, node: torch.fx.Node) -> None:
        """Take up an input of the graph that is not the image."""
        name = self.capture.parameters.get(node.name)
        tensor = self.tensors[name] if name is not None else self.capture.tensors[node.name]
        source = (
            ConstantSource(name)
            if name is not None
            else ConstantSource(self.capture.names[node.name], node.name)
        )
        whole = (
            tensor.detach().to(self.dtype)
            if self.is_cast and tensor.is_floating_point()
            else tensor.detach()
        )
        self._known[node.name] = _whole(whole, source)

    def read(self, node: torch.fx.Node) -> None:
        """Keep a number that a node reads from constants; one that hangs on the data or the batch stays a symbol."""
        if node.all_input_nodes and all(
            n.name in self._known or n.name in self.numbers for n in node.all_input_nodes
        ):
            args, kwargs = self._arguments(node, ())
            self.numbers[node.name] = cast("Callable[..., Any]", node.target)(*args, **kwargs)

    def fold(self, node: torch.fx.Node, data: Container[str]) -> None:
        """Compute an operation on constants, for a batch of one; a movement keeps track of the elements.

        Args:
            node: The operation.
            data: Names of the nodes that depend on the image: their shape alone is read.

        Raises:
            Refused: If it depends on the number of images.
        """
        if is_getitem(node) and first_input(node).name in self._several:
            self._known[node.name] = self._several[first_input(node).name][
                cast("int", node.args[1])
            ]
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
            self._known[node.name] = Constant(
                made, first.source, first.base, op(first.index, *args[1:], **kwargs)
            )
        elif kind in DIVISIONS:
            whole = self._known[first_input(node).name]
            parts = zip(made, op(whole.index, *args[1:], **kwargs), strict=True)
            self._several[node.name] = [Constant(t, whole.source, whole.base, i) for t, i in parts]
        elif not isinstance(made, Tensor):
            self._several[node.name] = [
                _whole(part, ConstantSource(own.name, f"{node.name}[{i}]"))
                for i, part in enumerate(made)
            ]
        elif kind in CASTS and torch.equal(made.to(args[0].dtype), args[0]):
            first = self._known[first_input(node).name]
            self._known[node.name] = Constant(made, first.source, first.base, first.index)
        else:
            if kind in CASTS:  # it rounds
                self.uses[self._known[first_input(node).name].source] += 1
            self._known[node.name] = (_filled if kind in FILLED else _whole)(made, own)

    def _shown(self, node: torch.fx.Node) -> str:
        path, call = module_of(node)
        return ".".join(p for p in (call_name(path, call), op_name(node)) if p)

    def _arguments(
        self, node: torch.fx.Node, data: Container[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node with tensors and numbers in the place of nodes.

        Raises:
            Refused: If one depends on the number of images.
        """
        moves = str(node.target) in MOVEMENTS | DIVISIONS | CASTS
        direct = [
            a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.fx.Node)
        ]  # no part of a shape
        symbols = [
            a
            for a in direct
            if isinstance(a.meta.get("val"), SYMBOLS) and a.name not in self.numbers
        ]
        if symbols and not moves:
            msg = "its constant depends on the number of images, or on the data"
            raise Refused(msg)

        def argument(node: torch.fx.Node) -> Any:
            constant = self._known.get(node.name)
            if constant is not None:
                self.uses[constant.source] += not moves
                return constant.tensor
            if node.name in data:
                return self._like(node.meta["val"])
            return (
                self.numbers[node.name] if node.name in self.numbers else self._for_one_image(node)
            )

        return torch.fx.map_arg(node.args, argument), torch.fx.map_arg(node.kwargs, argument)

    def _like(self, data: Tensor) -> Tensor:
        """Zeros in the place of data for one image."""
        dtype = self.dtype if self.is_cast and data.is_floating_point() else data.dtype
        return torch.zeros(
            [n if isinstance(n, int) else 1 for n in data.shape], dtype=dtype, device=self.device
        )

    def _for_one_image(self, node: torch.fx.Node) -> Any:
        """A symbol, such as an extent, at a batch of one.

        Raises:
            Refused: If it depends on anything else.
        """
        symbol = node.meta["val"]
        batch = self.capture.image.meta["val"].shape[0].node.expr
        if not isinstance(symbol, SYMBOLS) or symbol.node.expr.free_symbols - batch.free_symbols:
            msg = "its shape or a number in it is read from the data"
            raise Refused(msg)
        return symbol.node.pytype(symbol.node.expr.subs(batch, 1))


def depends_on_dtype(capture: Capture, wanted: Container[torch.fx.Node]) -> bool:
    """Whether constants of a graph may have other values in a model of another dtype: it casts, or makes tensors of numbers."""
    return capture.reads_floats or any(
        _names_dtype(node, capture)
        for node in capture.nodes
        if node in wanted or _asserts(node, wanted)
    )


def _asserts(node: torch.fx.Node, wanted: Container[torch.fx.Node]) -> bool:
    return str(node.target) == DTYPE_ASSERTION and first_input(node) in wanted


def _names_dtype(node: torch.fx.Node, capture: Capture) -> bool:
    if (
        capture.names.get(node.name) == MADE_IN_FORWARD
        and capture.tensors[node.name].is_floating_point()
    ):
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


def _filled(tensor: Tensor, source: ConstantSource) -> Constant:
    """A tensor of one number everywhere, which is one entry."""
    index = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
    return Constant(tensor, source, tensor.flatten()[:1], index)


def _whole(tensor: Tensor, source: ConstantSource) -> Constant:
    index = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
    return Constant(tensor, source, tensor, index)
