"""Linear regions of published robust networks, and of ours, around images of CIFAR-10.

usage: python benchmarks/regions.py --folder FOLDER [--only resnet] [--images 100] [--docs PAGE]

For each network and each image: the nearest kink, and the line to an adversarial point and to a
random one at the same distance. The folder may stand in ADJOINTBACKMAP_REAL instead; it holds the
networks of docs/networks-of-others.md. Each finished image is a line of a file in --kept, so that a
stopped run goes on. Earlier results of more images stay in --out.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exactness import environment
from others import CLASSIFIERS, FOLDER, classifier
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap import attacks, data, models
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.files.disk import write
from adjointbackmap.report.sheets import PagePlace, Sheet

RADIUS = 2 / 255
ATTACK = attacks.Attack(RADIUS / 4, iterations=10, until_success=False, radius=RADIUS)
DRAWS = 1000  # of the bootstrap
PLACE = PagePlace("<!-- regions: written by benchmarks/regions.py -->", "<!-- regions: end -->")
OURS = (
    "vgg7-cifar10",
    "vgg7-nobias-cifar10",
    "resnet20-cifar10",
    "fixup-resnet20-cifar10",
    "fixup-resnet20-nobias-cifar10",
)
NAMES = (*CLASSIFIERS, *OURS)
ENDS = ("pgd", "random")


# measuring


def load(name: str, folder: Path | None) -> nn.Module:
    """A network that takes pixels in [0, 1].

    Raises:
        SystemExit: If it is a network of others and there is no folder.
    """
    if name in OURS:
        return nn.Sequential(models.preprocessing(name), models.load(name)).eval()
    if folder is None or not folder.is_dir():
        msg = f"--folder or {FOLDER} must be a folder with the networks. Got {folder}."
        raise SystemExit(msg)
    return classifier(folder, name)


def chosen(model: nn.Module) -> tuple[list[int], float]:
    """Numbers of the images that the model classifies correctly, and its accuracy on the sample.

    Their order is random, so that the first of them are a random part.
    """
    images = data.sample()
    with torch.no_grad():
        right = model(images.unit_interval()).argmax(1) == images.labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [int(n) for n in order if right[n]], float(right.double().mean())


def neighbours(model: nn.Module, x: Tensor, label: int, number: int) -> dict[str, Tensor]:
    """An adversarial point and a random one, each at most 2/255 away in every pixel."""
    found = attacks.basic_iterative(model, x[None], torch.tensor([label]), ATTACK)
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(number)) * 2 - 1
    return {"pgd": found.adversarial[0], "random": (x + RADIUS * signs).clamp(0, 1)}


def flipped(network: abm.Network, points: Tensor) -> list[float]:
    """Share of gates that differ from those of the first point, for each other point."""
    pattern = abm.record_pattern(network, points, dtype=torch.float64)
    counts = torch.zeros(len(points) - 1, dtype=torch.float64)
    gates = 0
    for found in pattern.gates.values():
        for gate in found:
            if len(gate) == len(points):
                counts += (gate[1:] != gate[:1]).flatten(1).sum(1)
                gates += gate[0].numel()
    return (counts / gates).tolist()


def compare(network: abm.Network, model: nn.Module, number: int) -> dict[str, Any]:
    """The hyperplane of the label at an image and at its neighbours, and the gates between them."""
    images = data.sample()
    x = images.unit_interval()[number]
    label = int(images.labels[number])
    points = torch.stack([x, *neighbours(model, x, label, number).values()])
    weights, of_pixels, of_biases = hyperplanes(network, points.double(), label)
    scale = float(of_pixels.abs().sum() + of_biases.abs().sum())
    shares = flipped(network, points.double())
    with torch.no_grad():
        classes = model(points).argmax(1).tolist()
    result: dict[str, Any] = {
        "logit": float(of_pixels.sum() + of_biases.sum()),
        "biases": float(of_biases.sum()),
        "biases_of_sizes": float(of_biases.abs().sum()) / scale,
    }
    for i, end in enumerate(ENDS):
        cosine = float(weights[0] @ weights[i + 1] / (weights[0].norm() * weights[i + 1].norm()))
        result[end] = {
            "fooled": classes[i + 1] != label,
            "flipped": shares[i],
            "turn": math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
            "stretch": float(weights[i + 1].norm() / weights[0].norm()),
        }
    return result


def hyperplanes(network: abm.Network, points: Tensor, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image parts at all points, and contributions of the pixels and biases of the first one."""
    operator = abm.operator(network, points, OUTPUT, dtype=torch.float64)
    seeds = torch.zeros(len(points), 1, *network.layers[OUTPUT].out_shape, dtype=torch.float64)
    seeds[:, :, label] = 1
    weights, biases = (part[:, 0].flatten(1) for part in operator.adjoint(seeds))
    vector = network.biases_in(torch.float64).vector
    return weights, weights[0] * points[0].flatten(), biases[0] * vector


def kinks(network: abm.Network, model: nn.Module, number: int) -> dict[str, Any]:
    """Distances to the nearest kink."""
    x = data.sample().unit_interval()[number]
    distances = abm.kink_distances(network, x, sweep=torch.float32)
    nearest = {norm: distances.nearest(norm) for norm in ("l2", "linf")}
    return {norm: kink.distance(norm) if kink else None for norm, kink in nearest.items()}


def lines(network: abm.Network, model: nn.Module, number: int) -> dict[str, Any]:
    """Number of linear regions on the way to both neighbours."""
    images = data.sample()
    x = images.unit_interval()[number]
    ends = neighbours(model, x, int(images.labels[number]), number)
    return {end: crossed(network, x, point) for end, point in ends.items()}


def crossed(network: abm.Network, x: Tensor, point: Tensor) -> dict[str, int]:
    """Linear regions and flips between two points."""
    line = abm.region_line(network, x.double(), point.double())
    return {"regions": line.regions, "flips": sum(line.flips_by_operation().values())}


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Lines of a file: number of the image -> what was measured."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {row["image"]: row for row in rows}


PARTS = {"points": compare, "kinks": kinks, "lines": lines}


def run(name: str, folder: Path | None, kept: Path, images: dict[str, int]) -> None:
    """Measure what a network lacks, and keep each image at once."""
    model = load(name, folder)
    numbers, accuracy = chosen(model)
    kept.mkdir(parents=True, exist_ok=True)
    write(kept / f"{name}.json", json.dumps({"accuracy": accuracy, "right": len(numbers)}))
    network = abm.trace(model, data.sample().unit_interval()[:2])
    for part, job in PARTS.items():
        path = kept / f"{name}.{part}"
        done = read(path)
        for number in numbers[: images[part]]:
            if number in done:
                continue
            started = time.perf_counter()
            row = {"image": number, **job(network, model, number)}
            row["seconds"] = round(time.perf_counter() - started, 2)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(name, part, len(read(path)), flush=True)


# part -> its medians, and those of each end
KEYS = {
    "points": (("biases", "biases_of_sizes"), ("flipped", "turn", "stretch", "fooled")),
    "kinks": (("l2", "linf"), ()),
    "lines": ((), ("regions",)),
}


# results


def spread(numbers: Sequence[float]) -> list[float]:
    """Median, and the 95 % interval of the median by a bootstrap over images."""
    found = np.asarray(numbers, float)
    draws = np.random.default_rng(0).integers(len(found), size=(DRAWS, len(found)))
    low, high = np.quantile(np.median(found[draws], axis=1), (0.025, 0.975))
    return [float(np.median(found)), float(low), float(high)]


def collected(kept: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Medians of all networks that have images.

    Args:
        kept: Lines of images.
        before: Earlier medians of networks. They stay where they are of more images.
    """
    networks = {}
    for name in NAMES:
        rows = {part: list(read(kept / f"{name}.{part}").values()) for part in PARTS}
        if rows["points"]:
            about = json.loads((kept / f"{name}.json").read_text())
            networks[name] = of_more_images({**about, **summary(rows)}, before.get(name))
        elif name in before:
            networks[name] = before[name]
    return {"environment": {**environment(), "cores": os.cpu_count()}, "networks": networks}


def of_more_images(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Medians of one network, each part from the results that have more images."""
    for part, (whole, of_ends) in KEYS.items():
        if before is None or before["images"][part] <= now["images"][part]:
            continue
        now["images"][part] = before["images"][part]
        now |= {key: before[key] for key in whole}
        for end in ENDS:
            now[end] |= {key: before[end][key] for key in of_ends}
    return now


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of one network."""
    points = rows["points"]
    found: dict[str, Any] = {"images": {part: len(of) for part, of in rows.items()}}
    found["biases"] = spread([row["biases"] / row["logit"] for row in points])
    found["biases_of_sizes"] = spread([row["biases_of_sizes"] for row in points])
    for end in ENDS:
        found[end] = {
            key: spread([row[end][key] for row in points]) for key in ("flipped", "turn", "stretch")
        }
        found[end]["fooled"] = float(np.mean([row[end]["fooled"] for row in points]))
        if rows["lines"]:
            found[end]["regions"] = spread([row[end]["regions"] for row in rows["lines"]])
    if rows["kinks"]:
        for norm in ("l2", "linf"):
            found[norm] = spread([row[norm] for row in rows["kinks"]])
    return found


def cell(found: Sequence[float] | None, factor: float = 1.0, pattern: str = "{:.3g}") -> str:
    """A median and its interval."""
    if found is None:
        return "not measured"
    median, low, high = (pattern.format(factor * number) for number in found)
    return f"{median} ({low} to {high})"


def markdown(found: dict[str, Any]) -> str:
    """The two tables."""
    about = Sheet(
        "The networks and their nearest kinks",
        "network|training|accuracy|PGD fools|images|nearest kink, l2|nearest kink, linf|"
        "biases / logit|biases, of absolute sums".split("|"),
    )
    ends = Sheet(
        "From the image to the PGD point, and to the random point",
        "network|images, lines|regions: PGD|random|gates: PGD|random|turn: PGD|random|"
        "stretch: PGD|random".split("|"),
    )
    for name, f in found["networks"].items():
        training = CLASSIFIERS[name].training if name in CLASSIFIERS else "ours"
        images = f["images"]
        about.rows.append(
            [
                f"`{name}`",
                training,
                f"{100 * f['accuracy']:.1f} %",
                f"{100 * f['pgd']['fooled']:.0f} %",
                f"{images['points']}, kinks {images['kinks']}",
                cell(f.get("l2"), 1, "{:.1e}"),
                cell(f.get("linf"), 1, "{:.1e}"),
                cell(f["biases"], 100, "{:.0f}") + " %",
                cell(f["biases_of_sizes"], 100) + " %",
            ]
        )
        row = [f"`{name}`", f"{images['points']}, {images['lines']}"]
        for key, factor, unit, pattern in (
            ("regions", 1, "", "{:,.0f}"),
            ("flipped", 100, " %", "{:.2f}"),
            ("turn", 1, "", "{:.1f}"),
            ("stretch", 1, "", "{:.2f}"),
        ):
            row += [cell(f[end].get(key), factor, pattern) + unit for end in ENDS]
        ends.rows.append(row)
    return "\n\n".join(sheet.markdown() for sheet in (about, ends))


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=os.environ.get(FOLDER), help="the files")
    parser.add_argument("--only", default=",".join(NAMES), help="names of networks, with commas")
    for part in PARTS:
        parser.add_argument(f"--{part}", type=int, default=100, help=f"images for the {part}")
    parser.add_argument("--kept", type=Path, default=Path("runs/regions"), help="lines of images")
    parser.add_argument("--out", type=Path, default=Path("docs/results/regions.json"))
    parser.add_argument("--docs", type=Path, help="page to write the tables into")
    arguments = parser.parse_args()
    for name in filter(None, arguments.only.split(",")):
        images = {part: getattr(arguments, part) for part in PARTS}
        run(name, arguments.folder, arguments.kept, images)
    if arguments.kept.is_dir():
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        now = collected(arguments.kept, before.get("networks", {}))
        write(arguments.out, json.dumps(now, indent=1) + "\n")
    found = json.loads(arguments.out.read_text())
    print(markdown(found))
    if arguments.docs:
        PLACE.check(arguments.docs)
        PLACE.fill(arguments.docs, markdown(found))


if __name__ == "__main__":
    main()
