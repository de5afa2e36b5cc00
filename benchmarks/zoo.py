"""Claim: in float64 networks of torchvision and timm are reproduced to rounding, or refused.

usage: python benchmarks/zoo.py [--only resnet] [--out docs/results/zoo.json] [--docs docs/zoo.md]

A refusal must name every cause. The networks have random weights and non-trivial batch-norm
statistics. On one random image, ten units of the output (RM0) and one unit of every layer are
verified. Finished networks are kept in the file, so that a stopped run can continue. torchvision
and timm need an environment of their own, which docs/zoo.md describes.
"""

import argparse
import importlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from exactness import environment
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap.engine.observe import record
from adjointbackmap.files.disk import write
from adjointbackmap.onnx import mend_torchvision
from adjointbackmap.planes.hyperplane import relative_error
from adjointbackmap.report.sheets import PagePlace

LIMIT = 1e-10  # largest scale-aware error
OUTPUTS = 10  # units of the output
PLACE = PagePlace("<!-- zoo: written by benchmarks/zoo.py -->", "<!-- zoo: end -->")
NOT_AFFINE = {  # a product of two values that depend on the image, mul, has no module of its own
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "layer_norm": nn.LayerNorm,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Member:
    """A network of the zoo.

    Attributes:
        name: What its library calls it.
        size: Rows and columns of its image.
        options: What it is built with, weights apart.
        refused: Operations that its refusal must name; empty for a network that is checked.
    """

    name: str
    size: int = 224
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


# The options that their pretrained weights need: each channel of the image is scaled again, and
# there are no auxiliary heads.
INCEPTION = {"transform_input": True, "aux_logits": False, "init_weights": False}
MEMBERS = {
    "torchvision": (
        Member("resnet18"),
        Member("resnet50"),
        Member("vgg16_bn"),
        Member("densenet121"),
        Member("googlenet", options=INCEPTION),
        Member("inception_v3", 299, INCEPTION),
        Member("mobilenet_v2"),
        Member("shufflenet_v2_x1_0"),
        Member("squeezenet1_0"),
        Member("squeezenet1_1"),
        Member("regnet_x_400mf"),
        Member("mnasnet1_0"),
        Member("mobilenet_v3_large", refused=("hardswish", "mul")),
        Member("convnext_tiny", refused=("layer_norm", "gelu")),
        Member("efficientnet_b0", refused=("silu", "sigmoid", "mul")),
    ),
    "timm": (
        Member("resnet18"),
        Member("resnet50"),
        Member("vgg16_bn"),
        Member("densenet121"),
        Member("inception_v3", 299),
        Member("mobilenetv2_100"),
        Member("regnetx_004"),
        Member("mnasnet_100"),
        Member("mobilenetv3_large_100", refused=("hardswish", "mul")),
        Member("convnext_tiny", refused=("layer_norm", "gelu")),
        Member("efficientnet_b0", refused=("silu", "sigmoid", "mul")),
    ),
}
ZOO = {
    f"{library}/{member.name}": member for library, members in MEMBERS.items() for member in members
}


def build(name: str) -> nn.Module:
    """A network of the zoo in eval mode and float64.

    It has random weights and non-trivial batch norms.
    """
    mend_torchvision()
    member = ZOO[name]
    if name.startswith("timm/"):
        model = importlib.import_module("timm").create_model(
            member.name, pretrained=False, **member.options
        )
    else:
        model = importlib.import_module("torchvision").models.get_model(
            member.name, weights=None, **member.options
        )
    torch.manual_seed(0)
    for module in model.eval().double().modules():
        randomise(module)
    return model


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Draw the parameters and statistics of a batch norm, a convolution or a linear layer."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.weight.uniform_(0.5, 1.5)
        module.bias.normal_(0, 0.1)
        module.running_mean.normal_(0, 0.3)
        module.running_var.uniform_(0.5, 2)
    elif isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            module.bias.normal_(0, 0.1)


def image_of(name: str) -> Tensor:
    """A random image at the size of a network, ``(1, 3, size, size)``."""
    size = ZOO[name].size
    return torch.rand(
        1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def check(name: str) -> dict:
    """Errors of ten units of the output and of one unit of every layer, and the time."""
    model = build(name)
    x = image_of(name)
    started = time.perf_counter()
    network = abm.trace(model, x)
    traced = time.perf_counter()
    errors = {"output in RM0": output_errors(network, x), **layer_errors(network, x)}
    # torch's maximum is NaN if there is one
    scaled, relative = torch.tensor(list(errors.values()), dtype=torch.float64).T
    return {
        "size": ZOO[name].size,
        "layers": len(errors) - 1,
        "units": len(errors) - 1 + OUTPUTS,
        "biases": len(network.biases),
        "error": float(scaled.max()),
        "worst": list(errors)[int(scaled.argmax())],
        "relative": float(relative.max()),
        "trace_seconds": round(traced - started, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def output_units(network: abm.Network) -> Tensor:
    """Random units of the output, each once."""
    count = network.layer("output").out_shape[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:OUTPUTS]


def output_errors(network: abm.Network, x: Tensor) -> tuple[float, float]:
    """Largest scale-aware and relative error of ten units of the output in RM0."""
    planes = abm.hyperplanes(network, x, "output", "RM0", units=(output_units(network),))
    figures = abm.reconstruction_test(planes, tolerance=float("inf"))
    return figures["error"], figures["relative"]


@torch.no_grad()
def layer_errors(network: abm.Network, x: Tensor) -> dict[str, tuple[float, float]]:
    """Scale-aware and relative error of one unit of every layer.

    All layers share one activation pattern and one forward pass of the model.
    """
    layers = network.distinct_layers()
    values = record(network, x, layers).outputs
    pattern = abm.record_pattern(network, x)
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for layer in layers:
        value = values.pop(layer.name).flatten()
        unit = drawn(value, generator)
        cotangent = torch.zeros_like(value)
        cotangent[unit] = 1
        planes = abm.LayerOperator(pattern, layer).adjoint(cotangent.view(1, *layer.out_shape))
        errors[layer.name] = errors_of(value[unit], x, network.biases.vector, *planes)
    return errors


def errors_of(
    value: Tensor, x: Tensor, b: Tensor, image: Tensor, bias: Tensor
) -> tuple[float, float]:
    """Scale-aware and relative error of one hyperplane, see :func:`abm.reconstruction_test`."""
    products = torch.cat([(x * image).flatten(), (b * bias).flatten()])
    scale = products.abs().sum().clamp_min(torch.finfo(x.dtype).tiny)
    total = products.sum()
    return float((total - value).abs() / scale), float(relative_error(total, value).abs())


def drawn(value: Tensor, generator: torch.Generator) -> int:
    """A random unit of a layer whose value is not zero; unit 0 if there is none.

    A unit at zero would show little.
    """
    alive = value.nonzero().flatten()
    if not len(alive):
        return 0
    return int(alive[torch.randint(len(alive), (), generator=generator)])


def refusal(name: str) -> dict:
    """The operations for which a network is refused: how often each is named, and where first.

    Raises:
        RuntimeError: If the network is not refused, or a module that is not affine is not named.
    """
    model = build(name)
    try:
        abm.trace(model, image_of(name))
    except abm.UnsupportedOperation as error:
        causes = causes_of(str(error))
    else:
        msg = f"{name} must be refused for {', '.join(ZOO[name].refused)}. Got a network."
        raise RuntimeError(msg)
    for op in ZOO[name].refused:
        paths = {
            path
            for path, module in model.named_modules()
            if isinstance(module, NOT_AFFINE.get(op, ()))
        }
        missing = paths - set(causes.get(op, ()))
        if missing or op not in causes:
            msg = (
                f"The refusal of {name} must name {op} at {len(paths)} modules. "
                f"It leaves out {', '.join(sorted(missing))}."
            )
            raise RuntimeError(msg)
    return {
        "size": ZOO[name].size,
        "refused": {op: {"calls": len(paths), "first": paths[0]} for op, paths in causes.items()},
    }


def causes_of(message: str) -> dict[str, list[str]]:
    """Operation -> its module paths in a message of :class:`abm.UnsupportedOperation`.

    Example:
        >>> causes_of("Every ... Got gelu at stem.1, mul at se (its factor ...): replace them")
        {'gelu': ['stem.1'], 'mul': ['se']}
    """
    listed = message.partition("Got ")[2].rpartition(": ")[0]
    causes: dict[str, list[str]] = {}
    for op, path in re.findall(r"(\w+)(?: at ([\w.]+))?(?: \([^)]*\))?(?:, |$)", listed):
        causes.setdefault(op, []).append(path)
    return causes


def markdown(found: dict) -> str:
    """The tables of what was checked and what was refused."""
    checked = {name: f for name, f in found["networks"].items() if "refused" not in f}
    refused = {name: f["refused"] for name, f in found["networks"].items() if "refused" in f}
    head = "| network | image | layers | units | length of b | worst scale-aware error "
    lines = [f"{head}| worst relative error | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, f in checked.items():
        counts = f"{f['size']} x {f['size']} | {f['layers']} | {f['units']} | {f['biases']:,}"
        lines.append(
            f"| `{name}` | {counts} | {f['error']:.1e} | {f['relative']:.1e} | {f['seconds']:.0f} |"
        )
    lines += ["", "| refused network | operations named: calls, the first of them |", "|---|---|"]
    for name, causes in refused.items():
        listed = ", ".join(f"{op} x {c['calls']} (`{c['first']}`)" for op, c in causes.items())
        lines.append(f"| `{name}` | {listed} |")
    return "\n".join(lines)


def kept_with(found: dict, name: str, result: dict) -> dict:
    """The results with one more, in the order of the zoo, and where it was measured."""
    networks = {**found["networks"], name: result}
    libraries = {library: version(library) for library in MEMBERS}
    return {
        "environment": {**environment(), "cores": os.cpu_count(), **libraries},
        "networks": {n: networks[n] for n in ZOO if n in networks},
    }


def main() -> None:
    """Check every network that the file lacks, and print the tables.

    Raises:
        SystemExit: If an error is above the limit.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the networks to run")
    parser.add_argument("--out", type=Path, default=Path("docs/results/zoo.json"))
    parser.add_argument(
        "--docs", type=Path, help="page to write the tables into, such as docs/zoo.md"
    )
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    for name, member in ZOO.items():
        if arguments.only in name and name not in found["networks"]:
            result = refusal(name) if member.refused else check(name)
            print(name, result, flush=True)
            found = kept_with(found, name, result)
            write(arguments.out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    if arguments.docs:
        PLACE.fill(arguments.docs, markdown(found))
    failed = [name for name, f in found["networks"].items() if not f.get("error", 0.0) <= LIMIT]
    if failed:
        msg = (
            f"the worst error must be at most {LIMIT:.0e} of the scale. "
            f"Got more in {', '.join(failed)}"
        )
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
