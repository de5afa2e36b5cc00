"""Copies of the operations that move the batch, with the batch as their first dimension.

Attention and windows put the batch second, or merge it with positions: ``(3, N, T, D)``,
``(N * windows, T, D)``, ``(T, N * heads, D)``. Rules need it first and alone. So each such
operation gets a copy on tensors ``(N, ...)`` with the other dimensions in the same order. What the
batch was merged with becomes dimensions of its own.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

PLACE = "place of the batch"  # key of a copy's meta
COPY = "copy with the batch first"  # key of the original's meta: its copy

SHAPES = frozenset(
    "view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_copy".split()
)
PERMUTATIONS = frozenset(
    "permute transpose t movedim moveaxis swapaxes swapdims mT numpy_T adjoint".split()
)
SAME = frozenset(
    "clone alias detach contiguous dropout to _to_copy type_as lift_fresh_copy".split()
)
LAST = {"linear": 1, "scaled_dot_product_attention": 2, "matmul": 2, "bmm": 2, "mm": 1, "addmm": 1}
"""Operations of the last dimensions of their data -> how many these are."""
NORMS = frozenset(("layer_norm", "rms_norm", "native_layer_norm"))
BATCH_NORM = "_native_batch_norm_legit_no_training"
PRODUCTS = frozenset(("matmul", "bmm", "mm"))
LONGER = frozenset(("unsqueeze", "stack"))  # their dimension is one of the output's


class Untranslated(Exception):
    """An operation has no copy: a rule refuses it."""


@dataclass(frozen=True)
class Place:
    """Where the batch of N images is in a tensor.

    Attributes:
        dim: Its dimension, of extent ``outer * N * inner``.
        outer: What is merged with it and changes more slowly.
        inner: What is merged with it and changes faster.
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def is_first(self) -> bool:
        """Whether the batch is the first dimension, and alone."""
        return self == FIRST

    @property
    def merged(self) -> list[int]:
        """Extents of the copy's dimensions that the batch is merged with."""
        return [n for n in (self.outer, self.inner) if n > 1]

    def in_copy(self, dim: int, is_new: bool = False) -> int:
        """The dimension of the copy for another one than the batch's.

        Args:
            dim: The dimension, counted from the front.
            is_new: Whether it is a new dimension, before the present one.

        Raises:
            Untranslated: If it is the batch's.
        """
        if dim == self.dim and not is_new:
            raise Untranslated
        return dim + 1 if dim <= self.dim else dim + len(self.merged)

    def batch_first(self, tensor: Tensor) -> Tensor:
        """A tensor with the batch first and alone: ``(N, ...)``.

        Example:
            >>> windows = torch.arange(12).view(6, 2)  # two images of three windows
            >>> Place(0, inner=3).batch_first(windows).shape
            torch.Size([2, 3, 2])
        """
        if self.is_first:
            return tensor
        parts = (self.outer, -1, self.inner)
        first = tensor.unflatten(self.dim, parts).movedim(self.dim + 1, 0)
        before, after = first.shape[1 : self.dim + 1], first.shape[self.dim + 3 :]
        return first.reshape(len(first), *before, *self.merged, *after)


FIRST = Place()


def place_of(shape: Sequence[Any], images: Any, before: int = 1) -> Place | None:
    """The place of the batch in a shape; ``None`` if there is none, or more than one.

    Args:
        shape: The shape.
        images: The symbol of the number of images.
        before: Product of the extents that change more slowly than the batch.
    """
    places = [d for d, n in enumerate(shape) if isinstance(n, torch.SymInt)]
    if len(places) != 1:
        return None
    (dim,) = places
    merged = shape[dim].node.expr / images
    if not merged.is_Integer:
        return None
    slower = 1
    for n in shape[:dim]:
        slower *= n
    if before % slower or int(merged) % (before // slower):
        return None
    outer = before // slower
    return Place(dim, outer, int(merged) // outer)


def put_batch_first(nodes: Sequence[Node], image: Node, given: Sequence[Node] = ()) -> list[Node]:
    """Give each operation that moves the batch a copy with the batch first.

    Args:
        nodes: The nodes of a graph in order; the graph is changed.
        image: The node of the image.
        given: The nodes of other inputs with a batch.

    Returns:
        The nodes with the copies.
    """
    return _Copying(image, given).run(nodes)


def with_batch_first(node: Node) -> Node:
    """The copy of a node, or the node itself if it has none."""
    return node.meta.get(COPY, node)


def output_with_batch_first(node: Node) -> Node:
    """The copy of a node if its batch is first and alone again; else the node itself."""
    copy = with_batch_first(node)
    return copy if place_in(copy).is_first else node


def place_in(node: Node) -> Place:
    """The place of the batch in the tensor that a copy stands for; for other nodes the first."""
    return node.meta.get(PLACE, FIRST)


def _listed(outputs: Any) -> Sequence[Any]:
    """The outputs of an operation, of which there may be one."""
    return outputs if isinstance(outputs, tuple | list) else [outputs]


class _Copying:
    """Walks the graph once.

    Attributes:
        places: Node that depends on the image -> the place of its batch, if that is known.
        copies: Node -> its copy.
    """

    def __init__(self, image: Node, given: Sequence[Node]) -> None:
        self.image = image
        self.images = image.meta["val"].shape[0].node.expr
        self.places: dict[Node, Place | None] = dict.fromkeys((image, *given), FIRST)
        self.copies: dict[Node, Node] = {}
        self.made: list[Node] = []  # of the present node
        self.node = image

    def run(self, nodes: Sequence[Node]) -> list[Node]:
        found = []
        for node in nodes:
            found.append(node)
            if node.op == "call_function" and any(n in self.places for n in node.all_input_nodes):
                self.node, self.made = node, []
                self._visit(node)
                found += self.made
        return found

    def _visit(self, node: Node) -> None:
        data = [n for n in node.all_input_nodes if n in self.places]
        self.places[node] = None
        if not isinstance(node.meta.get("val"), Tensor | tuple | list):
            del self.places[node]  # a size
            return
        if any(self.places[n] is None for n in data):
            self._take_copies(node)
            return
        first = _listed(node.meta["val"])[0]
        ours = all(cast("Place", self.places[n]).is_first for n in data)
        own = place_of(first.shape, self.images) if isinstance(first, Tensor) else None
        if ours and own == FIRST:
            self._take_copies(node)
            self.places[node] = FIRST
            return
        try:
            copy, place = self._copy(node, data)
            self._check(node, copy, place)
        except (Untranslated, RuntimeError, TypeError, IndexError, ValueError):
            for made in reversed(self.made):
                node.graph.erase_node(made)
            self.made = []
            self._take_copies(node)
            return
        self.places[node] = place
        self.copies[node] = copy
        node.meta[COPY] = copy
        copy.meta[PLACE] = place

    @staticmethod
    def _check(node: Node, copy: Node, place: Place) -> None:
        """Check that a copy has the shape that the place of the batch gives it.

        Raises:
            Untranslated: If it has not.
        """
        parts = zip(*(_listed(n.meta["val"]) for n in (node, copy)), strict=False)
        for own, copied in parts:
            before, after = own.shape[: place.dim], own.shape[place.dim + 1 :]
            if list(copied.shape[1:]) != [*before, *place.merged, *after]:
                raise Untranslated

    def _take_copies(self, node: Node) -> None:
        """Read the copies of inputs whose batch is first and alone again."""
        for other in node.all_input_nodes:
            place = self.places.get(other)
            if other in self.copies and place is not None and place.is_first:
                node.replace_input_with(other, self.copies[other])

    # copies

    def _copy(self, node: Node, data: Sequence[Node]) -> tuple[Node, Place]:
        """The copy of an operation, and the place of the batch in the original's output.

        Raises:
            Untranslated: If there is none.
        """
        name = getattr(node.target, "_opname", "getitem")
        first = data[0]
        place = cast("Place", self.places[first])
        if any(self.places[n] != place for n in data):
            raise Untranslated
        if name == "getitem":
            if first not in self.copies:  # a rule gives all outputs as they are
                raise Untranslated
            return self._one_of(node, first), self._kept(place, node.meta["val"].shape)
        if name in SHAPES:
            return self._reshaped(node, first, place)
        if name in PERMUTATIONS:
            return self._permuted(node, first, place)
        if name in ("expand", "expand_as"):
            return self._expanded(node, first, place)
        rank = first.meta["val"].dim()
        dims = [n.meta["val"].dim() for n in data]
        if name in NORMS and place.dim < rank - len(cast("list[int]", node.args[1])):
            return self._call(node.target, *self._with_copies(node.args), **node.kwargs), place
        if name == BATCH_NORM and place.dim == 0:
            return self._batch_norm(node, first, place), place
        if name in LAST and place.dim < rank - min(LAST[name], self._own_last(node, name)):
            return self._product(node, name, place), place
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if name in SAME or is_pointwise or self._pads_others(node, name, place):
            if {*dims, node.meta["val"].dim()} != {rank}:  # a broadcast gives it more dimensions
                raise Untranslated
            return self._call(node.target, *self._args(node, place, rank), **node.kwargs), place
        return self._along(node, name, first, place)

    @staticmethod
    def _pads_others(node: Node, name: str, place: Place) -> bool:
        """Whether an operation pads last dimensions after the batch's."""
        if name not in ("constant_pad_nd", "pad"):
            return False
        padded = len(cast("list[int]", node.args[1])) // 2
        return place.dim < node.meta["val"].dim() - padded

    @staticmethod
    def _own_last(node: Node, name: str) -> int:
        """How many last dimensions of the data a product reads: one beside a matrix."""
        other = node.args[1]
        is_matrix = isinstance(other, Node) and other.meta["val"].dim() <= 2
        return 1 if name == "matmul" and is_matrix else LAST[name]

    def _kept(self, place: Place, shape: Sequence[Any]) -> Place:
        """The place in an output in which the batch is merged with what it was before.

        Raises:
            Untranslated: If it is merged with something else.
        """
        places = [d for d, n in enumerate(shape) if isinstance(n, torch.SymInt)]
        if len(places) != 1 or shape[places[0]].node.expr != (
            self.images * place.outer * place.inner
        ):
            raise Untranslated
        return Place(places[0], place.outer, place.inner)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node after the present one."""
        fake = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.image.meta["val"].fake_mode:
            value = target(*fake[0], **fake[1])
        after = self.made[-1] if self.made else self.node
        with self.node.graph.inserting_after(after):
            made = self.node.graph.call_function(target, args, kwargs)
        kept = {k: v for k, v in self.node.meta.items() if k not in (COPY, PLACE)}
        made.meta.update(kept, val=value)
        self.made.append(made)
        return made

    def _of(self, node: Node) -> Node:
        """The copy of a node, or itself if it needs none."""
        return self.copies.get(node, node)

    def _reshape(self, node: Node, *shape: int) -> Node:
        return self._call(torch.ops.aten.reshape.default, node, [-1, *shape])

    def _reshaped(self, node: Node, first: Node, place: Place) -> tuple[Node, Place]:
        """Numbers in another shape: without the batch, their order is the same.

        Raises:
            Untranslated: If the batch is cut into parts.
        """
        before = place.outer
        for n in first.meta["val"].shape[: place.dim]:
            before *= n
        shape = node.meta["val"].shape
        new = place_of(shape, self.images, before)
        if new is None:
            raise Untranslated
        rest = [*shape[: new.dim], *new.merged, *shape[new.dim + 1 :]]
        return self._reshape(self._of(first), *rest), new

    def _permuted(self, node: Node, first: Node, place: Place) -> tuple[Node, Place]:
        """Dimensions in another order; what the batch is merged with goes along with it."""
        rank = first.meta["val"].dim()
        # each dimension has its own extent, which shows where it goes
        marked = torch.empty(*range(2, rank + 2), device="meta")
        moved = cast("Callable[..., Tensor]", node.target)(marked, *node.args[1:], **node.kwargs)
        order = [n - 2 for n in moved.shape]
        new = Place(order.index(place.dim), place.outer, place.inner)
        dims = [0]
        for dim in order:
            if dim == place.dim:
                dims += [dim + 1 + i for i in range(len(place.merged))]
            else:
                dims.append(place.in_copy(dim))
        return self._call(torch.ops.aten.permute.default, self._of(first), dims), new

    def _expanded(self, node: Node, first: Node, place: Place) -> tuple[Node, Place]:
        """Dimensions repeated, and new ones in front."""
        shape = node.meta["val"].shape
        own = first.meta["val"].shape
        new = self._kept(place, shape)
        copy = self._of(first)
        if len(shape) > len(own):
            ones = [1] * (len(shape) - len(own))
            copy = self._reshape(copy, *ones, *copy.meta["val"].shape[1:])
        rest = [*shape[: new.dim], *new.merged, *shape[new.dim + 1 :]]
        return self._call(torch.ops.aten.expand.default, copy, [-1, *rest]), new

    def _product(self, node: Node, name: str, place: Place) -> Node:
        """A product with the last dimensions of the data.

        Raises:
            Untranslated: If its factors do not have the same dimensions.
        """
        is_matrix = name in ("linear", "mm", "addmm") or self._own_last(node, name) == 1
        rank = node.meta["val"].dim()
        args = self._with_copies(node.args) if is_matrix else self._args(node, place, rank)
        data = [n for n in node.all_input_nodes if n in self.places]
        ranks = {n.meta["val"].dim() for n in data}
        is_first = node.args[name == "addmm"] in data
        if ranks != {rank} or not is_first or (is_matrix and len(data) > 1):
            raise Untranslated
        if name in PRODUCTS:
            return self._call(torch.ops.aten.matmul.default, *args)
        if name != "addmm":
            return self._call(node.target, *args, **self._kwargs(node, place))
        if node.kwargs:
            raise Untranslated
        product = self._call(torch.ops.aten.matmul.default, *args[1:])
        return self._call(torch.ops.aten.add.Tensor, product, args[0])

    def _batch_norm(self, node: Node, first: Node, place: Place) -> Node:
        """Batch norm of rows of all images: the channels come after the merged dimension."""
        copy = self._of(first)
        rank = copy.meta["val"].dim()
        channels = 1 + len(place.merged)
        order = [0, channels, *(d for d in range(1, rank) if d != channels)]
        permute = torch.ops.aten.permute.default
        moved = self._call(permute, copy, order)
        outputs = self._call(node.target, moved, *node.args[1:])
        normed = self._call(operator.getitem, outputs, 0)
        return self._call(permute, normed, [order.index(d) for d in range(rank)])

    def _one_of(self, node: Node, first: Node) -> Node:
        """One of several outputs.

        Raises:
            Untranslated: If the copy has only the first.
        """
        copy = self._of(first)
        if not isinstance(copy.meta["val"], Tensor):
            return self._call(node.target, copy, node.args[1])
        if node.args[1] != 0:
            raise Untranslated
        return self._call(torch.ops.aten.alias.default, copy)

    def _along(self, node: Node, name: str, first: Node, place: Place) -> tuple[Node, Place]:
        """An operation along dimensions other than the batch's, which it names.

        Raises:
            Untranslated: If it names none, or the batch's.
        """
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        names = [a.name for a in schema]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        dims = [n for n in names if n.startswith("dim")]
        if len(dims) != 1 or dims[0] not in ("dim", "dims") or name == "tile":
            raise Untranslated
        asked = given.get(dims[0], 0 if "dim" in dims else None)
        rank = first.meta["val"].dim() + (name in LONGER)
        several = asked if isinstance(asked, list | tuple) else [asked]
        in_copy = [place.in_copy(cast("int", d) % rank, name in LONGER) for d in several]
        given[dims[0]] = in_copy if isinstance(asked, list | tuple) else in_copy[0]
        new = {self._kept(place, output.shape) for output in _listed(node.meta["val"])}
        if len(new) > 1:
            raise Untranslated
        args = torch.fx.map_arg(tuple(given.values()), lambda n: self._aligned(n, place, rank))
        by_name = dict(zip(given, args, strict=True))
        positional = [a.name for a in schema if not a.kwarg_only and a.name in by_name]
        rest = {n: v for n, v in by_name.items() if n not in positional}
        return self._call(node.target, *(by_name[n] for n in positional), **rest), new.pop()

    def _with_copies(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with copies of the data."""
        return torch.fx.map_arg(args, self._of)

    def _args(self, node: Node, place: Place, rank: int) -> tuple[Any, ...]:
        """The arguments with copies of the data, and constants that are broadcast as before."""
        return torch.fx.map_arg(node.args, lambda n: self._aligned(n, place, rank))

    def _kwargs(self, node: Node, place: Place) -> dict[str, Any]:
        rank = node.meta["val"].dim()
        return torch.fx.map_arg(node.kwargs, lambda n: self._aligned(n, place, rank))

    def _aligned(self, node: Node, place: Place, rank: int) -> Node:
        """The copy of the data; or a constant in a shape that is broadcast with it.

        Raises:
            Untranslated: If the constant depends on the number of images, or differs among them.
        """
        if node in self.places:
            return self._of(node)
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return node
        if any(isinstance(n, torch.SymInt) for n in value.shape):
            raise Untranslated
        at = place.dim - (rank - value.dim())  # the constant's dimension that meets the batch
        if at < 0:
            return node
        if value.shape[at] != 1:
            raise Untranslated
        missing = [1] * (place.dim - at)
        ones = [1] * len(place.merged)
        shape = [1, *missing, *value.shape[:at], *ones, *value.shape[at + 1 :]]
        return self._call(torch.ops.aten.reshape.default, node, shape)
