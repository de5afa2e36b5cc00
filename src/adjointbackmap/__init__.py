"""Exact effective hyperplanes of any unit of any layer of a piecewise-affine network."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _read_contents() -> dict[str, str]:
    """Public name -> module that defines it, read from the stub beside this file.

    Type checkers and editors read the same stub, so each name stands in one place.
    """
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {name.name: node.module or "" for node in imports for name in node.names}


_CONTENTS = _read_contents()
__all__ = list(_CONTENTS)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts without torch.

    Raises:
        AttributeError: If the package has no such name.
    """
    if name not in _CONTENTS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    home = _CONTENTS[name]
    if home == __name__:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
