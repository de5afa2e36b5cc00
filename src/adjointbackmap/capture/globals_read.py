"""The global variables that a forward reads: numbers, tensors and functions of the user's files."""

from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from adjointbackmap.capture.copies import ATOMS, is_of_library

MOST = 1000  # numbers in a container; a longer one is no setting of a network


def globals_read(model: nn.Module) -> dict[str, Any]:
    """Name of each global variable, with its module -> its value: a number, a tensor, a function.

    Only code of the user's is looked at: the forward of each module, the methods and functions that
    it names, and the functions that it has as attributes.

    Args:
        model: Any module.
    """
    found: dict[str, Any] = {}
    seen: set[FunctionType] = set()
    for kind in {type(module) for module in model.modules()}:
        forward: Any = kind.forward
        if _is_users(forward):
            found.update(_globals_of(forward, kind, seen))
    for module in model.modules():
        for value in filter(_is_users, list(module.__dict__.values())):
            found.update(_globals_of(value, type(module), seen))
    return found


def _is_users(value: Any) -> bool:
    """Whether a value is a function that belongs to no library."""
    return isinstance(value, FunctionType) and not is_of_library(value)


def _globals_of(
    function: FunctionType, kind: type, seen: set[FunctionType]
) -> Iterator[tuple[str, Any]]:
    """The global variables of a function and of the functions that it names."""
    if function in seen:
        return
    seen.add(function)
    around = {**function.__globals__, **_enclosed(function)}
    for name in _names_in(function.__code__) & around.keys():
        value = around[name]
        if _is_plain(value) or _is_users(value):
            yield f"{function.__module__}.{name}", value
        if _is_users(value):
            yield from _globals_of(value, kind, seen)
    for name in function.__code__.co_names:
        if _is_users(getattr(kind, name, None)):
            yield from _globals_of(getattr(kind, name), kind, seen)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, text, a tensor or array, or a container of numbers and text."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return len(value) <= MOST and all(isinstance(part, ATOMS) for part in value)
    return isinstance(value, (*ATOMS, Tensor, np.ndarray))


def _names_in(code: CodeType) -> set[str]:
    """Names that a function and the functions inside it look up."""
    inside = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return {*code.co_names, *code.co_freevars}.union(*inside)


def _enclosed(function: FunctionType) -> dict[str, Any]:
    """The variables of the functions around a function, without those that have no value yet."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType()}
