"""A copy of a module's structure, which shares the code and the tensors and nothing else.

Hooks are registered, and tensors replaced, on such a copy only, because another thread may run the
model at the same time.
"""

import sys
import weakref
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, TypeVar, cast

from torch import Tensor, nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# Types whose values cannot lead to a module, so that they are shared.
ATOMS = (type(None), bool, int, float, complex, str, bytes)
LISTS = (list, set, deque)
DICTIONARIES = (dict, OrderedDict, defaultdict)
NAMESPACES = (SimpleNamespace, Namespace)
EMPTY = frozenset(name for name, table in vars(nn.Module()).items() if isinstance(table, dict))
# Objects and functions of these libraries are shared, not copied.
SHARED_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}


def structural_copy(model: M, tensor: Callable[[Tensor], Tensor] | None = None) -> M:
    """Copy the modules, containers, hooks and objects that a module holds; its tensors are shared.

    A function that refers to a module of the model, such as a hook, refers to the copy's module
    instead.

    Args:
        model: Any module; it is not changed.
        tensor: Gives the tensor to use instead of each tensor; by default the tensor itself.

    Returns:
        A module of the same class.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> copied = structural_copy(model)
        >>> copied[0] is model[0], copied[0].weight is model[0].weight
        (False, True)
    """
    return _Copier(tensor or (lambda shared: shared)).copied(model)


class _Copier:
    """Copies a structure; an object that is met twice is copied once."""

    def __init__(self, tensor: Callable[[Tensor], Tensor]) -> None:
        self.tensor = tensor
        # id -> the original and its copy; the original stays alive, so no other object gets its id
        self.made: dict[int, tuple[Any, Any]] = {}

    def copied(self, value: T) -> T:
        if type(value) in ATOMS:
            return value
        if id(value) not in self.made:
            way = _way(value)
            self.keep(value, value)
            if way is not None:
                self.keep(value, way(self, value))
        return cast("T", self.made[id(value)][1])

    def keep(self, original: Any, copy: T) -> T:
        """Remember a copy before its contents are copied, because they may lead back to it."""
        self.made[id(original)] = (original, copy)
        return copy

    # one method for each kind of value

    def tensors(self, value: Tensor) -> Tensor:
        return self.tensor(value)

    def instance(self, value: Any) -> Any:
        """A module, or an object of a user's class, with copies of its attributes."""
        kind = type(value)
        new = self.keep(value, kind() if kind in NAMESPACES else object.__new__(kind))
        for name, part in attributes_of(value).items():
            # most attributes of a module are empty tables of hooks: this saves a third of the time
            is_empty = type(part) in DICTIONARIES and not part and name in EMPTY
            object.__setattr__(new, name, part.copy() if is_empty else self.copied(part))
        if isinstance(value, nn.Module):
            new.__dict__["_compiled_call_impl"] = None  # compiled code would run the original
        return new

    # Containers: value.copy() keeps the class and its options, such as a maximal length.
    # We iterate over a copy, because another thread may change the container.

    def list_like(self, value: Any) -> Any:
        new = self.keep(value, value.copy())
        parts = [self.copied(part) for part in value.copy()]
        new.clear()
        add = new.add if isinstance(new, set) else new.append
        for part in parts:
            add(part)
        return new

    def dictionary(self, value: Any) -> Any:
        new = self.keep(value, value.copy())
        parts = [(self.copied(key), self.copied(part)) for key, part in value.copy().items()]
        new.clear()
        new.update(parts)
        return new

    def tuple_like(self, value: Any) -> Any:
        parts = [self.copied(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)

    def method(self, value: MethodType) -> MethodType:
        return MethodType(self.copied(value.__func__), self.copied(value.__self__))

    def partial(self, value: partial[Any]) -> partial[Any]:
        arguments = {name: self.copied(part) for name, part in value.keywords.items()}
        new = partial(self.copied(value.func), *self.copied(value.args), **arguments)
        new.__dict__.update(value.__dict__)
        return new

    def function(self, value: FunctionType) -> FunctionType:
        """A function whose closure variables and default arguments are copies."""
        cells = value.__closure__
        # cells that are shared with a function copied before are the ones made for it
        inside = cells and tuple(self.made.get(id(c), (c, CellType()))[1] for c in cells)
        new = FunctionType(value.__code__, value.__globals__, value.__name__, None, inside)
        self.keep(value, new)
        for cell, own in zip(cells or (), inside or (), strict=True):
            if id(cell) not in self.made and _is_filled(cell):
                self.keep(cell, own)
                own.cell_contents = self.copied(cell.cell_contents)
        new.__defaults__ = self.copied(value.__defaults__)
        new.__kwdefaults__ = self.copied(value.__kwdefaults__)
        new.__qualname__ = value.__qualname__
        new.__module__ = value.__module__
        new.__dict__.update(value.__dict__)
        return new

    def reference(self, value: weakref.ref[Any]) -> weakref.ref[Any]:
        target = value()
        return value if target is None else weakref.ref(self.copied(target))


def contents_of(value: Any) -> list[tuple[str, Any]] | None:
    """Names and values inside a container, function or object.

    The name is empty except for attributes. The result is ``None`` for an object whose contents
    are not copied.
    """
    way = _way(value)
    if isinstance(value, list | set | deque | tuple):
        return [("", part) for part in list(value)]
    if isinstance(value, dict):
        return [("", part) for pair in list(value.items()) for part in pair]
    if way is _Copier.reference:
        return [("", value())]
    if way is _Copier.partial:
        return [("", value.func), ("", value.args), ("", value.keywords)]
    if way is _Copier.method:
        return [("", value.__func__), ("", value.__self__)]
    if way is _Copier.function:
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [("", part) for part in (*cells, value.__defaults__, value.__kwdefaults__)]
    return list(attributes_of(value).items()) if way is _Copier.instance else None


def attributes_of(value: Any) -> dict[str, Any]:
    """An object's attributes, from its dictionary and its slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    # dict(...) copies in one step: another thread may set an attribute in the meantime
    in_dictionary = dict(getattr(value, "__dict__", ()))
    return {**in_dictionary, **{name: getattr(value, name) for name in slots}}


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return tuple(name for name in names if not name.startswith("__"))


def _way(value: Any) -> Callable[[_Copier, Any], Any] | None:
    """The method that copies a value; ``None`` if it is shared."""
    kind = type(value)
    if isinstance(value, Tensor):
        return _Copier.tensors
    if kind in LISTS:
        return _Copier.list_like
    if kind in DICTIONARIES:
        return _Copier.dictionary
    if kind is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return _Copier.tuple_like
    if kind is weakref.ref:
        return _Copier.reference
    if kind is partial:
        return _Copier.partial
    if kind is MethodType:
        return _Copier.method
    if kind is FunctionType:
        return None if is_of_library(value) or not _refers(value) else _Copier.function
    return _Copier.instance if _is_entered(value) else None


def is_of_library(value: Any) -> bool:
    """Whether an object or function is of PyTorch, NumPy or the standard library."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] in SHARED_LIBRARIES


def _refers(function: FunctionType) -> bool:
    """Whether a function holds objects: closure variables or default arguments."""
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_entered(value: Any) -> bool:
    """Whether a value is a module, or an object that can be copied and may lead to a module.

    An object is shared if making another one has side effects: its class has its own ``__new__`` or
    ``__del__``.
    """
    kind = type(value)
    if isinstance(value, nn.Module):
        return True
    if kind in NAMESPACES:
        return True
    if isinstance(value, type | Enum) or is_of_library(kind):
        return False
    if kind.__new__ is not object.__new__:  # type: ignore[comparison-overlap]
        return False
    return not hasattr(kind, "__del__") and bool(attributes_of(value))
