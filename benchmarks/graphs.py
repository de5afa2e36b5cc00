"""Write the graphs of the shipped networks, which the explorer reads in place of a capture.

    python benchmarks/graphs.py

Run it after a network was added, or for another release of PyTorch.
"""

import json
from pathlib import Path

import torch

from adjointbackmap import models
from adjointbackmap.capture.graph import capture
from adjointbackmap.capture.kept import described
from adjointbackmap.sources import CIFAR_SHAPE

ASSETS = Path(models.__file__).parent / "assets"


def main() -> None:
    """Write a file for each network."""
    for name in models.names():
        found = described(capture(models.load(name), torch.zeros(1, *CIFAR_SHAPE)))
        text = json.dumps(found, separators=(",", ":"))
        (ASSETS / f"{name}.graph.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
