"""The house: rooms whose imports go one way, short functions, and what an installation needs."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from importlib.resources import files
from pathlib import Path
from textwrap import dedent

from packaging.requirements import Requirement

import adjointbackmap as abm

ROOT = Path(__file__).parents[1]
SOURCE = Path(abm.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WIDEST = 100  # characters in a line
LONGEST = 45  # lines of code in a function
LAYERS = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
# Hyperplanes draw themselves when they are asked to; matplotlib is loaded then.
DRAWN = {("planes", "plots")}
MODULES = sorted(SOURCE.rglob("*.py"))


@cache
def tree(path):
    return ast.parse(path.read_text())


def part(name):
    """The folder or module of the package that a dotted name leads into."""
    return name.split(".")[1] if "." in name else ""


def imported(path):
    """Dotted names of this package that a module imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def parts():
    """Folder or module at the top -> those that it imports."""
    graph = {}
    for path in MODULES:
        own = path.relative_to(SOURCE).with_suffix("").parts[0]
        if own != "__init__":
            names = [name for name in imported(path) if name.startswith("adjointbackmap.")]
            graph.setdefault(own, set()).update(map(part, names))
    return {own: {p for p in found if p != own} for own, found in graph.items()}


def lines_of_code(function, lines):
    """Lines of a function's body, without its docstring, comments and empty lines."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    text = [line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno]]
    return sum(1 for line in text if line and not line.startswith("#"))


def test_imports_have_fewer_than_ten_layers():
    """import-linter holds them; here is their number, and that each part is in one."""
    named = [name for layer in LAYERS for name in layer.replace("|", ":").split(":")]
    named = [name.strip() for name in named]
    assert len(LAYERS) < 10
    assert sorted(named) == sorted(parts())


def test_no_part_imports_one_that_imports_it():
    """Also not by an import inside a function, those of pictures apart."""
    graph = {
        own: {other for other in found if (own, other) not in DRAWN}
        for own, found in parts().items()
    }
    order = list(TopologicalSorter(graph).static_order())
    assert order[-1] == "cli"
    assert set(order) <= set(parts()) | {"__version__"}


def long_functions(path):
    """Functions of a module that are too long."""
    lines = path.read_text().splitlines()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    counts = {function.name: lines_of_code(function, lines) for function in functions}
    name = path.relative_to(SOURCE).as_posix()
    return [(name, f, n) for f, n in counts.items() if n > LONGEST]


def test_functions_are_short():
    """At most as many lines of code as fit on a screen."""
    assert [found for path in MODULES for found in long_functions(path)] == []


def test_lines_are_short():
    """Those of code, tests, benchmarks and the site's settings; marks for tools not counted."""
    folders = ("src", "tests", "benchmarks", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = [(path.name, line) for path in paths for line in path.read_text().splitlines()]
    text = [(name, line.split("  # type:")[0].split("  # noqa")[0]) for name, line in lines]
    assert [found for found in text if len(found[1]) > WIDEST] == []


def test_types_are_shipped():
    """The mark of a typed package and the stub of its public names lie in the package."""
    for name in ("py.typed", "__init__.pyi"):
        assert (files(abm) / name).is_file()
    built = PROJECT["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"]["packages"] == ["src/adjointbackmap"]
    assert "src" in built["sdist"]["include"]


# an environment with torch, numpy and jaxtyping alone


def needed(name):
    """A distribution and all that it cannot do without."""
    found = {name}
    left = [name]
    while left:
        try:
            texts = requires(left.pop()) or []
        except PackageNotFoundError:  # of another platform
            continue
        for requirement in map(Requirement, texts):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in found:
                found.add(requirement.name)
                left.append(requirement.name)
    return found


def importable():
    """Top-level names that torch, numpy, jaxtyping and what they need define."""
    installed = set().union(*map(needed, ("torch", "numpy", "jaxtyping")))
    installed = {name.lower().replace("_", "-") for name in installed}
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if any(owner.lower().replace("_", "-") in installed for owner in owners)
    )


BARE = dedent(
    """
    import sys
    from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

    ALLOWED = {{*sys.stdlib_module_names, "adjointbackmap", *{allowed!r}}}

    class OnlyAllowed(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            top = name.split(".")[0]
            if top in ALLOWED or top.startswith("_sysconfigdata"):  # its name is the platform's
                return super().find_spec(name, path, target)
            return None  # as if it were not installed

    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyAllowed]
    import torch
    import adjointbackmap as abm

    for blocked in ("safetensors", "xarray", "zarr", "rich", "cyclopts", "matplotlib", "scipy"):
        try:
            __import__(blocked)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{{blocked}} is not blocked")
    torch.manual_seed(0)
    parts = [torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3)]
    model = torch.nn.Sequential(*parts).double().eval()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    network = abm.trace(model, x)
    planes = abm.hyperplanes(network, x, "3", "RM0")
    torch.testing.assert_close(planes.value, model(x).detach())
    abm.reconstruction_test(planes)
    abm.dense_test(abm.operator(network, x, "0"), x)
    assert max(abm.audit(network, x).values()) < 1e-12
    assert all(check.share == 1 for check in abm.verify(network, x).values())
    blocks = list(abm.iter_hyperplanes(network, x, "0", "RM2", memory=20_000))
    assert len(blocks) > 1
    assert abm.fold(model, x).model is not model
    assert abm.kink_distances(network, x[:1])
    assert abm.sparsity(network, x)
    """
)


def test_the_engine_needs_torch_numpy_and_jaxtyping_alone():
    """Everything else is refused to the imports of a fresh process."""
    allowed = importable()
    assert {"torch", "numpy", "jaxtyping"} <= set(allowed)
    code = BARE.format(allowed=allowed)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
