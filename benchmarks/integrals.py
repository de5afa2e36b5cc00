"""The error of integrated gradients that are sampled, against the exact ones.

usage: python benchmarks/integrals.py --folder FOLDER [--only conv_small_pgd] [--images 30]

The score of the label, from three baselines, by five rules with 5 to 300 gradients each. Networks
and --folder are those of benchmarks/regions.py. Each finished image is a line of a file in --kept,
so that a stopped run goes on.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from exactness import environment
from others import FOLDER
from regions import NAMES, cell, chosen, load, read, spread
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap import data
from adjointbackmap.files.disk import write
from adjointbackmap.report.sheets import PagePlace, Sheet

STEPS = (5, 10, 20, 30, 50, 100, 200, 300)
SIGMA = 4.0  # pixels, of the blurred baseline
MOST = 256  # gradients in one batch
LIMITS = (0.05, 0.01)
SHOWN = 50  # gradients: what users of Captum take by default
ENDS = ("left", "right", "trapezoid")  # rules at the ends of equal parts
MOST_PARTS = 1000  # of the segment, in the tables of [Sotoudeh2019]
PLACE = PagePlace(
    "<!-- integrals: written by benchmarks/integrals.py -->", "<!-- integrals: end -->"
)


# rules: places on the segment and their weights


def left(n: int) -> tuple[Tensor, Tensor]:
    """The left end of n equal parts."""
    return torch.arange(n).double() / n, torch.full((n,), 1 / n).double()


def right(n: int) -> tuple[Tensor, Tensor]:
    """The right end of n equal parts."""
    return torch.arange(1, n + 1).double() / n, torch.full((n,), 1 / n).double()


def midpoint(n: int) -> tuple[Tensor, Tensor]:
    """The middle of n equal parts."""
    return (torch.arange(n).double() + 0.5) / n, torch.full((n,), 1 / n).double()


def trapezoid(n: int) -> tuple[Tensor, Tensor]:
    """Both ends of n equal parts: n + 1 gradients."""
    weights = torch.full((n + 1,), 1 / n).double()
    weights[[0, -1]] /= 2
    return torch.arange(n + 1).double() / n, weights


def gauss(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre, Captum's default."""
    places, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(n))
    return (places + 1) / 2, weights / 2


RULES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "left": left,
    "right": right,
    "trapezoid": trapezoid,
    "midpoint": midpoint,
    "gauss-legendre": gauss,
}


# baselines


def black(x: Tensor) -> Tensor:
    """Zeros."""
    return torch.zeros_like(x)


def mean(x: Tensor) -> Tensor:
    """The mean colour of the image."""
    return x.mean((1, 2), keepdim=True).expand_as(x).clone()


def blurred(x: Tensor) -> Tensor:
    """The image after a Gaussian filter, mirrored at its edges."""
    reach = int(3 * SIGMA)
    places = torch.arange(-reach, reach + 1).to(x)
    kernel = torch.exp(-(places**2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum())[None, None]
    padded = F.pad(x[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None]), kernel[..., None])[:, 0]


BASELINES = {"black": black, "blurred": blurred, "mean": mean}


# measuring


def sampling() -> tuple[Tensor, Tensor]:
    """Places of all rules together, ``(P,)``, and weights ``(rules, steps, P)``.

    Many places belong to several rules, and each gradient is computed once.
    """
    rules = [rule(n) for rule in RULES.values() for n in STEPS]
    everywhere = torch.cat([places for places, _ in rules])
    # equal places of two rules differ by rounding
    places, number = (everywhere * 1e12).round().unique(return_inverse=True)
    weights = torch.zeros(len(rules), len(places), dtype=torch.float64)
    numbers = number.split([len(part) for part, _ in rules])
    for row, which, (_, those) in zip(weights, numbers, rules, strict=True):
        row.index_add_(0, which, those)
    return places / 1e12, weights.view(len(RULES), len(STEPS), -1)


def gradients(model: nn.Module, points: Tensor, label: int) -> Tensor:
    """Gradients of a score at some points."""
    found = []
    for part in points.split(MOST):
        entry = part.clone().requires_grad_()
        score = model(entry)[:, label].sum()
        found.append(torch.autograd.grad(score, entry)[0])
    return torch.cat(found)


def errors(model: nn.Module, network: abm.Network, x: Tensor, start: Tensor, label: int) -> dict:
    """Errors of all rules, and the number of regions."""
    truth = abm.integrated_gradients(network, x, start, units=label)
    exact = truth.image.reshape(x.shape)
    change = float(truth.change.sum())
    size = float(exact.abs().sum())
    places, weights = sampling()
    slopes = gradients(model, torch.lerp(start, x, places[:, None, None, None]), label)
    sampled = (x - start) * torch.tensordot(weights, slopes, 1)
    pixels = (sampled - exact).flatten(2).abs().sum(2) / size
    total = (sampled.flatten(2).sum(2) - change).abs() / abs(change)
    return {
        "regions": int(truth.regions),
        "change": change,
        "gap": abs(float(exact.sum()) - change) / size,
        "pixels": dict(zip(RULES, pixels.tolist(), strict=True)),
        "total": dict(zip(RULES, total.tolist(), strict=True)),
        "total_of_sizes": dict(zip(RULES, (total * abs(change) / size).tolist(), strict=True)),
    }


def measure(model: nn.Module, network: abm.Network, number: int) -> dict[str, Any]:
    """Errors of all rules from all baselines for one image."""
    images = data.sample()
    x = images.unit_interval()[number].double()
    label = int(images.labels[number])
    return {
        name: errors(model, network, x, baseline(x), label) for name, baseline in BASELINES.items()
    }


# as Sotoudeh and Thakur measure


def mean_error(sampled: Tensor, exact: Tensor) -> float:
    """Mean over the pixels of the relative error of each, as their code defines it."""
    return float(((sampled - exact).abs() / (exact + 1e-11).abs()).mean())


def as_published(model: nn.Module, network: abm.Network, x: Tensor, label: int) -> dict[str, Any]:
    """One image's part of Tables 1 and 2 of [Sotoudeh2019], from black.

    Table 1: the left rule with the first number of gradients, from 20 on, whose sum is within 1 %.
    Table 2: the first number of parts from which on five in a row are within 5 %, for each rule.
    """
    truth = abm.integrated_gradients(network, x, 0.0, units=label)
    exact = truth.image.flatten()
    change = float(truth.change.sum())
    line = abm.region_line(network, torch.zeros_like(x), x)
    # a gradient is the same everywhere in a region, so one for each region is enough
    slopes = gradients(model, line.at(line.middles), label).flatten(1)

    @cache
    def of(n: int) -> tuple[dict[str, float], float]:
        """Errors of the rules with n parts, and that of the sum by the left rule."""
        sampled = {}
        for rule in ENDS:
            places, weights = RULES[rule](n)
            in_region = torch.zeros(line.regions).double()
            in_region.index_add_(0, torch.searchsorted(line.t[1:-1], places), weights)
            sampled[rule] = x.flatten() * (in_region @ slopes)
        errors = {rule: mean_error(found, exact) for rule, found in sampled.items()}
        return errors, abs(float(sampled["left"].sum()) - change) / abs(change)

    found: dict[str, Any] = {"regions": int(truth.regions)}
    for n in range(20, MOST_PARTS + 1):
        if of(n)[1] < 0.01:
            found |= {"steps": n, "error": of(n)[0]["left"]}
            break
    for rule in ENDS:
        first = five_in_a_row(lambda n, rule=rule: of(n)[0][rule] < 0.05)
        if first is not None:
            found[rule] = first + (rule == "trapezoid")  # it takes both ends
    return found


def five_in_a_row(holds: Callable[[int], bool]) -> int | None:
    """The first number from which on five in a row hold, up to MOST_PARTS."""
    for middle in range(5, MOST_PARTS + 1, 5):  # five in a row have one multiple of 5
        if holds(middle):
            for first in range(middle - 4, middle + 1):
                if all(holds(n) for n in range(first, first + 5)):
                    return first
    return None


def run_published(folder: Path | None, kept: Path, images: int) -> None:
    """Measure images of conv_small_pgd as [Sotoudeh2019] does, and keep each at once."""
    exact = load("conv_small_pgd", folder).double()
    numbers, _ = chosen(exact.float())
    exact = exact.double()
    network = abm.trace(exact, data.sample().unit_interval()[:2].double())
    path = kept / "conv_small_pgd.published"
    kept.mkdir(parents=True, exist_ok=True)
    done = read(path)
    for number in numbers[:images]:
        if number not in done:
            x = data.sample().unit_interval()[number].double()
            row = as_published(exact, network, x, int(data.sample().labels[number]))
            with path.open("a") as file:
                file.write(json.dumps({"image": number, **row}) + "\n")


def as_published_means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and median over images; images that miss a limit are left out, as in the tables."""
    keys = ("error", "regions", *ENDS)
    whole = [row for row in rows if all(key in row for key in keys)]
    found = {key: [row[key] for row in whole] for key in keys}
    means = {key: [float(np.mean(of)), float(np.median(of))] for key, of in found.items()}
    return {"images": len(rows), "left out": len(rows) - len(whole), **means}


def run(name: str, folder: Path | None, kept: Path, images: int) -> None:
    """Measure what a network lacks, and keep each image at once."""
    model = load(name, folder)
    numbers, _ = chosen(model)
    network = abm.trace(model, data.sample().unit_interval()[:2])
    path = kept / f"{name}.integrals"
    kept.mkdir(parents=True, exist_ok=True)
    done = read(path)
    exact = load(name, folder).double()
    for number in numbers[:images]:
        if number in done:
            continue
        started = time.perf_counter()
        row = {"image": number, **measure(exact, network, number)}
        row["seconds"] = round(time.perf_counter() - started, 2)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(name, len(read(path)), flush=True)


# results


def collected(kept: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Errors of all networks that have images: medians, with intervals.

    Args:
        kept: Lines of images.
        before: Earlier results. Those of networks with more images stay.
    """
    earlier = before.get("networks", {})
    networks = {}
    for name in NAMES:
        rows = list(read(kept / f"{name}.integrals").values())
        if name in earlier and earlier[name]["images"] >= len(rows):
            networks[name] = earlier[name]
        elif rows:
            parts = {b: summary([row[b] for row in rows]) for b in BASELINES}
            networks[name] = {"images": len(rows), "baselines": parts}
    here = {**environment(), "cores": os.cpu_count()}
    published = list(read(kept / "conv_small_pgd.published").values())
    found = as_published_means(published) if published else before.get("published")
    return {"environment": here, "networks": networks, "published": found}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one network and one baseline."""
    return {
        "regions": spread([row["regions"] for row in rows]),
        "gap": max(row["gap"] for row in rows),
        **{
            kind: {
                rule: [spread([row[kind][rule][n] for row in rows]) for n in range(len(STEPS))]
                for rule in RULES
            }
            for kind in ("pixels", "total")
        },
        "needed": {
            rule: [
                np.median([needed(row["pixels"][rule], most) for row in rows]) for most in LIMITS
            ]
            for rule in RULES
        },
    }


def needed(errors: list[float], most: float) -> float:
    """The number of gradients from which on an error is at most a limit; infinite if none is."""
    above = [n for n, error in enumerate(errors) if error > most]
    first = above[-1] + 1 if above else 0
    return STEPS[first] if first < len(STEPS) else float("inf")


def picture(found: dict[str, Any], path: Path) -> None:
    """Draw both errors of all rules against the number of gradients, for conv_small_pgd."""
    from matplotlib.figure import Figure

    part = found["networks"]["conv_small_pgd"]["baselines"]["black"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    titles = {"pixels": "error per pixel", "total": "error of the sum"}
    for axes, (kind, title) in zip(both, titles.items(), strict=True):
        for rule in RULES:
            medians, low, high = 100 * np.array(part[kind][rule]).T
            axes.plot(STEPS, medians, marker=".", label=rule)
            axes.fill_between(STEPS, low, high, alpha=0.12)
        axes.set(xscale="log", yscale="log", xlabel="gradients", title=title)
        axes.set_xticks(STEPS, [str(n) for n in STEPS], minor=False)
        axes.minorticks_off()
        axes.grid(color="0.92")
    both[0].set_ylabel("median over images, in %")
    both[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def finite(number: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return number if number < float("inf") else None


def markdown(found: dict[str, Any]) -> str:
    """The tables of errors and of the gradients that are needed."""
    sheets = []
    for kind, title in (
        ("pixels", f"Error per pixel with {SHOWN} gradients, in percent"),
        ("total", f"Error of the sum with {SHOWN} gradients, in percent"),
    ):
        sheet = Sheet(title, ["network", "images", "baseline", "regions", *RULES])
        for name, baseline, images, f in _rows(found):
            errors = [cell(f[kind][rule][STEPS.index(SHOWN)], 100) for rule in RULES]
            regions = cell(f["regions"], 1, "{:,.0f}")
            sheet.rows.append([f"`{name}`", f"{images}", baseline, regions, *errors])
        sheets.append(sheet)
    title = "Gradients that are needed for an error per pixel of at most 5 %, 1 %"
    sheet = Sheet(title, ["network", "images", "baseline", *RULES])
    for name, baseline, images, f in _rows(found):
        cells = [", ".join(map(_number, f["needed"][rule])) for rule in RULES]
        sheet.rows.append([f"`{name}`", f"{images}", baseline, *cells])
    sheets.append(sheet)
    if found.get("published"):
        sheets.append(published_sheet(found["published"]))
    return "\n\n".join(sheet.markdown() for sheet in sheets)


def published_sheet(found: dict[str, Any]) -> Sheet:
    """Means, as Tables 1 and 2 of [Sotoudeh2019] have them, and medians, for conv_small_pgd."""
    head = ["network", "images", "left out", "error of the usual rule", "exact: regions"]
    sheet = Sheet(
        "Measured as in Tables 1 and 2 of Sotoudeh and Thakur",
        [*head, *ENDS],
    )
    columns = {"error": ("{:.1f} %", 100), **dict.fromkeys(("regions", *ENDS), ("{:,.0f}", 1))}
    cells = []
    for key, (pattern, factor) in columns.items():
        mean, median = (pattern.format(factor * number) for number in found[key])
        cells.append(f"{mean} (median {median})")
    counts = [str(found["images"]), str(found["left out"])]
    sheet.rows.append(["`conv_small_pgd`", *counts, *cells])
    return sheet


def _rows(found: dict[str, Any]) -> list[tuple[str, str, int, dict[str, Any]]]:
    return [
        (name, baseline, f["images"], part)
        for name, f in found["networks"].items()
        for baseline, part in f["baselines"].items()
    ]


def _number(steps: float | None) -> str:
    return f"more than {STEPS[-1]}" if steps is None else f"{steps:g}"


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=os.environ.get(FOLDER), help="the files")
    parser.add_argument("--only", default=",".join(NAMES), help="names of networks, with commas")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--picture", type=Path, help="file for the picture of the errors")
    parser.add_argument("--published", type=int, default=0, help="images as in [Sotoudeh2019]")
    parser.add_argument("--kept", type=Path, default=Path("runs/integrals"), help="lines of images")
    parser.add_argument("--out", type=Path, default=Path("docs/results/integrals.json"))
    parser.add_argument("--docs", type=Path, help="page to write the tables into")
    arguments = parser.parse_args()
    for name in filter(None, arguments.only.split(",")):
        run(name, arguments.folder, arguments.kept, arguments.images)
    if arguments.published:
        run_published(arguments.folder, arguments.kept, arguments.published)
    if arguments.kept.is_dir():
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        write(arguments.out, json.dumps(collected(arguments.kept, before), indent=1) + "\n")
    found = json.loads(arguments.out.read_text())
    print(markdown(found))
    if arguments.picture:
        picture(found, arguments.picture)
    if arguments.docs:
        PLACE.check(arguments.docs)
        PLACE.fill(arguments.docs, markdown(found))


if __name__ == "__main__":
    main()
