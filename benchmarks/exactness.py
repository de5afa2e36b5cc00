"""Claim: in float64 every layer of the trained networks that ship is reproduced to rounding.

usage: python benchmarks/exactness.py [--only resnet20] [--docs docs/exactness.md]

Four tests of every layer on two images of the sample: every unit against its hyperplane, some units
in each mode, the dot test, and some rows of the matrix against ``torch.func.jacrev``. Each finished
network is kept in the file of results, so that a stopped run goes on.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adjointbackmap as abm
from adjointbackmap import data, machine, models
from adjointbackmap.engine.observe import record, record_call
from adjointbackmap.files.disk import write
from adjointbackmap.planes.units import unit_dims
from adjointbackmap.report.sheets import PagePlace, Sheet

LIMIT = 1e-12  # of each test, as in the functions that raise
IMAGES = 2
ROWS = 8  # of a layer's matrix in the dense test: all rows of a first layer take gigabytes
UNITS = 4  # of each mode of a layer
TESTS = ("every unit", "modes", "dot", "dense")
PLACE = PagePlace(
    "<!-- exactness: written by benchmarks/exactness.py -->", "<!-- exactness: end -->"
)


def environment() -> dict[str, Any]:
    """What the figures may depend on."""
    here = machine.environment()
    return {key: here[key] for key in ("torch", "python", "threads")}


# the tests of a layer


def drawn(value: Tensor, count: int) -> Tensor:
    """Places of random entries of a value, those that are not zero before those that are.

    A dead unit has a hyperplane of zeros, whose errors are zero.
    """
    flat = value.flatten()
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return torch.cat([order[flat[order] != 0], order[flat[order] == 0]])[:count]


def mode_errors(network: abm.Network, x: Tensor, layer: abm.Layer) -> dict[str, float]:
    """Reconstruction test of random units in each mode of a layer: mode -> scale-aware error."""
    errors = {}
    for mode in layer.modes:
        generator = torch.Generator().manual_seed(0)
        channels = network.kernel(layer).rule.in_channels if layer.kernel is not None else 0
        sizes = unit_dims(layer, mode, channels).values()
        units = tuple(torch.randint(size, (UNITS,), generator=generator) for size in sizes)
        planes = abm.hyperplanes(network, x, layer.name, mode, units=units)
        errors[mode] = abm.reconstruction_test(planes, tolerance=float("inf"))["error"]
    return errors


def dense_error(operator: abm.LayerOperator, x: Tensor, value: Tensor) -> float:
    """Difference of some rows of a layer's matrix from the untouched model's, as in the dense test.

    It is relative to the largest entry. Biases whose entry is more than one parameter are left out.
    """
    network = operator.pattern.network
    layer = operator.layer
    units = drawn(value, ROWS)
    cotangents = torch.zeros(len(units), value.numel(), dtype=x.dtype)
    cotangents[torch.arange(len(units)), units] = 1
    image, bias = operator.adjoint(cotangents.view(1, -1, *layer.out_shape))

    tensors = dict(network.model.named_parameters()) | dict(network.model.named_buffers())
    parts = {p.parameter: p for p in network.biases.values() if p.parameter is not None}

    def rows(values: dict[str, Tensor], one: Tensor) -> Tensor:
        outputs = record_call(network, one[None], [layer], {**tensors, **values}).outputs
        return outputs[layer.name].flatten()[units]

    tensors = {name: tensor.detach() for (name, tensor) in tensors.items()}
    chosen = {name: tensors[name] for name in parts}
    by_values, by_image = torch.func.jacrev(rows, (0, 1))(chosen, x[0])
    errors = [difference(image[0].detach(), by_image.detach())]
    for name, part in parts.items():
        errors.append(difference(bias[0][:, part.slice], by_values[name].reshape(len(units), -1)))
    return largest(errors)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    scale = float(theirs.abs().max()) or 1.0
    return float((ours - theirs).abs().max()) / scale


def check_image(network: abm.Network, x: Tensor) -> dict[str, dict[str, Any]]:
    """The four tests of every layer on one image.

    Returns:
        Layer -> number of units, number of units within 1 %, and the errors.
    """
    checks = abm.verify(network, x)
    layers = network.distinct_layers()
    with torch.no_grad():
        values = record(network, x, layers).outputs
    found = {}
    for layer in layers:
        operator = abm.operator(network, x, layer.name)
        check = checks[layer.name]
        found[layer.name] = {
            "units": check.units,
            "within": check.within,
            "every unit": check.scaled,
            "modes": mode_errors(network, x, layer),
            "dot": abm.dot_test(operator, tolerance=float("inf"))["error"],
            "dense": dense_error(operator, x, values[layer.name]),
        }
    return found


# networks


def check(name: str) -> dict[str, Any]:
    """The four tests of every layer of a shipped network.

    Units are added up over the images; errors are the largest of all images.
    """
    model = models.load(name).double()
    x = models.preprocessing(name)(images().unit_interval().double())
    network = abm.trace(model, x[:1])
    started = time.perf_counter()
    found = [check_image(network, image[None]) for image in x]
    return {
        "images": len(x),
        "biases": len(network.biases),
        "seconds": round((time.perf_counter() - started) / len(x), 1),
        "layers": {layer: merged([one[layer] for one in found]) for layer in found[0]},
    }


def images() -> data.Images:
    """Some images of the sample, spread over its classes."""
    sample = data.sample()
    return sample[:: len(sample) // IMAGES][:IMAGES]


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN if one is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One layer on several images: counts are summed, errors go through a maximum."""

    def rounded(of: Callable[[dict], float]) -> float:
        return float(f"{largest(map(of, found)):.3g}")  # the page shows two digits

    return {
        "units": sum(one["units"] for one in found),
        "within": sum(one["within"] for one in found),
        **{test: rounded(lambda one, t=test: one[t]) for test in TESTS if test != "modes"},
        "modes": {m: rounded(lambda one, m=m: one["modes"][m]) for m in found[0]["modes"]},
    }


# the page


def error_of(layer: dict[str, Any], test: str) -> float:
    """The error of a layer in a test; of all modes, the largest."""
    return largest(layer[test].values()) if test == "modes" else layer[test]


def worst(network: dict[str, Any], test: str) -> tuple[float, str]:
    """The largest error of a network in a test, and its layer."""
    return max((error_of(layer, test), name) for name, layer in network["layers"].items())


def total(networks: list[dict[str, Any]], key: str) -> int:
    """Sum of a count over all layers of some networks."""
    return sum(layer[key] for network in networks for layer in network["layers"].values())


def row(title: str, networks: list[dict[str, Any]]) -> list[str]:
    """Counts and largest errors of some networks."""
    units = total(networks, "units")
    layers = sum(len(network["layers"]) for network in networks)
    cells = [f"{layers}", f"{units:,}", f"{100 * total(networks, 'within') / units:.4f} %"]
    for test in TESTS:
        (error, layer) = max(worst(network, test) for network in networks)
        where = f" (`{layer}`)" if error and len(networks) == 1 else ""
        cells.append(f"{error:.1e}{where}" if error else "0")
    return [title, *cells]


def markdown(found: dict[str, Any]) -> str:
    """The table of the networks, with where it was measured."""
    sheet = Sheet("", ["network", "layers", "units", "within 1 %", *TESTS])
    networks = found["networks"]
    sheet.rows = [row(f"`{name}`", [network]) for name, network in networks.items()]
    sheet.rows.append(row("**all**", list(networks.values())))
    where = found["environment"]
    machine = (
        f"Measured once, on {where['threads']} thread of a machine with {where['cores']} cores, "
        f"with torch {where['torch']} and Python {where['python']}."
    )
    return f"{sheet.markdown()}\n\n{machine}"


def failures(found: dict[str, Any]) -> list[str]:
    """Networks and layers with an error above the limit."""
    return [
        f"{name} ({test} of {layer})"
        for name, network in found["networks"].items()
        for layer, errors in network["layers"].items()
        for test in TESTS
        if not error_of(errors, test) <= LIMIT
    ]


def kept_with(found: dict[str, Any], name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The results with one more, in the order of the table, and where it was measured."""
    networks = {**found["networks"], name: result}
    return {
        "environment": {**environment(), "cores": os.cpu_count()},
        "images": list(images().hashes),
        "networks": {n: networks[n] for n in models.names() if n in networks},
    }


def main() -> None:
    """Check every network that the file of results lacks, and print the table.

    Raises:
        SystemExit: If an error is above the limit.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the networks to run")
    parser.add_argument("--out", type=Path, default=Path("docs/results/exactness.json"))
    parser.add_argument("--docs", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    for name in models.names():
        if arguments.only in name and name not in found["networks"]:
            result = check(name)
            print(name, {t: worst(result, t) for t in TESTS}, flush=True)
            found = kept_with(found, name, result)
            write(arguments.out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    if arguments.docs:
        PLACE.check(arguments.docs)
        PLACE.fill(arguments.docs, markdown(found))
    if failures(found):
        msg = f"Errors must be at most {LIMIT:.0e}. Got more in {', '.join(failures(found))}."
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
