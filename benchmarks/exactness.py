"""Claim: in float64 every unit of every layer of the study's networks is reproduced to rounding.

usage: python benchmarks/exactness.py [--images 10] [--dtype float64] [--out docs/results/exactness-float64.json]

The five networks of the study, folded, on images of the sample, k = 1/8, own bias left out. A network that is
shipped is the trained one; the others have random weights and non-trivial batch-norm statistics, not their
own initialisation, which zeroes layers. Each finished image is kept in the file, so that a stopped run goes on.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

import adjointbackmap as abm
from adjointbackmap import data, models
from adjointbackmap.benchmark.networks import with_random_weights
from adjointbackmap.files.disk import write

LIMIT = {"float64": 1e-12, "float32": 1e-4}


def network_of(name: str) -> tuple[nn.Module, str]:
    """The shipped network or one with random weights, folded as in the study."""
    shipped = f"{name}-cifar10"
    trained = shipped in models.names()
    model = models.load(shipped) if trained else with_random_weights(partial(models.build, name))
    return abm.fold(
        model, torch.zeros(1, 3, 32, 32)
    ).model, "trained" if trained else "random weights"


def check_image(network: abm.Network, x: torch.Tensor, dtype: str) -> dict:
    """Errors of every layer on one image, and the time that they took."""
    started = time.perf_counter()
    checks = abm.verify(network, x, dtype=getattr(torch, dtype))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "layers": {n: asdict(c) for n, c in checks.items()},
    }


def environment() -> dict:
    """Where the figures were measured."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Check every network on every image that the file lacks, and print the worst of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--dtype", choices=LIMIT, default="float64")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path("docs/results") / f"exactness-{arguments.dtype}.json"
    found = (
        json.loads(out.read_text())
        if out.exists()
        else {"environment": environment(), "networks": {}}
    )
    images = data.sample()[:: len(data.sample()) // arguments.images][: arguments.images]
    traced = {}
    for name in models.ARCHITECTURES:
        model, weights = network_of(name)
        found["networks"].setdefault(name, {"weights": weights, "images": {}})
        traced[name] = abm.trace(model, torch.zeros(1, 3, 32, 32))
    for i, name in track(
        [(i, name) for i in range(len(images)) for name in traced], transient=True
    ):
        kept = found["networks"][name]["images"]
        if images.hashes[i] not in kept:
            x = models.preprocessing(name)(images[[i]].unit_interval()).to(
                getattr(torch, arguments.dtype)
            )
            kept[images.hashes[i]] = check_image(traced[name], x, arguments.dtype)
            out.parent.mkdir(parents=True, exist_ok=True)
            write(out, json.dumps(found, indent=1) + "\n")
    report(found, arguments.dtype)


def report(found: dict, dtype: str) -> None:
    """Print a row per network.

    Raises:
        SystemExit: If an error is above the limit.
    """
    print(
        f"{'network':24} {'weights':16} images {'units':>12} {'worst scale-aware':>18} {'share <= 1 %':>13} {'s/image':>8}"
    )
    worst = 0.0
    for name, entry in found["networks"].items():
        checks = [c for image in entry["images"].values() for c in image["layers"].values()]
        units = sum(c["units"] for c in checks)
        within = sum(c["within"] for c in checks)
        scaled = max(c["scaled"] for c in checks)
        seconds = sorted(image["seconds"] for image in entry["images"].values())[
            len(entry["images"]) // 2
        ]
        row = f"{len(entry['images']):6} {units:12,} {scaled:18.2e} {100 * within / units:11.5f} % {seconds:8.1f}"
        print(f"{name:24} {entry['weights']:16} {row}")
        worst = max(worst, scaled)
    if worst > LIMIT[dtype]:
        msg = f"the worst error must be at most {LIMIT[dtype]:.0e} of the scale. Got {worst:.2e}"
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
