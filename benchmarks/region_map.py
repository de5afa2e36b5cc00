"""Draw the linear regions of a small network around three images: ``region_map.py OUT.png``.

``region_map.py --walk OUT.png`` draws a walk to another class, in a network on the plane.
"""

import sys

import torch
from matplotlib.patches import Circle
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


def walk(path: str) -> None:
    """Draw a walk and its two distances, and print them."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    image = torch.tensor([0.6, 0.8], dtype=torch.float64)
    network = abm.trace(model, image[None])
    found = abm.region_walk(network, image)
    side = 1.6 * found.upper
    unit = torch.eye(2, dtype=torch.float64)
    shown = abm.region_map(network, image, *unit, ((-side, side), (-side, side)))
    figure = shown.plot()
    (axes,) = figure.axes
    step = found.point - image
    axes.plot(*zip((0, 0), step.tolist(), strict=True), "o-", color="black", markersize=4)
    for radius, style in ((found.lower, "-"), (found.upper, "--")):
        axes.add_patch(Circle((0, 0), radius, fill=False, linestyle=style))
    axes.set_aspect("equal")
    figure.savefig(path, dpi=130)
    print(found, shown)


if __name__ == "__main__":
    {"--walk": walk}.get(sys.argv[1], main)(sys.argv[-1])
