"""Numbers that a forward reads from its constants, recorded in a run and replayed in the capture.

``float(self.a)``, ``self.shape.tolist()``, ``if self.flag:`` and ``x[:, self.mask]`` need the
values of a buffer, which ``torch.export`` does not know. One run of the model with real tensors
records them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that give Python one number of a tensor, and how they convert it. While a model is
# captured, PyTorch may call another one of these than in the run: all are recorded as NUMBER.
NUMBER = "item"
NUMBER_READS: dict[str, Callable[[Any], Any]] = {
    NUMBER: lambda number: number,
    "__bool__": bool,
    "is_nonzero": bool,
    "__int__": int,
    "__index__": int,
    "__float__": float,
}
LIST = "tolist"

# Functions that give Python or NumPy several numbers at once, or text or a Boolean made from them.
READS = {"numpy", "__array__", "__contains__", "__format__", "__repr__", "equal", "allclose"}

# Functions whose output has a shape that depends on the values.
PLACES = {"nonzero", "argwhere"}

# Functions that take numbers, which may come as tensors without dimensions: x[self.place],
# x.view(self.n, -1).
ASSIGNMENT = "__setitem__"
INDEXING = {"__getitem__", ASSIGNMENT}
FACTORIES = {"arange", "zeros", "ones", "full", "empty", "linspace"}
NEW = {"new_zeros", "new_ones", "new_full"}
SHAPING = set(
    "view reshape expand repeat tile narrow select roll split chunk squeeze unsqueeze permute "
    "transpose flatten unflatten pad broadcast_to repeat_interleave".split()
)
TAKES_NUMBERS = INDEXING | FACTORIES | NEW | SHAPING

# Functions that read only the shape, dtype or device of their first argument ...
SHAPE_OF_FIRST = {"zeros_like", "ones_like", "full_like", "new_tensor", *NEW}
# ... or of the other arguments.
SHAPE_OF_OTHERS = {"to", "type_as", "expand_as", "view_as", "reshape_as"}

# The second run has this many images more than the first. An integer slope * N + offset differs by
# a multiple of it; any other difference comes from the data.
MORE_IMAGES = 3
FROM_DATA = object()  # in place of a value that depends on the image
FOREIGN = object()  # in place of a value of a tensor that neither the model nor its forward holds


class FixedBatch(Exception):
    """A forward turns the number of images into a Python integer, which fixes the batch size."""


class ForeignTensor(Exception):
    """A forward reads a number of a tensor that no module of the model holds."""


@dataclass(frozen=True)
class PerBatch:
    """An integer that depends on the number N of images alone: ``slope * N + offset``."""

    slope: int
    offset: int


@dataclass
class Readings:
    """What one run read, in order.

    Attributes:
        images: Number of images of the run.
        tensors: Names of the parameters and buffers that were read.
        found: Name of each function that read values, and the values.
    """

    images: int
    found: list[tuple[str, Any]] = field(default_factory=list)

    tensors: set[str] = field(default_factory=set)

    @property
    def floats(self) -> bool:
        """Whether any values are floating numbers, which depend on the dtype of the constants.

        Every array and tensor counts.
        """
        leaves = _leaves([value for _, value in self.found])
        return any(
            isinstance(leaf, float) or getattr(leaf, "dtype", None) is not None for leaf in leaves
        )

    def joined(self, other: "Readings") -> "Readings":
        """The readings for any number of images, from two runs with different numbers."""
        pairs = zip(self.found, other.found, strict=False)
        same = len(self.found) == len(other.found)

        def meet(one: tuple[str, Any], two: tuple[str, Any]) -> Any:
            if not same or one[0] != two[0]:
                return FROM_DATA
            return _for_any_batch(one[1], two[1], self.images, other.images)

        found = [(one[0], meet(one, two)) for one, two in pairs]
        return Readings(self.images, found, self.tensors | other.tensors)


def _for_any_batch(one: Any, two: Any, images: int, more: int) -> Any:
    """One value for both runs: the same, a :class:`PerBatch`, or ``FROM_DATA`` if they differ."""
    if _is_unknown(one) or _is_unknown(two) or type(one) is not type(two):
        return one if one is two else FROM_DATA
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return FROM_DATA
        parts = [_for_any_batch(a, b, images, more) for a, b in zip(one, two, strict=True)]
        return FROM_DATA if any(p is FROM_DATA for p in parts) else type(one)(parts)
    if isinstance(one, Tensor):
        return one if torch.equal(one, two) else FROM_DATA
    if hasattr(one, "tobytes"):  # an array
        return one if one.shape == two.shape and one.tobytes() == two.tobytes() else FROM_DATA
    if one == two or (one != one and two != two):  # both may be nan
        return one
    slope, rest = divmod(two - one, more - images) if type(one) is int else (0, 1)
    return FROM_DATA if rest else PerBatch(slope, one - slope * images)


def _is_unknown(value: Any) -> bool:
    return value is FROM_DATA or value is FOREIGN


class Reader(TorchFunctionMode):
    """Records what a run with real tensors reads from constants.

    A tensor that is not known to be a constant counts as data. Once Python has read a number of the
    data, tensors that are made afterwards count as data too: they may be made from that number.

    Args:
        constants: The parameters, buffers and other tensors of the model.
        images: The images of the run.
        names: Id of a constant -> its name.
    """

    def __init__(
        self, constants: Iterable[Tensor], images: Tensor, names: Mapping[int, str]
    ) -> None:
        super().__init__()
        # memory of a constant -> names of the tensors that it was computed from
        self.made_of: dict[int, frozenset[str]] = {}
        self.readings = Readings(len(images))
        self.made = {_memory(images)}  # memory of data that was seen
        self.has_read_data = False
        # memory of a constant -> a tensor there, which keeps the memory from being used again
        self.known: dict[int, Tensor] = {}
        for constant in constants:
            own = {names[id(constant)]} if id(constant) in names else set()
            self._know(constant, self.made_of.get(_memory(constant), frozenset()) | own)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = _tensors_in((args, kwargs))
        before = [(t, _version(t)) for t in tensors]
        of_constants = self._is_constant(name, tensors)
        numbers = _read_by(name, args, kwargs)
        if numbers is not None:
            self._keep(name, [_value_of(t) for t in numbers], numbers)
        output = func(*args, **kwargs)
        if name == LIST or name in NUMBER_READS:
            # during the capture a list is read number by number
            for number in args[0].detach().flatten().tolist():
                self._keep(NUMBER, number, tensors)
        elif name in READS or (name in PLACES and tensors):
            self._keep(name, _kept(output), tensors)
        if of_constants:
            for tensor in _tensors_in(output):
                self._know(tensor, self._names_of(tensors))
        else:
            self.made.update(_memory(tensor) for tensor in _tensors_in(output))
            for tensor, version in before:
                if _version(tensor) != version:  # data was written into it
                    self.known.pop(_memory(tensor), None)
        return output

    def _keep(self, name: str, value: Any, read: Sequence[Tensor]) -> None:
        """Record a value that was read from tensors, or a placeholder if one is no constant."""
        unknown = {_memory(tensor) for tensor in read} - self.known.keys()
        if unknown:
            value = FROM_DATA if unknown & self.made else FOREIGN
            # an assignment through a mask gives Python no number and no shape
            self.has_read_data |= name != ASSIGNMENT
        self.readings.tensors |= self._names_of(read)
        self.readings.found.append((name, value))

    def _names_of(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Names of all that some tensors were computed from."""
        each = (self.made_of.get(_memory(tensor), frozenset()) for tensor in tensors)
        return frozenset[str]().union(*each)

    def _know(self, tensor: Tensor, names: frozenset[str]) -> None:
        memory = _memory(tensor)
        if memory:
            self.known[memory] = tensor
            self.made_of[memory] = self.made_of.get(memory, frozenset()) | names

    def _is_constant(self, name: str, tensors: list[Tensor]) -> bool:
        if self.has_read_data:
            return False
        read = (
            tensors[:1]
            if name in SHAPE_OF_OTHERS
            else tensors[1:]
            if name in SHAPE_OF_FIRST
            else tensors
        )
        return all(_memory(t) in self.known for t in read)


class Replay(TorchFunctionMode):
    """Gives a forward, while it is captured, the values that an earlier run has read.

    Args:
        readings: What the run has read.
        images: Number of images of a batch, which may be symbolic.
    """

    def __init__(self, readings: Readings, images: Any) -> None:
        super().__init__()
        self.images = images
        self.left = iter(readings.found)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        numbers = _read_by(name, args, kwargs)
        if numbers is not None:
            values = self._next(name)
            if not _is_unknown(values):
                args, kwargs = _with_numbers(args, kwargs, numbers, values)
        if name in NUMBER_READS:
            value = self._next(NUMBER)
            if value is FOREIGN:
                raise ForeignTensor
            if isinstance(value, torch.SymInt) and name != NUMBER:
                raise FixedBatch  # int(...) and the like cannot return a symbol
            if not _is_unknown(value):
                return NUMBER_READS[name](value)
        elif name in READS or (name in PLACES and _tensors_in((args, kwargs))):
            value = self._next(name)
            if not _is_unknown(value):
                return value
        return func(*args, **kwargs)

    def _next(self, name: str) -> Any:
        expected, value = next(self.left, ("", FROM_DATA))
        if expected != name:
            self.left = iter(())  # the forward takes another path: nothing after it is known
            return FROM_DATA
        return _with_batch(value, self.images)


def _with_batch(value: Any, images: Any) -> Any:
    """A value with every :class:`PerBatch` computed, and with copies of arrays."""
    if isinstance(value, PerBatch):
        return value.slope * images + value.offset
    if isinstance(value, list | tuple):
        return type(value)(_with_batch(v, images) for v in value)
    return value.copy() if hasattr(value, "tobytes") else value


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _leaves(tree: Any) -> Iterator[Any]:
    """All values in nested tuples, lists, dicts and slices, in order."""
    if isinstance(tree, slice):
        yield from _leaves((tree.start, tree.stop, tree.step))
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _leaves(part)
    elif isinstance(tree, dict):
        yield from _leaves(tuple(tree.values()))
    else:
        yield tree


def _read_by(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """Arguments of a function whose values it needs: integers, and masks used as an index.

    ``None`` if there are none.
    """
    if name not in TAKES_NUMBERS:
        return None
    if name not in FACTORIES:
        # the first argument is the data; the third one of __setitem__ is data too
        args = args[1:2] if name in INDEXING else args[1:]
    found = _tensors_in((args, kwargs))
    return [t for t in found if _is_index_number(t) or (_is_mask(t) and name in INDEXING)] or None


def _is_index_number(tensor: Tensor) -> bool:
    return (
        not tensor.dim()
        and not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.dtype != torch.bool
    )


def _is_mask(tensor: Tensor) -> bool:
    return bool(tensor.dim()) and tensor.dtype in (torch.bool, torch.uint8)


def _value_of(tensor: Tensor) -> Any:
    """The number, or the places where a mask is true: one index tensor for each dimension."""
    return tensor.nonzero(as_tuple=True) if tensor.dim() else tensor.item()


def _with_numbers(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], values: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with numbers and index tensors in place of some tensors.

    A mask with several dimensions becomes several indices.
    """
    by_id = {id(t): value for t, value in zip(tensors, values, strict=True)}

    def put(tree: Any, top: bool = False) -> Any:
        if isinstance(tree, slice):
            return slice(put(tree.start), put(tree.stop), put(tree.step))
        if isinstance(tree, tuple | list):
            parts: list[Any] = []
            for part in tree:
                placed = put(part)
                parts += (
                    placed if isinstance(placed, tuple) and isinstance(part, Tensor) else [placed]
                )
            return type(tree)(parts) if type(tree) in (tuple, list) else tuple(parts)
        return by_id.get(id(tree), tree) if isinstance(tree, Tensor) else tree

    first = args[:1]
    rest = tuple(put(a) for a in args[1:])
    if first and id(first[0]) in by_id:
        first = (by_id[id(first[0])],)
    return (*first, *rest), {key: put(value) for key, value in kwargs.items()}


def _memory(tensor: Tensor) -> int:
    """Identity of a tensor's storage, which its views share; 0 if it has none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # a tensor of inference mode has no version
        return 0


def _kept(value: Any) -> Any:
    """A copy of a value, which the forward cannot change."""
    if isinstance(value, tuple):
        return tuple(_kept(v) for v in value)
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if hasattr(value, "tobytes") else value


def readings_of(
    run: Callable[[Tensor], Any],
    constants: Iterable[Tensor],
    example: Tensor,
    named: Mapping[str, Tensor],
) -> Readings:
    """What a model reads from constants, for any number of images.

    If a first run reads anything, a second run with another number of images shows what depends on
    that number.

    Args:
        run: Calls the model.
        constants: Its parameters, buffers and other tensors.
        example: A batch of images.
        named: Name -> parameter or buffer.
    """
    constants = list(constants)
    names = {id(tensor): name for name, tensor in named.items()}

    def once(x: Tensor) -> Readings:
        with torch.no_grad(), Reader(constants, x, names) as reader:
            run(x)
        return reader.readings

    first = once(example.clone())
    if all(_is_unknown(value) for _, value in first.found):
        return first
    other = example[:1].flip(-1) / 2  # another image, in the range of the example's
    more = other.expand(len(example) + MORE_IMAGES, *example.shape[1:]).clone()
    return first.joined(once(more))
