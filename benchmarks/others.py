"""Claim: trained networks of others are reproduced in float64 to rounding.

usage: python benchmarks/others.py --folder FOLDER [--only resnet] [--docs PAGE]

Every unit of every layer is verified on ten images. The classifiers in safetensors get images of
the CIFAR-10 sample, the files in ONNX random inputs. The folder can also be named by the variable
ADJOINTBACKMAP_REAL. Finished networks are kept in the file of results, so that a stopped run can
continue. docs/networks-of-others.md describes the folder and the environment.
"""

import argparse
import importlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from exactness import environment
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap import data
from adjointbackmap.files.disk import write
from adjointbackmap.files.weights import load_weights, read_safetensors
from adjointbackmap.report.sheets import PagePlace, Sheet

LIMIT = 1e-12  # scale-aware error, as of our own networks in float64
CONVERTED = 1e-5  # of the largest output: ONNX's evaluator and the module, both in float32
IMAGES = 10
FOLDER = "ADJOINTBACKMAP_REAL"
PLACE = PagePlace("<!-- others: written by benchmarks/others.py -->", "<!-- others: end -->")


# CIFAR-10 classifiers in safetensors


class Normalised(nn.Module):
    """Images in [0, 1], shifted and scaled channel by channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """The scaled image."""
        return (x - self.mean) / self.std


def chain(weights: dict[str, Tensor], *strides: tuple[int, int]) -> nn.Module:
    """Convolutions, then linear layers; a ReLU after all but the last.

    Args:
        weights: By the number of the module; they say how large the layers are.
        strides: Stride and padding of each convolution.
    """
    kernels = [t for name, t in sorted(weights.items(), key=_place) if name.endswith("weight")]
    parts: list[nn.Module] = []
    for kernel, (stride, padding) in zip(kernels, strides, strict=False):
        channels, inputs, size, _ = kernel.shape
        parts += [nn.Conv2d(inputs, channels, size, stride, padding), nn.ReLU()]
    parts.append(nn.Flatten())
    for kernel in kernels[len(strides) :]:
        parts += [nn.Linear(kernel.shape[1], kernel.shape[0]), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _place(item: tuple[str, Tensor]) -> int:
    return int(item[0].partition(".")[0])


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != channels:
            self.shortcut.append(nn.Conv2d(inputs, channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """The ReLU of what both paths give together."""
        inner = self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """The residual networks of VNN-COMP 2021: stages of two blocks, the first with stride 2."""

    def __init__(self, *channels: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, 2, 1)
        for i, (inputs, outputs) in enumerate(pairwise(channels), 1):
            stage = nn.Sequential(Block(inputs, outputs, 2), Block(outputs, outputs, 1))
            self.add_module(f"layer{i}", stage)
        self.stages = len(channels) - 1
        self.linear1 = nn.Linear(features, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten classes."""
        x = torch.relu(self.conv1(x))
        for i in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return self.linear2(torch.relu(self.linear1(x.flatten(1))))


def resnet2b(weights: dict[str, Tensor]) -> nn.Module:
    """One stage."""
    return ResNet(8, 16, features=1024)


def resnet4b(weights: dict[str, Tensor]) -> nn.Module:
    """Two stages."""
    return ResNet(16, 32, 32, features=512)


IMAGENET = ([0.485, 0.456, 0.406], [0.225, 0.225, 0.225])
CIFAR = ([0.4914, 0.4824, 0.4467], [0.2471, 0.2435, 0.2616])
ERAN = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
RESNET = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
WIDE = ((2, 1), (2, 1))
UNPADDED = ((2, 0), (2, 0))


@dataclass(frozen=True)
class Classifier:
    """A trained CIFAR-10 network.

    Attributes:
        training: How it was trained.
        build: Its module, for the weights.
        scaling: Mean and standard deviation by channel, where it normalises the image.
        published: Published accuracy on all test images, where there is one.
    """

    training: str
    build: Callable[[dict[str, Tensor]], nn.Module]
    scaling: tuple[list[float], list[float]] | None
    published: str = ""


CLASSIFIERS = {
    "base": Classifier("provable", lambda w: chain(w, *WIDE), IMAGENET),
    "wide": Classifier("provable", lambda w: chain(w, *WIDE), IMAGENET),
    "deep": Classifier("provable", lambda w: chain(w, (2, 1), (1, 1), (1, 1), (2, 1)), IMAGENET),
    "cnn_a_adv": Classifier("adversarial", lambda w: chain(w, *WIDE), CIFAR),
    "cnn_a_mix": Classifier("mixed", lambda w: chain(w, *WIDE), CIFAR),
    "conv_small_pgd": Classifier("adversarial", lambda w: chain(w, *UNPADDED), ERAN),
    "marabou_small": Classifier("ordinary", lambda w: chain(w, *UNPADDED), None),
    "marabou_large": Classifier("ordinary", lambda w: chain(w, *UNPADDED), None),
    "resnet2b": Classifier("adversarial", resnet2b, RESNET, "69.25 %"),
    "resnet4b": Classifier("adversarial", resnet4b, RESNET, "77.20 %"),
}


def classifier(folder: Path, name: str) -> nn.Module:
    """One of :data:`CLASSIFIERS` in eval mode, with its weights and the normalisation before it."""
    path = folder / f"{name}.safetensors"
    weights = read_safetensors(path)
    one = CLASSIFIERS[name]
    network = one.build(weights)
    load_weights(network, weights, path)
    parts = [Normalised(*one.scaling)] if one.scaling else []
    return nn.Sequential(*parts, network).eval()


def check_classifier(folder: Path, name: str) -> dict[str, Any]:
    """Errors on ten images of the sample, and the accuracy on all of it."""
    model = classifier(folder, name)
    images = data.sample()
    x = images.unit_interval()
    with torch.no_grad():
        right = int((model(x).argmax(1) == images.labels).sum())
    return {"right": right, "of": len(images), **verified(model, x[:: len(x) // IMAGES][:IMAGES])}


# files in ONNX


@dataclass(frozen=True)
class Converted:
    """A network in ONNX.

    Attributes:
        what: What it is.
        lowest: Of its random inputs, which reach to ``lowest + 1``.
    """

    what: str
    lowest: float = 0.0


ONNX = {
    "resnet_2b": Converted("CIFAR-10, residual"),
    "cifar_base_kw": Converted("CIFAR-10, two convolutions"),
    "mnist-net_256x2": Converted("MNIST, fully connected"),
    "Convnet_avgpool": Converted("MNIST, average pooling"),
    "Convnet_maxpool": Converted("MNIST, max pooling"),
    "ACASXU_run2a_1_1_batch_2000": Converted("ACAS Xu controller", -0.5),
}


def check_converted(folder: Path, name: str) -> dict[str, Any]:
    """Errors on ten random inputs, and how far the module is from onnxruntime."""
    path = folder / "onnx" / f"{name}.onnx"
    file = abm.onnx.read(path)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(IMAGES, *file.in_shape, generator=generator) + ONNX[name].lowest
    runtime = importlib.import_module("onnxruntime").InferenceSession(path)
    entry = runtime.get_inputs()[0].name
    theirs = [runtime.run(None, {entry: i[None].numpy()})[0] for i in x]
    expected = torch.cat([torch.from_numpy(t).flatten()[None] for t in theirs])
    with torch.no_grad():
        difference = (file.module(x).flatten(1) - expected).abs().max() / expected.abs().max()
    raised = f", raised to {file.raised}" if file.raised else ""
    return {
        "shape": list(file.in_shape),
        "opset": f"{file.opset}{raised}",
        "conversion": float(difference),
        **verified(file.module, x),
    }


# both


def verified(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Every unit of every layer in float64, and the time that it took."""
    started = time.perf_counter()
    network = abm.trace(model, x[:2])
    traced = time.perf_counter()
    checks = abm.verify(network, x, dtype=torch.float64)
    worst = max(checks.values(), key=lambda check: check.scaled)
    return {
        "inputs": len(x),
        "layers": {name: [check.units, check.scaled] for name, check in checks.items()},
        "units": sum(check.units for check in checks.values()),
        "within": sum(check.within for check in checks.values()),
        "biases": len(network.biases),
        "error": worst.scaled,
        "worst": worst.layer,
        "trace_seconds": round(traced - started, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


CHECKS = {**dict.fromkeys(CLASSIFIERS, check_classifier), **dict.fromkeys(ONNX, check_converted)}


def markdown(found: dict) -> str:
    """The tables of the classifiers and of the files in ONNX."""
    common = ["layers", "length of b", "units", "within 1 %", "worst scaled error", "seconds"]
    first = Sheet("CIFAR-10 classifiers", ["network", "training", "right on the sample", *common])
    second = Sheet("Files in ONNX", ["file", "network", "input", "opset", "conversion", *common])
    for name, f in found["networks"].items():
        share = f"{100 * f['within'] / f['units']:.4f} %"
        cells = [f"{len(f['layers'])}", f"{f['biases']:,}", f"{f['units']:,}", share]
        cells += [f"{f['error']:.1e}", f"{f['seconds']:.0f}"]
        if name in CLASSIFIERS:
            published = CLASSIFIERS[name].published
            right = f"{100 * f['right'] / f['of']:.1f} %"
            right += f" (published {published})" if published else ""
            first.rows.append([f"`{name}`", CLASSIFIERS[name].training, right, *cells])
        else:
            shape = " x ".join(map(str, f["shape"]))
            start = [f"`{name}`", ONNX[name].what, shape, f["opset"], f"{f['conversion']:.0e}"]
            second.rows.append([*start, *cells])
    return "\n\n".join(sheet.markdown() for sheet in (first, second) if sheet.rows)


def kept_with(found: dict, name: str, result: dict) -> dict:
    """The results with one more, in the order of the tables, and where it was measured."""
    networks = {**found["networks"], name: result}
    libraries = {library: version(library) for library in ("onnx", "onnx2torch", "onnxruntime")}
    return {
        "environment": {**environment(), "cores": os.cpu_count(), **libraries},
        "networks": {n: networks[n] for n in CHECKS if n in networks},
    }


def failures(found: dict) -> list[str]:
    """What is above its limit: errors of the hyperplanes, and differences of a conversion."""
    networks = found["networks"].items()
    wrong = [f"{name} ({f['worst']})" for name, f in networks if not f["error"] <= LIMIT]
    return wrong + [n for n, f in networks if not f.get("conversion", 0.0) <= CONVERTED]


def main() -> None:
    """Check every network that the file of results lacks, and print the tables.

    Raises:
        SystemExit: If there is no folder, or an error is above its limit.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=os.environ.get(FOLDER), help="the files")
    parser.add_argument("--only", default="", help="part of the names of the networks to run")
    parser.add_argument("--out", type=Path, default=Path("docs/results/others.json"))
    parser.add_argument("--docs", type=Path, help="page to write the tables into")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    missing = [n for n in CHECKS if arguments.only in n and n not in found["networks"]]
    if missing and (arguments.folder is None or not arguments.folder.is_dir()):
        msg = f"--folder or {FOLDER} must be a folder with the files. Got {arguments.folder}."
        raise SystemExit(msg)
    for name in missing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the conversion, about tensors that it copies
            result = CHECKS[name](arguments.folder, name)
        print(name, {k: v for k, v in result.items() if k != "layers"}, flush=True)
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
