"""How much of the logit do pixels carry, and how much the biases of each layer?

The sum of an image's contributions depends on the origin from which pixels are counted. A picture
of an image part shows one origin, an input of zeros. Three origins are compared: zero, the mean
image, and black. What the origin itself contributes then goes to the biases' side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adjointbackmap import data, plots
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.pictures.panels import captioned
from adjointbackmap.study.quantiles import ENDS, Quantiles
from adjointbackmap.study.results import Arrays, Found, keep, kept, save_picture
from adjointbackmap.study.setup import SCALE, Setup, Trained

KEY = "origins"
MOST = 1000  # images at most
TIMES = 10  # images, compared with those of the other experiments: RM0 of two classes is cheap
BATCH = 25
ORIGINS = ("zero", "mean image", "black")
QUANTITIES = ("logit", "margin")
DRAWS = 2000  # of the bootstrap
# Pixels carry "none" of a logit if the interval of their median share is within these ends. A tenth
# is what a reader would not see in a picture of all contributions.
NONE = (-0.1, 0.1)


def compute_origins(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Sum the contributions of pixels and of each layer's biases, for every network of a run.

    Args:
        setup: Networks, images and folder.
        report: Called with what is computed and the share that is done.
    """
    for name in setup.networks:
        trained = setup.trained(name)
        images = setup.many(name, min(MOST, TIMES * setup.images))
        told = partial(report, f"{name}: origins")
        settings = {
            **trained.about,
            "images": len(images),
            "first image": images.hashes[0],
            "seed": setup.seed,
            "scale": SCALE,
        }
        path = setup.folder / KEY / f"{name}.json"
        keep(path, settings, partial(_measured, trained, images, told))
    report("origins", 1.0)


def _measured(
    trained: Trained, images: data.Images, report: Callable[[float], None]
) -> tuple[Found, Arrays]:
    """The sums of all images, and the names of the layers that have biases."""
    mean = trained.images.unit_interval().mean(0, keepdim=True)
    origins = torch.cat([trained.input(mean), trained.input(torch.zeros_like(mean))])
    parts = []
    for start in range(0, len(images), BATCH):
        report(start / len(images))
        x = trained.input(images[start : start + BATCH].unit_interval())
        parts.append(sums(trained, x, origins))
    layers = list(trained.network.biases_in(torch.float32))
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {"layers": layers}, arrays


def sums(trained: Trained, x: Tensor, origins: Tensor) -> Arrays:
    """What pixels, origins and biases add to the logits of the two most likely classes.

    Args:
        trained: The network.
        x: Images in the units of its input, ``(N, C, H, W)``.
        origins: The mean image and black in these units, ``(2, C, H, W)``.

    Returns:
        ``logit (N, 2)`` from the untouched network, ``pixels (N, 2)``, ``origins (N, 2, 2)`` with
        the origins last, and ``biases (N, 2, layers)``. The second axis has the classes.
    """
    with torch.no_grad():
        scores = trained.subject.module(x)
    logit, classes = scores.topk(2, 1)
    planes = hyperplanes(trained.network, x, "fc", "RM0", classes[:, :, None], scale=SCALE)
    image = planes.image.double()
    # n: images, k: classes, o: origins
    found = {
        "logit": logit.double(),
        "pixels": torch.einsum("nkchw,nchw->nk", image, x.double()),
        "origins": torch.einsum("nkchw,ochw->nko", image, origins.double()),
        "biases": _bias_sums(planes.contributions().bias, logit),
    }
    return {key: part.numpy() for key, part in found.items()}


def _bias_sums(bias: dict[str, Tensor], logit: Tensor) -> Tensor:
    """What the biases of each layer add, ``(N, K, layers)``."""
    if not bias:
        return logit.new_zeros(*logit.shape, 0, dtype=torch.float64)
    return torch.stack([part.double().flatten(2).sum(2) for part in bias.values()], 2)


@dataclass(frozen=True)
class Shares:
    """What pixels and biases carry of a quantity, a row for each image.

    Attributes:
        pixels: Share of the pixels, counted from each origin, ``(N, 3)``.
        biases: Share of each layer's biases, ``(N, layers)``.
        error: Largest |sum of all parts - quantity|, relative to the sum of their magnitudes.
    """

    pixels: np.ndarray
    biases: np.ndarray
    error: float


def shares(arrays: Arrays, quantity: str) -> Shares:
    """The shares of the logit of the most likely class, or of its margin over the second.

    Args:
        arrays: Result of :func:`sums` for all images.
        quantity: ``"logit"`` or ``"margin"``.
    """
    # the second axis has the two classes: the first alone, or their difference
    weights = np.array([1.0, 0.0] if quantity == "logit" else [1.0, -1.0])
    value, pixels = (np.tensordot(arrays[key], weights, (1, 0)) for key in ("logit", "pixels"))
    origins, biases = (np.tensordot(arrays[key], weights, (1, 0)) for key in ("origins", "biases"))
    from_origins = np.column_stack([pixels, pixels[:, None] - origins])
    terms = np.column_stack([pixels, biases])
    error = np.abs(terms.sum(1) - value) / np.abs(terms).sum(1)
    of = value[:, None]
    return Shares(from_origins / of, biases / of, float(error.max()))


def median_interval(numbers: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The median of some numbers, and its 95 % bootstrap interval.

    Args:
        numbers: One number for each image.
        seed: Seed of the draws.

    Returns:
        Low end, median, high end.
    """
    draw = np.random.default_rng(seed).integers(len(numbers), size=(DRAWS, len(numbers)))
    low, high = np.quantile(np.median(numbers[draw], axis=1), (0.025, 0.975))
    return float(low), float(np.median(numbers)), float(high)


def origins_section(folder: Path) -> Section | None:
    """The section of the report; ``None`` if there are no results.

    Args:
        folder: Folder of the results.
    """
    networks = {name: (found, arrays) for name, found, arrays in kept(folder / KEY)}
    if not networks:
        return None
    blocks: list[ReportBlock] = [*_claims(networks)]
    for name, (found, arrays) in networks.items():
        if found["layers"]:
            blocks.append(_picture(folder, name, found, arrays))
    blocks += [_table(networks, quantity) for quantity in QUANTITIES]
    counts = sorted({found["settings"]["images"] for found, _ in networks.values()})
    ran = (
        f"RM0 hyperplanes of the two most likely classes, of {' or '.join(map(str, counts))} test "
        "images of each network that it classifies correctly, in float32, summed in float64. The "
        "margin is the logit of the most likely class minus that of the second: softmax does not "
        "see what is added to both. Pixels are counted from zero, from the mean of all test "
        "images, or from black. The rest of the quantity is that of the biases and of the origin.",
    )
    return Section(KEY, "What pixels and biases carry of a logit", ran, tuple(blocks))


Networks = dict[str, tuple[Found, Arrays]]


def _claims(networks: Networks) -> Iterator[Claim]:
    """Whether pixels carry the logit, for each network."""
    for name, (found, arrays) in networks.items():
        ends = {
            quantity: median_interval(shares(arrays, quantity).pixels[:, 0])
            for quantity in QUANTITIES
        }
        measured = "; ".join(f"{quantity} {_words(*ends[quantity])}" for quantity in QUANTITIES)
        low, _, high = ends["logit"]
        if found["layers"]:
            text = f"In {name}, pixels counted from zero carry none of the median logit."
            holds = _inside(low, high, *NONE)
        else:
            text = f"In {name}, which has no biases, pixels carry all of it."
            holds = low > 0.999 and high < 1.001
        yield Claim(text, f"Median share of the pixels, 95 % interval: {measured}", holds)


def _inside(low: float, high: float, least: float, most: float) -> bool | None:
    """Whether an interval is in another; ``None`` if it is partly."""
    if low > most or high < least:
        return False
    return True if least <= low and high <= most else None


def _words(low: float, median: float, high: float) -> str:
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _table(networks: Networks, quantity: str) -> Table:
    """A row for each network, with the share of the pixels from each origin."""
    head = ["network", *(f"from {origin}" for origin in ORIGINS), "largest part of biases", "error"]
    sheet = Sheet(f"Share of the {quantity} that pixels carry", head)
    for name, (found, arrays) in networks.items():
        part = shares(arrays, quantity)
        cells = [_cell(column) for column in part.pixels.T]
        sheet.rows.append([name, *cells, _largest(found, part), f"{part.error:.1g}"])
    caption = (
        f"Share of the {quantity}: the median over images and its 95 % bootstrap interval; then "
        "the 5 and 95 % quantiles of the images. Largest part of biases: "
        "the layer whose biases carry the largest median share, and this share. Error: the "
        "largest difference of the sum from the network's own value, relative to the sum of the "
        "terms' magnitudes."
    )
    return Table(sheet, caption)


def _cell(numbers: np.ndarray) -> str:
    """The median with its interval, and the range of the images."""
    images = Quantiles.of(numbers)
    return f"{_words(*median_interval(numbers))}; images {images.low:.2f} to {images.high:.2f}"


def _largest(found: Found, part: Shares) -> str:
    if not found["layers"]:
        return "none"
    medians = np.median(part.biases, axis=0)
    first = int(np.abs(medians).argmax())
    return f"{found['layers'][first]}: {medians[first]:.3f}"


def _picture(folder: Path, name: str, found: Found, arrays: Arrays) -> Picture:
    """The share of each layer's biases, and that of the pixels, with the range of the images."""
    part = shares(arrays, "logit")
    columns = np.column_stack([part.pixels[:, 0], part.biases])
    ends = np.quantile(columns, ENDS, axis=0).T
    rows = zip(["pixels", *found["layers"]], ends.tolist(), strict=True)
    # by_layer takes the median first, then the ends of its interval
    values = {name: {label: (median, low, high) for label, (low, median, high) in rows}}
    title = f"{name}: what carries the logit of the most likely class"
    drawing = plots.by_layer(values, title, "share of the logit", kind="bar")
    caption = f"{captioned(drawing)} Bars are medians, whiskers 5 to 95 % of the images."
    # the arrays of the results are NAME.npz, and a picture has its numbers as NPZ too
    return save_picture(folder, f"{KEY}/{name}-shares", drawing, caption)
