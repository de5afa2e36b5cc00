"""Pictures of one network's hyperplanes: all classes, all reconstruction modes, and bias parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data, plots
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.plots.units import MOST_IN_ROW
from adjointbackmap.study.results import save_picture
from adjointbackmap.study.setup import SCALE, Trained

PictureFile = dict[str, str]  # file, caption, published figure and heading of a picture
CLASSES = 10  # most classes in a picture
RM0_FIGURES = {"vgg7-nobias-cifar10": "Fig. 2.6", "fixup-resnet20-nobias-cifar10": "Fig. 2.7"}


def convolutions(network: Network) -> list[Layer]:
    """The convolutions of a network, in the order of execution."""
    return [layer for layer in network.layers.values() if "RM4" in layer.modes]


def early_and_late(network: Network) -> tuple[Layer, Layer]:
    """Two convolutions for the pictures: the second, and the one after the middle.

    A unit of the latter may still see only a part of the image.
    """
    every = convolutions(network)
    return every[1], every[len(every) // 2 + 1]


def draw_panels(
    trained: Trained,
    images: data.Images,
    planes: Hyperplanes,
    folder: Path,
) -> Iterator[PictureFile]:
    """Draw all pictures of a network, and yield file, caption and published figure of each.

    Args:
        trained: The network.
        images: A few images. The grids are of the first and the last one.
        planes: All RM0 hyperplanes of each image.
        folder: Folder for the files.
    """
    pairs = zip(images.labels.tolist(), images.hashes, strict=True)
    names = [f"{images.classes[label]} {hashed[:8]}" for label, hashed in pairs]
    for n, of in enumerate(names):
        chosen = largest(planes.value[n])
        one = hyperplanes(trained.network, planes.x[n], "fc", "RM0", np.array(chosen), scale=SCALE)
        which = f"the {len(chosen)} classes with the largest outputs"
        if len(images.classes) == len(chosen):
            which = "all classes"
        heading = f"{trained.name}, {of}: hyperplanes of {which} (RM0)"
        words = [images.classes[c] for c in chosen]
        drawing = plots.class_hyperplanes(one, words, images.unit_interval()[n], heading)
        published = RM0_FIGURES.get(trained.name, "")
        panel = f"{published} ({'abc'[n]})" if published else ""
        yield _saved(drawing, folder / f"{trained.name}-classes-{n}.png", panel)
    if len(trained.network.biases):
        yield _bias_parts(trained, images.classes, planes, names[0], folder)
    for n in (0, len(images) - 1):
        for layer in early_and_late(trained.network):
            stem = f"{trained.name}-{{}}-{layer.name}{f'-{n}' if n else ''}"
            yield from _modes(trained, planes.x[n : n + 1], layer, names[n], folder / stem)


def _bias_parts(
    trained: Trained,
    classes: tuple[str, ...],
    planes: Hyperplanes,
    of: str,
    folder: Path,
) -> PictureFile:
    """Bias parts of at most ten classes as near-square images.

    They are strips if the number of biases is prime.
    """
    vectors = {classes[c]: planes.bias[0, c] for c in largest(planes.value[0])}
    shape = "strip" if plots.near_square(planes.bias[0, 0]).shape[0] == 1 else "square"
    heading = f"{trained.name}, {of}: bias parts of the classes (RM0)"
    drawing = plots.bias_parts(vectors, trained.network.biases, heading, shape)
    return _saved(drawing, folder / f"{trained.name}-bias-parts.png")


def _modes(
    trained: Trained,
    x: Float[Tensor, "1 c h w"],
    layer: Layer,
    of: str,
    stem: Path,
) -> Iterator[PictureFile]:
    """Pictures of the modes RM1 to RM4 of a convolution at one image.

    The name of the mode goes into ``stem``.
    """
    network = trained.network
    name = layer.name
    summed = hyperplanes(network, x, name, "RM1", scale=SCALE)
    strongest = int(summed.value[0].argmax())
    middle = layer.out_shape[1] // 2
    rows, columns = positions(layer)
    look = {"outline": True, "crop": max(layer.receptive_field) <= x.shape[-1] // 2}
    units: dict[str, tuple[Any, ...]] = {
        "RM2": (rows, columns, strongest),
        "RM3": (slice(MOST_IN_ROW), slice(MOST_IN_ROW)),
        "RM4": (middle, middle, slice(MOST_IN_ROW), slice(MOST_IN_ROW)),
    }
    found = {"RM1": summed} | {
        mode: hyperplanes(network, x, name, mode, chosen, scale=SCALE)
        for mode, chosen in units.items()
    }
    headings = {
        "RM1": f"each channel of {name}, positions summed",
        "RM2": f"channel {strongest} of {name} by position",
        "RM3": f"kernels of {name}, positions summed",
        "RM4": f"kernels of {name} at position ({middle}, {middle})",
    }
    for mode, planes in found.items():
        many = plots.kernel_hyperplanes if mode in ("RM3", "RM4") else plots.unit_hyperplanes
        title = f"{trained.name}, {of}: {mode}: {headings[mode]}"
        # only RM2 and RM4 are of single positions, whose receptive fields can be outlined
        drawing = many(planes, title, **(look if mode in ("RM2", "RM4") else {}))
        yield _saved(drawing, stem.with_name(f"{stem.name.format(mode)}.png"))


def largest(outputs: Float[Tensor, " classes"]) -> list[int]:
    """All classes if there are at most ten, otherwise the ten with the largest outputs.

    Args:
        outputs: Outputs of one image.

    Example:
        >>> import torch
        >>> largest(torch.arange(100.0))
        [90, 91, 92, 93, 94, 95, 96, 97, 98, 99]
    """
    return sorted(outputs.topk(min(CLASSES, len(outputs))).indices.tolist())


def positions(layer: Layer) -> tuple[slice, slice]:
    """At most eight rows and eight columns of a layer's positions, evenly spaced.

    Args:
        layer: A convolution.
    """
    steps = [max(1, -(-extent // MOST_IN_ROW)) for extent in layer.out_shape[1:]]
    return slice(steps[0] // 2, None, steps[0]), slice(steps[1] // 2, None, steps[1])


def _saved(drawing: plots.Drawing, path: Path, published: str = "") -> PictureFile:
    """Save a figure, and describe it."""
    caption = captioned(drawing)
    shown = save_picture(path.parent, path.stem, drawing, caption, published)
    return {
        "file": path.name,
        "caption": caption,
        "published": published,
        "title": shown.title,
    }


def captioned(drawing: plots.Drawing) -> str:
    """Caption for a page: the meaning of a figure's colours. Its heading is in the figure.

    Args:
        drawing: The figure.
    """
    return f"{drawing.caption[:1].upper()}{drawing.caption[1:]}."
