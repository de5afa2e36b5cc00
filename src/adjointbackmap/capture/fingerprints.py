"""What a model computes with, in a form that can be compared: every call holds the model against its trace."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointbackmap.capture.copies import ATOMS, parts_of, structural_copy

Names = Mapping[str, frozenset[str]]
"""Path of a module -> names of attributes."""

# Parameters, buffers, submodules and hooks, which are looked at by themselves.
INTERNAL = frozenset(nn.Module().__dict__)
VALUES = (*ATOMS, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
ONLY_VALUES = frozenset(VALUES) - {float, complex}
LONGEST = 10_000  # a longer container is known by its identity and its length alone
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Same:
    """An object that is equal to itself alone."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(model: nn.Module, read: Names) -> dict[str, Any]:
    """Tensors, classes, hooks, and the attributes that the forward reads, by name.

    Two fingerprints of a model are equal as long as it computes the same.

    Args:
        model: Any module.
        read: What :func:`attributes_read` gave for it.
    """
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    found: dict[str, Any] = {name: _tensor(tensor) for name, tensor in tensors_of(model).items()}
    found["the modules"] = tuple(modules)
    for path, module in modules.items():
        whose = path or "the model"
        found[f"class of {whose}"] = type(module)
        hooks = (*module._forward_pre_hooks.values(), None, *module._forward_hooks.values())
        if len(hooks) > 1:
            found[f"hooks of {whose}"] = tuple(map(Same, hooks))
        found.update(_attributes(path, module, read.get(path, frozenset()), paths))
    return found


def attributes_read(model: nn.Module, x: Tensor) -> Names:
    """The attributes that a forward reads and leaves as they are, from one pass of a copy of the model.

    What the forward sets itself, such as a feature that it keeps or a counter of its calls, is none of these.

    Args:
        model: Any module.
        x: A batch that it takes.
    """
    copied = structural_copy(model)
    modules = dict(copied.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    read: dict[str, set[str]] = {path: set() for path in modules}

    def now() -> dict[str, Any]:
        each = [
            _attributes(path, module, frozenset(module.__dict__), paths)
            for path, module in modules.items()
        ]
        return {name: state for states in each for name, state in states}

    before = now()
    for path, module in modules.items():
        module.__class__ = _spied(type(module), read[path])
    with torch.no_grad():
        copied(x.clone())
    after = now()
    written = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {
        path: frozenset(n for n in names if _name(path, n) not in written)
        for path, names in read.items()
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    parameters, buffers = (
        named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers)
    )
    return {**dict(parameters), **dict(buffers)}


def _spied(kind: type, names: set[str]) -> type:
    """A class that is another in one thing: it notes which attributes are read."""
    get: Callable[..., Any] = kind.__getattribute__

    def spy(self: Any, name: str) -> Any:
        if not name.startswith("__"):
            names.add(name)
        return get(self, name)

    told = {
        "__getattribute__": spy,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), told)


def _name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _attributes(
    path: str, module: nn.Module, names: frozenset[str], paths: Mapping[int, str]
) -> Iterator[tuple[str, Any]]:
    """Some attributes of a module, its own or its class's: methods too, which may be put on the module itself."""
    own = module.__dict__
    kind = type(module)
    registered = (module._parameters, module._buffers, module._modules)
    for name in names - INTERNAL:
        if any(name in those for those in registered):
            continue
        value = own[name] if name in own else getattr(kind, name, None)
        yield _name(path, name), _state(value, paths, {})


def _state(value: Any, paths: Mapping[int, str], seen: dict[int, int]) -> Any:
    """What is equal as long as a value is the same, and everything that it holds."""
    kind = type(value)
    if kind in VALUES:
        return kind, repr(value) if kind in (float, complex) else value  # nan is the same as nan
    if kind is tuple and ONLY_VALUES.issuperset(kinds := tuple(map(type, value))):
        return value, kinds  # most attributes are such: kernel sizes, strides, paddings
    if id(value) in paths:
        return "module", paths[id(value)]
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, zlib.crc32(value.tobytes())
    parts = parts_of(value)
    if parts is None or len(parts) > LONGEST:
        return Same(value), None if parts is None else len(parts)
    which = Same(value) if kind is FunctionType else kind
    return which, *((name, _state(part, paths, seen)) for name, part in parts)


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    """Memory, version, shape, dtype and a checksum of the bits, which finds an edit through ``.data``."""
    if tensor.device.type == "meta":
        return ()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return Same(tensor), tensor.dtype
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype, _checksum(tensor.detach())


def _checksum(tensor: Tensor) -> tuple[int, ...]:
    """Sums of the bits along rows and columns, each row and column with a factor: rows that change places change it."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.reshape(len(real) if real.dim() else 1, -1).view(BITS[real.element_size()])
    sums = (
        (bits.sum(1), bits.sum(0))
        if bits.shape[0] > 1 and bits.shape[1] > 1
        else (bits.flatten().long(),)
    )
    return tuple(int((s * _factors(len(s), s.device)).sum()) for s in sums)


@lru_cache(maxsize=256)  # networks have few lengths, and each is looked up in every call
def _factors(count: int, device: torch.device) -> Tensor:
    """One factor for each row, or each column."""
    return torch.arange(1, count + 1, device=device)
