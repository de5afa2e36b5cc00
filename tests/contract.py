"""What users call, as JSON: names, signatures and members of the package, options of the commands.

``contract.json`` holds what was promised, and ``test_contract.py`` compares the package with it.
``python tests/contract.py`` adds what is new, and neither drops nor changes what is there.
"""

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import adjointbackmap as abm
from adjointbackmap.cli.frame import app

PACKAGE = abm.__name__
KEPT = Path(__file__).with_suffix(".json")
# only `trace` and the functions of the package call these constructors
MADE_HERE = ("Network", "Layer", "LayerOperator", "ActivationPattern", "StoredPlanes")


def names() -> dict[str, Any]:
    """Public name -> the parameters of a function, or the members of a class or a module."""
    return {name: _described(getattr(abm, name)) for name in abm.__all__}


def commands() -> dict[str, dict[str, str]]:
    """Command -> its options and arguments, with all their spellings and their defaults."""
    import adjointbackmap.cli  # noqa: F401 - it registers the commands

    return {command: dict(_options(of)) for command, of in _commands(app, ())}


def _commands(parent: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name in parent:
        if not name.startswith("-"):
            child = parent[name]
            yield " ".join((*path, name)), child
            yield from _commands(child, (*path, name))


def _options(command: Any) -> Iterator[tuple[str, str]]:
    if command.default_command is not None:
        for argument in command.assemble_argument_collection():
            if argument.names == ("*",):  # options that several commands share; each follows
                continue
            default = argument.field_info.default
            required = default is inspect.Parameter.empty
            spellings = " ".join(sorted(argument.names))
            yield spellings, "required" if required else _shown(default)


def _described(thing: Any) -> Any:
    if isinstance(thing, ModuleType):
        return {name: _described(part) for name, part in _parts(thing)}
    if inspect.isclass(thing):
        return _members(thing)
    return _parameters(thing) if callable(thing) else type(thing).__name__


def _parts(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a public module defines, or that it lists as its own."""
    for name in sorted(getattr(module, "__all__", vars(module))):
        part = getattr(module, name)
        home = getattr(part, "__module__", None) or ""
        is_own = "__all__" in vars(module) or f"{home}.".startswith(f"{module.__name__}.")
        is_called = inspect.isroutine(part) or inspect.isclass(part)
        if is_own and is_called and not name.startswith("_"):
            yield name, part


def _members(kind: type) -> dict[str, Any]:
    """Constructor, methods, properties and fields of a class that this package defines."""
    found: dict[str, Any] = {}
    if kind.__name__ not in MADE_HERE and _has_constructor(kind):
        found["(constructor)"] = _parameters(kind)
    fields = getattr(kind, "__dataclass_fields__", {})
    own = {name for base in kind.__mro__ if _is_ours(base) for name in vars(base)}
    for name in sorted(own.union(fields)):
        if name.startswith("_"):
            continue
        member = inspect.getattr_static(kind, name, None)
        if isinstance(member, staticmethod | classmethod):
            member = getattr(kind, name)
        found[name] = _parameters(member) if _is_function(member) else "attribute"
    return found


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(PACKAGE)


def _parameters(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [_parameter(parameter) for parameter in parameters if parameter.name != "self"]


def _parameter(parameter: inspect.Parameter) -> str:
    """``name``, ``*name`` or ``name = default``; ``(by name)`` if it has no position."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.default is not inspect.Parameter.empty:
        text = f"{text} = {_shown(parameter.default)}"
    by_name = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    return f"{text} (by name)" if by_name else text


def _shown(value: object) -> str:
    """A default as text, without addresses in memory and module paths."""
    if isinstance(value, Path):
        return str(value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if type(value).__module__.startswith(PACKAGE):
        return type(value).__name__
    return repr(value)


def _is_function(member: object) -> bool:
    return inspect.isfunction(member) or inspect.ismethod(member)


def _has_constructor(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or "__init__" in vars(kind)


def described() -> dict[str, Any]:
    """The package as it is."""
    return {"names": names(), "commands": commands()}


def kept() -> dict[str, Any]:
    """What was promised."""
    return json.loads(KEPT.read_text())


def broken(promised: Any, found: Any, place: str = "") -> Iterator[str]:
    """What is missing or no longer as it was promised."""
    if isinstance(promised, dict) and isinstance(found, dict):
        for key, value in promised.items():
            inside = f"{place} / {key}"
            if key in found:
                yield from broken(value, found[key], inside)
            else:
                yield f"{inside} is missing"
    elif isinstance(promised, list) and isinstance(found, list):
        if not _takes(promised, found):
            yield f"{place} takes ({', '.join(found)}), not ({', '.join(promised)})"
    elif promised != found:
        yield f"{place} is {found}, not {promised}"


def _takes(promised: list[str], found: list[str]) -> bool:
    """Whether every call with the promised parameters is as good with those found."""
    places = [name for name in promised if not name.endswith("(by name)")]
    added = [name for name in found if name not in promised]
    optional = all(" = " in name or name.startswith("*") for name in added)
    return found[: len(places)] == places and set(promised) <= set(found) and optional


def _with_new(promised: Any, found: Any) -> Any:
    if not isinstance(promised, dict) or not isinstance(found, dict):
        return promised
    new = {key: value for key, value in found.items() if key not in promised}
    return {key: _with_new(value, found.get(key)) for key, value in promised.items()} | new


if __name__ == "__main__":
    KEPT.write_text(json.dumps(_with_new(kept(), described()), indent=1) + "\n")
