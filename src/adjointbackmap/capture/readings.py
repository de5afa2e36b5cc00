"""Numbers that a forward reads from its constants: kept in one run of the model, put in their place in the captured graph.

``float(self.a)``, ``self.shape.tolist()``, ``if self.flag:`` and ``x[:, self.mask]`` need the values of a buffer, which
``torch.export`` does not look at. One run of the model with real tensors finds them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that give Python one number of a tensor, and the kind of number. A tensor that is captured may take one for another.
NUMBER = "item"
NUMBERS: dict[str, Callable[[Any], Any]] = {
    NUMBER: lambda number: number,
    "__bool__": bool,
    "is_nonzero": bool,
    "__int__": int,
    "__index__": int,
    "__float__": float,
}
LIST = "tolist"

# Functions that give Python or NumPy more than one number.
READS = {"numpy", "__array__", "__contains__", "__format__", "__repr__", "equal", "allclose"}

# Functions that give places whose number depends on the values.
PLACES = {"nonzero", "argwhere"}

# Functions that take numbers, which may come as tensors without dimensions: x[self.place], x.view(self.n, -1).
INDEXING = {"__getitem__", "__setitem__"}
FACTORIES = {"arange", "zeros", "ones", "full", "empty", "linspace"}
TAKES_NUMBERS = {
    *INDEXING,
    *FACTORIES,
    *(
        "view",
        "reshape",
        "expand",
        "repeat",
        "tile",
        "narrow",
        "select",
        "roll",
        "new_zeros",
        "new_ones",
        "new_full",
    ),
    *(
        "split",
        "chunk",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "pad",
        "broadcast_to",
    ),
    "repeat_interleave",
}

# Functions that read only the shape, dtype or device of their first argument ...
SHAPE_ONLY = {
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_tensor",
}
# ... or of what comes after it.
LIKE_FIRST = {"to", "type_as", "expand_as", "view_as", "reshape_as"}

MORE_IMAGES = 3  # between two runs: an integer that is a multiple of N, plus a number, shows itself
FROM_DATA = object()  # in the place of a value that depends on the image
FOREIGN = (
    object()
)  # in the place of a value of a tensor that neither the model nor its forward holds


class FixedBatch(Exception):
    """A forward turns the number of images into an integer of Python, which no graph for any batch size can hold."""


class ForeignTensor(Exception):
    """A forward reads a number of a tensor that is no parameter, buffer or attribute of a module."""


@dataclass(frozen=True)
class PerBatch:
    """An integer that depends on the number N of images alone: ``slope * N + offset``."""

    slope: int
    offset: int


@dataclass
class Readings:
    """What one run read, in order.

    Attributes:
        found: Name of each function that read values, and what it found.
        images: Images of the run.
    """

    images: int
    found: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def floats(self) -> bool:
        """Whether there are floating numbers, which are rounded to the dtype of the constants."""
        return any(
            isinstance(leaf, float) or getattr(leaf, "dtype", None) is not None
            for leaf in _leaves([v for _, v in self.found])
        )

    def joined(self, other: "Readings") -> "Readings":
        """The readings for any number of images, from two runs with different numbers of them."""
        pairs = zip(self.found, other.found, strict=False)
        same = len(self.found) == len(other.found)

        def meet(one: tuple[str, Any], two: tuple[str, Any]) -> Any:
            if not same or one[0] != two[0]:
                return FROM_DATA
            return _for_any_batch(one[1], two[1], self.images, other.images)

        return Readings(self.images, [(one[0], meet(one, two)) for one, two in pairs])


def _for_any_batch(one: Any, two: Any, images: int, more: int) -> Any:
    """The value of two runs: the same, an integer for each number of images, or ``FROM_DATA``."""
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
    if one == two or (one != one and two != two):
        return one
    slope, rest = divmod(two - one, more - images) if type(one) is int else (0, 1)
    return FROM_DATA if rest else PerBatch(slope, one - slope * images)


def _is_unknown(value: Any) -> bool:
    return value is FROM_DATA or value is FOREIGN


class Reader(TorchFunctionMode):
    """Keeps what a run with real tensors reads from constants.

    What is not known to be a constant counts as data. Once Python has a number of the data, tensors that are made
    afterwards are not known: they may be made of that number.

    Args:
        constants: The parameters, buffers and other tensors of the model.
        images: The images of the run.
    """

    def __init__(self, constants: Iterable[Tensor], images: Tensor) -> None:
        super().__init__()
        self.readings = Readings(len(images))
        self.made = {_memory(images)}  # memory of data, as far as it was seen
        self.has_read_data = False
        self.known: dict[
            int, Tensor
        ] = {}  # memory of a constant -> a tensor there, which keeps it from being used again
        for constant in constants:
            self._know(constant)

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
            self._keep(name, [_values(t) for t in numbers], numbers)
        output = func(*args, **kwargs)
        if name == LIST or name in NUMBERS:
            # A list is read number by number, as a tensor that is captured gives it.
            for number in args[0].detach().flatten().tolist():
                self._keep(NUMBER, number, tensors)
        elif name in READS or (name in PLACES and tensors):
            self._keep(name, _kept(output), tensors)
        if of_constants:
            for tensor in _tensors_in(output):
                self._know(tensor)
        else:
            self.made.update(_memory(tensor) for tensor in _tensors_in(output))
            for tensor, version in before:
                if _version(tensor) != version:  # data was written into it
                    self.known.pop(_memory(tensor), None)
        return output

    def _keep(self, name: str, value: Any, read: Sequence[Tensor]) -> None:
        """Keep a value that was read from tensors, if all of them are constants."""
        unknown = {_memory(tensor) for tensor in read} - self.known.keys()
        if unknown:
            value = FROM_DATA if unknown & self.made else FOREIGN
            self.has_read_data = True
        self.readings.found.append((name, value))

    def _know(self, tensor: Tensor) -> None:
        memory = _memory(tensor)
        if memory:
            self.known[memory] = tensor

    def _is_constant(self, name: str, tensors: list[Tensor]) -> bool:
        if self.has_read_data:
            return False
        read = tensors[:1] if name in LIKE_FIRST else tensors[1:] if name in SHAPE_ONLY else tensors
        return all(_memory(t) in self.known for t in read)


class Replay(TorchFunctionMode):
    """Gives a forward that is captured the values that a run before read from the same constants.

    Args:
        readings: What was read.
        images: Images of a batch, which may be symbolic.
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
        if name in NUMBERS:
            value = self._next(NUMBER)
            if value is FOREIGN:
                raise ForeignTensor
            if (
                isinstance(value, torch.SymInt) and name != NUMBER
            ):  # Python takes no symbol for an int
                raise FixedBatch
            if not _is_unknown(value):
                return NUMBERS[name](value)
        elif name in READS or (name in PLACES and _tensors_in((args, kwargs))):
            value = self._next(name)
            if not _is_unknown(value):
                return value
        return func(*args, **kwargs)

    def _next(self, name: str) -> Any:
        expected, value = next(self.left, ("", FROM_DATA))
        if expected != name:
            self.left = iter(())  # another path than that of the run: nothing after it is known
            return FROM_DATA
        return _with_batch(value, self.images)


def _with_batch(value: Any, images: Any) -> Any:
    """A value with every :class:`PerBatch` computed; what is changed by its user is a copy."""
    if isinstance(value, PerBatch):
        return value.slope * images + value.offset
    if isinstance(value, list | tuple):
        return type(value)(_with_batch(v, images) for v in value)
    return value.copy() if hasattr(value, "tobytes") else value


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _leaves(tree: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists, dicts and slices, in order."""
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
    """The integers and masks among a function's arguments whose values it needs; ``None`` where there are none."""
    if name not in TAKES_NUMBERS:
        return None
    start, end = (
        (0, None) if name in FACTORIES else (1, 2 if name in INDEXING else None)
    )  # of a method, the first is the data
    found = _tensors_in((args[start:end], kwargs))
    return [t for t in found if _is_number(t) or (_is_mask(t) and name in INDEXING)] or None


def _is_number(tensor: Tensor) -> bool:
    return (
        not tensor.dim()
        and not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.dtype != torch.bool
    )


def _is_mask(tensor: Tensor) -> bool:
    return bool(tensor.dim()) and tensor.dtype in (torch.bool, torch.uint8)


def _values(tensor: Tensor) -> Any:
    """A number, or the places where a mask holds, one tensor for each of its dimensions."""
    return tensor.nonzero(as_tuple=True) if tensor.dim() else tensor.item()


def _with_numbers(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], values: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with numbers and places instead of tensors; a mask of several dimensions becomes several indices."""
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
    """What two tensors share if one is a view of the other; 0 where that is not known."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # a tensor of inference mode counts none
        return 0


def _kept(value: Any) -> Any:
    """A value that the forward cannot change any more."""
    if isinstance(value, tuple):
        return tuple(_kept(v) for v in value)
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if hasattr(value, "tobytes") else value


def readings_of(
    run: Callable[[Tensor], Any], constants: Iterable[Tensor], example: Tensor
) -> Readings:
    """What ``run`` reads from constants, for any number of images: of one run, or of two if there is anything.

    Args:
        run: Calls the model.
        constants: Its parameters, buffers and other tensors.
        example: A batch of images.
    """
    constants = list(constants)

    def once(x: Tensor) -> Readings:
        with torch.no_grad(), Reader(constants, x) as reader:
            run(x)
        return reader.readings

    first = once(example.clone())
    if all(_is_unknown(value) for _, value in first.found):
        return first
    other = example[:1].flip(-1) / 2  # another image, in the range of the example's
    more = other.expand(len(example) + MORE_IMAGES, *example.shape[1:]).clone()
    return first.joined(once(more))
