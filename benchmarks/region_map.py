"""Draw the linear regions of a small network around three images: ``region_map.py OUT.png``."""

import sys

import torch
from torch import nn

import adjointbackmap as abm


def small_network() -> tuple[abm.Network, torch.Tensor]:
    """The network of docs/lines.md, traced, and three images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)]
    model = nn.Sequential(*layers).double().eval()
    images = torch.rand(3, 3, 10, 10).double()
    return abm.trace(model, images[:1]), images


def main(path: str) -> None:
    """Draw the map and print what it holds."""
    network, (image, other, third) = small_network()
    # far beyond the three images, where several classes are predicted
    window = ((-3, 4), (-3, 4))
    found = abm.region_map(network, image, other - image, third - image, window)
    print(found, abm.map_test(found))
    found.plot(marks=["image", "other", "third"]).savefig(path, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
