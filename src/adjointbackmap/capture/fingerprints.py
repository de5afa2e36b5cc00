"""Fingerprints of a model, by which every call checks that it is as it was traced."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointbackmap.capture.copies import ATOMS, contents_of, structural_copy
from adjointbackmap.capture.entering import Entrance, run
from adjointbackmap.capture.globals_read import globals_read

Names = Mapping[str, frozenset[str]]
"""Path of a module, or :data:`GLOBALS` -> names of attributes."""

GLOBALS = "global variables"  # the key of what belongs to no module
# Attributes that every module has: parameters, buffers, submodules and hooks are compared apart.
INTERNAL = frozenset(nn.Module().__dict__)
COMPARED_VALUES = (*ATOMS, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
ONLY_VALUES = frozenset(COMPARED_VALUES) - {float, complex}
# Of a longer container only identity and length are compared, because its contents take too long.
LONGEST = 10_000
# Bytes of a tensor up to which a CRC-32 is faster than a sum of weighted words.
SMALL = 2**12
BLOCK = 2**16  # words of 8 bytes that are summed at once; there are as many weights
# Bytes of an element -> integer dtype in which its bits are summed.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Same:
    """Wraps an object so that it is equal only to itself."""

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
        read: The attributes to compare, from :func:`attributes_read`.
    """
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    found: dict[str, Any] = {
        name: _tensor_state(tensor) for name, tensor in named_tensors(model).items()
    }
    found["the modules"] = tuple(modules)
    for path, module in modules.items():
        whose = path or "the model"
        found[f"class of {whose}"] = type(module)
        hooks = (*module._forward_pre_hooks.values(), None, *module._forward_hooks.values())
        if len(hooks) > 1:
            found[f"hooks of {whose}"] = tuple(map(Same, hooks))
        found.update(_attributes(path, module, read.get(path, frozenset()), paths))
    chosen = read.get(GLOBALS, frozenset())
    states = _global_states(model, paths) if chosen else {}
    return {**found, **{name: states.get(name) for name in chosen}}


def attributes_read(model: nn.Module, x: Tensor, entrance: Entrance | None = None) -> Names:
    """The attributes that a forward reads but does not change.

    They are found in one forward pass of a copy of the model. An attribute that the forward sets,
    such as a counter of its calls, is not among them.

    Args:
        model: Any module.
        x: A batch that it takes.
        entrance: Where the batch enters, if not at the beginning.
    """
    copied = structural_copy(model)
    modules = dict(copied.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    read: dict[str, set[str]] = {path: set() for path in modules}

    def now() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in modules.items():
            found.update(_attributes(path, module, frozenset(module.__dict__), paths))
        return found

    before = now()
    variables = _global_states(model, {})
    for path, module in modules.items():
        module.__class__ = _spied(type(module), read[path])
    with torch.no_grad():
        run(copied, x.clone(), entrance)
    after = now()
    written = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    kept = {
        path: frozenset(n for n in names if _attribute_name(path, n) not in written)
        for path, names in read.items()
    }
    later = _global_states(model, {})
    return {**kept, GLOBALS: frozenset(n for n in variables if variables[n] == later.get(n))}


def _global_states(model: nn.Module, paths: Mapping[int, str]) -> dict[str, Any]:
    """Name of each global variable that a forward reads -> a comparable state."""
    return {name: _comparable(v, paths, {}) for name, v in globals_read(model).items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**parameters, **buffers}


def _spied(kind: type, names: set[str]) -> type:
    """A subclass that adds the name of every attribute that is read to ``names``."""
    get: Callable[..., Any] = kind.__getattribute__

    def spy(self: Any, name: str) -> Any:
        if not name.startswith("__"):
            names.add(name)
        return get(self, name)

    own = {
        "__getattribute__": spy,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), own)


def _attribute_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _attributes(
    path: str, module: nn.Module, names: frozenset[str], paths: Mapping[int, str]
) -> Iterator[tuple[str, Any]]:
    """Names and comparable states of some attributes of a module.

    An attribute may be the class's: a method that was replaced on the module itself is found too.
    """
    own = module.__dict__
    kind = type(module)
    tensors = (module._parameters, module._buffers)
    for name, whole_name in _compared_names(path, names):
        if name in tensors[0] or name in tensors[1] or name in module._modules:
            continue
        value = own[name] if name in own else getattr(kind, name, None)
        yield whole_name, _comparable(value, paths, {})


@lru_cache(maxsize=4096)  # every call asks for the same modules
def _compared_names(path: str, names: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """The names of the attributes of a module that are compared, without and with its path."""
    return tuple((name, _attribute_name(path, name)) for name in names - INTERNAL)


def _comparable(value: Any, paths: Mapping[int, str], seen: dict[int, int]) -> Any:
    """A state of a value that stays equal as long as the value and its contents are the same.

    Args:
        value: Any value.
        paths: Id of a module of the model -> its path.
        seen: Id of a value that was met before -> its number, since contents may lead back to it.
    """
    kind = type(value)
    if kind in COMPARED_VALUES:
        return kind, repr(value) if kind in (float, complex) else value  # nan is the same as nan
    if kind is tuple and ONLY_VALUES.issuperset(kinds := tuple(map(type, value))):
        return value, kinds  # most attributes are such: kernel sizes, strides, paddings
    if id(value) in paths:
        return "module", paths[id(value)]
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return _tensor_state(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, zlib.crc32(value.tobytes())
    parts = contents_of(value)
    if parts is None or len(parts) > LONGEST:
        return Same(value), None if parts is None else len(parts)
    which = Same(value) if kind is FunctionType else kind  # the code of a function is its own
    return which, *((name, _comparable(part, paths, seen)) for name, part in parts)


def _tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    """Memory, version, shape, dtype and a checksum of the bits.

    The checksum finds changes through ``.data``, which leave the version as it was.
    """
    if tensor.device.type == "meta":
        return ()
    if tensor.layout != torch.strided or tensor.is_quantized:
        return Same(tensor), tensor.dtype
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype, _checksum(tensor.detach())


def _checksum(tensor: Tensor) -> tuple[int, ...]:
    """Weighted sums of the bits: they change with any element, and if two are exchanged."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if real.device.type == "cpu":
        return (_sum_of_words(real.reshape(-1).view(torch.uint8).numpy()),)
    # (first dimension, all others); the weights find rows or columns that were exchanged
    bits = real.reshape(len(real) if real.dim() else 1, -1).view(BITS[real.element_size()])
    is_matrix = bits.shape[0] > 1 and bits.shape[1] > 1
    sums = (bits.sum(1), bits.sum(0)) if is_matrix else (bits.flatten().long(),)
    return tuple(int((s * _factors(len(s), s.device)).sum()) for s in sums)


def _sum_of_words(memory: np.ndarray) -> int:
    """A checksum of bytes: words of 8 bytes, each times a weight, modulo 2 ** 64.

    The weights are odd, so that a change of one word always changes the sum. A small memory, or one
    that is not made of words, has a CRC-32.
    """
    if memory.nbytes <= SMALL or memory.nbytes % 8:
        return zlib.crc32(memory.data)
    words = memory.view(np.int64)
    weights = _weights()
    sums = [
        np.dot(part, weights[: len(part)])
        for part in (words[start : start + BLOCK] for start in range(0, len(words), BLOCK))
    ]
    # the blocks in the same way, so that they cannot be exchanged either
    return int(sums[0]) if len(sums) == 1 else _sum_of_words(np.array(sums).view(np.uint8))


@lru_cache(maxsize=1)
def _weights() -> np.ndarray:
    """Odd weights, the same in every process."""
    return np.random.default_rng(0).integers(-(2**62), 2**62, BLOCK) * 2 + 1


@lru_cache(maxsize=256)  # networks have few lengths, and each is looked up in every call
def _factors(count: int, device: torch.device) -> Tensor:
    """One factor for each row, or each column."""
    return torch.arange(1, count + 1, device=device)
