"""Claim: a hyperplane of a vision transformer costs little more than a backward pass.

usage: python benchmarks/curved_costs.py [--out docs/results/curved-costs.json]
                                         [--docs docs/curved.md]

timm's ViT-Tiny at 224 x 224 pixels, float32, frozen gates, random weights, one thread. The RM0
hyperplanes of some classes are computed, and as many backward passes that give the gradients of the
image and of all biases. timm needs an environment of its own, which docs/zoo.md describes.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from exactness import environment
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap.benchmark.timing import growth
from adjointbackmap.files.disk import write
from adjointbackmap.onnx import mend_torchvision
from adjointbackmap.report.sheets import PagePlace

CLASSES = (1, 16, 64)
REPEATS = 5
PLACE = PagePlace("<!-- costs: written by benchmarks/curved_costs.py -->", "<!-- costs: end -->")


def vit_tiny() -> tuple[nn.Module, Tensor]:
    """The network in eval mode and an image."""
    mend_torchvision()
    torch.manual_seed(0)
    model = importlib.import_module("timm").create_model("vit_tiny_patch16_224", pretrained=False)
    return model.eval(), torch.rand(1, 3, 224, 224)


def backward_passes(model: nn.Module, x: Tensor, classes: int) -> None:
    """One forward pass, and a backward pass for each class."""
    image = x.clone().requires_grad_()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    out = model(image)[0]
    for each in range(classes):
        torch.autograd.grad(out[each], [image, *biases], retain_graph=True, allow_unused=True)


def seconds_of(function: Callable[[], object]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def measured() -> dict:
    """Processor time and memory for each number of classes; medians, both ways alternately."""
    torch.set_num_threads(1)
    model, x = vit_tiny()
    network = abm.trace(model, x, curved="frozen")
    rows = []
    for classes in CLASSES:
        units = (torch.arange(classes),)
        ours = partial(abm.hyperplanes, network, x, "output", "RM0", units=units)
        theirs = partial(backward_passes, model, x, classes)
        ours()  # to warm up
        theirs()
        times = [[seconds_of(f) for f in (ours, theirs)] for _ in range(REPEATS)]
        mine, other = (median(column) for column in zip(*times, strict=True))
        plan = network.plan("output", "RM0", units=units)
        rows.append(
            {
                "classes": classes,
                "seconds": round(mine, 3),
                "backward_seconds": round(other, 3),
                "ratio": round(mine / other, 2),
                "planned": round((plan.workspace + plan.bytes) / 2**20, 1),
                "measured": round(growth(ours) or 0.0, 1),
            }
        )
    return {"environment": environment(), "rows": rows}


def markdown(found: dict) -> str:
    """The table."""
    lines = [
        "| classes | RM0, seconds | as many backward passes, seconds | ratio | memory, plan "
        "| memory, measured |",
        "|---" * 6 + "|",
    ]
    for row in found["rows"]:
        memory = f"{row['planned']:.0f} MiB | {row['measured']:.0f} MiB"
        times = f"{row['seconds']:.2f} | {row['backward_seconds']:.2f} | {row['ratio']:.2f}"
        lines.append(f"| {row['classes']} | {times} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, keep the figures and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/curved-costs.json"))
    parser.add_argument("--docs", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    found = measured()
    write(arguments.out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    if arguments.docs:
        PLACE.fill(arguments.docs, markdown(found))


if __name__ == "__main__":
    main()
