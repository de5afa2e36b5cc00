"""Experiments 1 and 3 on many images: distributions and failure counts instead of one picture."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adjointbackmap import data, plots
from adjointbackmap.engine.pattern import record_pattern
from adjointbackmap.exactness.journal import Record
from adjointbackmap.exactness.layer_check import SHARE_LIMIT
from adjointbackmap.plots.drawing import (
    COLOURS,
    MARKERS,
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    finished,
    new_figure,
)
from adjointbackmap.report.sections import Claim, Picture, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.gates import flipped, gate_counts, near_kinks
from adjointbackmap.study.adversarial.noise_patterns import PATTERNS
from adjointbackmap.study.adversarial.pairs import angles, attack_of, attacked_pair, relative_change
from adjointbackmap.study.adversarial.scaled import spread_of
from adjointbackmap.study.published.columns import COLUMNS
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.setup import SCALE, Setup, Trained, read_json, write_json
from adjointbackmap.study.verification.tally import interval

KEY = "many"
BATCH = 20  # images per forward pass
PARTS = ("image", "bias")

Found = dict[str, Any]
Networks = dict[str, list[Found]]


def compute(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Measure many images with every network of a run.

    An image is skipped if it was finished earlier with the same settings.

    Args:
        setup: Networks, number of images, seed and folder.
        report: Called with the current task and its finished share.
    """
    for name in setup.networks:
        report(f"{name}: images", 0.0)
        trained = setup.trained(name)
        images = setup.many(name)
        job = {**attack_of(trained, images), "seed": setup.seed, "patterns": PATTERNS}
        record = Record(_record_path(setup.folder, name, job), job)
        try:
            _measure(
                trained,
                images,
                setup.seed,
                record,
                lambda share, name=name: report(f"{name}: images", share),  # type: ignore[misc]
            )
        finally:
            kept = dict(record.results())
            finished = {image: kept[image] for image in images.hashes if image in kept}
            write_json(
                setup.folder / KEY / f"{name}.json",
                {"job": job, "asked": setup.images, "images": finished},
            )


def _measure(
    trained: Trained,
    images: data.Images,
    seed: int,
    record: Record,
    report: Callable[[float], None],
) -> None:
    """Compute the images that the record lacks, and append them to it."""
    missing = [n for n, image in enumerate(images.hashes) if image not in record.names]
    for start in range(0, len(missing), BATCH):
        part = images[missing[start : start + BATCH]]
        for n, found in enumerate(measured(trained, part)):
            one = part[n]
            found["spread"] = spread_of(
                trained,
                one.unit_interval(),
                int(one.labels),
                seed,
                PATTERNS,
            )
            record.append(part.hashes[n], found)
            report(1 - (len(missing) - start - n - 1) / len(images))
    report(1.0)


def measured(trained: Trained, images: data.Images) -> list[Found]:
    """Experiment 1 on a batch: the changes between each image and its attacked version.

    Args:
        trained: The network.
        images: Images that it classifies correctly.

    Returns:
        A JSON-compatible dictionary for each image. ``errors`` holds the largest error of all
        outputs, relative to the largest output. ``changed`` and ``angle`` (in degrees) are those of
        the label's hyperplane.
    """
    pair = attacked_pair(trained, images)
    network = trained.network
    both = (pair.original, pair.adversarial)
    parts = pair.parts
    patterns = [record_pattern(network, planes.x, SCALE) for planes in both]
    near = [torch.stack([*near_kinks(network, planes.x).values()]).sum(0) for planes in both]
    flips = flipped(*patterns)
    counts = gate_counts(patterns[0])
    value = pair.adversarial.value
    rebuilt = {"H_adv": pair.adversarial.reconstruct(), "H_orig": pair.with_original}
    errors = {
        key: (sums - value).abs().amax(1) / value.abs().amax(1) for key, sums in rebuilt.items()
    }
    turned, changed = (
        {part: of(*both, 2) for part, both in parts.items()} for of in (angles, relative_change)
    )
    found = pair.found
    inputs_changed = pair.inputs_changed
    pixels_changed = relative_change(found.pixels, found.adversarial, 1)
    fooled = found.fooled(images.labels)
    return [
        {
            "label": label,
            **{
                key: getattr(found, key)[n].item()
                for key in ("before", "after", "steps", "l2", "linf")
            },
            "fooled": bool(fooled[n]),
            "pixels changed": float(pixels_changed[n]),
            "inputs changed": float(inputs_changed[n]),
            "changed": {part: float(change[n, label]) for part, change in changed.items()},
            "angle": {part: float(angle[n, label]) for part, angle in turned.items()},
            "median angle": {part: float(angle[n].median()) for part, angle in turned.items()},
            "errors": {key: float(error[n]) for key, error in errors.items()},
            "class with H_orig": int(rebuilt["H_orig"][n].argmax()),
            "flipped": {layer: float(share[n]) for layer, share in flips.items()},
            "gates flipped": round(
                sum(float(share[n]) * counts[layer] for layer, share in flips.items())
            ),
            "near kinks": [int(count[n]) for count in near],
            "gates": sum(counts.values()),
        }
        for n, label in enumerate(images.labels.tolist())
    ]


def section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results.

    Returns:
        The section, or ``None`` if there are no results.
    """
    runs = {name: read_json(p) for name in COLUMNS if (p := folder / KEY / f"{name}.json").exists()}
    networks = {name: list(run["images"].values()) for name, run in runs.items() if run["images"]}
    if not networks:
        return None
    seeds, patterns = (
        ", ".join(map(str, sorted({r["job"][key] for r in runs.values()})))
        for key in ("seed", "patterns")
    )
    ran = (
        f"A seeded draw (seed {seeds}) of test images, for each network those that it classifies "
        "correctly: experiment 1 on each of them (basic iterative method, stopped at the first "
        f"success), and the spread ratio of experiment 3 ({patterns} patterns of each kind).",
        "; ".join(
            f"{name}: {len(found)} of {runs[name]['asked']} images"
            for name, found in networks.items()
        )
        + ".",
    )
    return Section(
        KEY,
        "Many images",
        ran,
        (*claims(networks), table(networks), *_pictures(folder, networks)),
    )


def claims(networks: Networks) -> Iterator[Claim]:
    """The claims of the report, with the numbers of all networks.

    A claim holds if it holds for each network.

    Args:
        networks: Name of a network -> results of its images.
    """
    worst = {
        name: max(r["errors"]["H_adv"] for r in _fooled(found))
        for name, found in networks.items()
        if _fooled(found)
    }
    yield Claim(
        "The hyperplanes of the adversarial image reproduce its outputs, in every image.",
        "largest |error| relative to the largest output: "
        + "; ".join(f"{name}: {error:.1e}" for name, error in worst.items()),
        max(worst.values()) <= SHARE_LIMIT if worst else None,
    )
    for text, holds in (
        (
            "The hyperplanes of the original image do not: an output is off by more than 1 % of the largest one",
            _is_off,
        ),
        (
            "With the hyperplanes of the original image, the class is another one than the network's",
            _is_another_class,
        ),
        (
            "More gates flip than are within rounding of their kink, before and after the attack together",
            _flips_more,
        ),
    ):
        yield _most(
            f"{text}, in most images.",
            {name: list(map(holds, _fooled(found))) for name, found in networks.items()},
        )
    for part in PARTS:
        text = f"The label's hyperplane ({part} part) changes more than the network's input, each relative to its norm"
        pairs = {
            name: [(r["changed"].get(part), r["inputs changed"]) for r in _fooled(found)]
            for name, found in networks.items()
        }
        yield from _of_part(text, pairs)
        text = f"The label's hyperplane ({part} part, mean distances) spreads more under adversarial than under Gaussian patterns"
        ratios = {
            name: [(r["spread"][f"distances {part}"], 1.0) for r in found]
            for name, found in networks.items()
        }
        yield from _of_part(text, ratios)


def table(networks: Networks) -> Table:
    """Table of failure counts, and of each number's median and 5 to 95 % range.

    Args:
        networks: Name of a network -> results of its images.
    """
    sheet = Sheet("Distributions over images", ["", *networks])
    for row, count in COUNTS.items():
        sheet.rows.append([row, *(str(sum(map(count, found))) for found in networks.values())])
    for row, number in NUMBERS.items():
        known = [
            [float(v) for r in found if (v := number(r)) is not None] for found in networks.values()
        ]
        if any(known):
            sheet.rows.append(
                [row, *(str(Quantiles.of(values)) if values else "" for values in known)]
            )
    caption = (
        "Medians, in brackets where nine in ten images lie. Rows of experiment 1 leave out "
        "images whose attack failed, spread ratios those whose patterns could not be made. "
        "Change: norm of the difference over the norm before. Errors: the largest of all "
        "outputs, relative to the largest output. Spread ratio: adversarial over Gaussian "
        "patterns; control: Gaussian ones with the variance of each pixel."
    )
    return Table(sheet, caption)


def _of_attack(number: Callable[[Found], float | None]) -> Callable[[Found], float | None]:
    """Restrict a number of experiment 1 to images whose attack succeeded."""
    return lambda r: number(r) if r["fooled"] else None


def _short_of(kind: str) -> Callable[[Found], bool]:
    return lambda r: f"{kind} patterns" in (r["spread"]["missing"] or "")


def _spread(key: str) -> Callable[[Found], float | None]:
    return lambda r: r["spread"][key]


COUNTS: dict[str, Callable[[Found], bool]] = {
    "images": lambda r: True,
    "failed: the attack": lambda r: not r["fooled"],
    "failed: too few adversarial patterns": _short_of("adversarial"),
    "failed: too few Gaussian patterns": _short_of("Gaussian"),
    "failed: too few control patterns": _short_of("control"),
}
"""Row of the table -> whether an image counts towards it."""

NUMBERS: dict[str, Callable[[Found], float | None]] = {
    "steps of the attack": _of_attack(lambda r: r["steps"]),
    "change of the pixels": _of_attack(lambda r: r["pixels changed"]),
    "change of the network's input": _of_attack(lambda r: r["inputs changed"]),
    "change of the label's image part": _of_attack(lambda r: r["changed"]["image"]),
    "change of the label's bias part": _of_attack(lambda r: r["changed"].get("bias")),
    "angle of the label's image parts, degrees": _of_attack(lambda r: r["angle"]["image"]),
    "angle of the label's bias parts, degrees": _of_attack(lambda r: r["angle"].get("bias")),
    "angle of image parts, median of classes": _of_attack(lambda r: r["median angle"]["image"]),
    "angle of bias parts, median of classes": _of_attack(lambda r: r["median angle"].get("bias")),
    "error with H_adv": _of_attack(lambda r: r["errors"]["H_adv"]),
    "error with H_orig": _of_attack(lambda r: r["errors"]["H_orig"]),
    "gates flipped, %": _of_attack(lambda r: 100 * r["gates flipped"] / r["gates"]),
    "gates within rounding, original": _of_attack(lambda r: r["near kinks"][0]),
    "gates within rounding, adversarial": _of_attack(lambda r: r["near kinks"][1]),
    **{
        f"spread ratio, {measure}, {part} part": _spread(f"{measure} {part}")
        for part in PARTS
        for measure in ("distances", "variances")
    },
    **{
        f"spread ratio, distances, {part} part, control": _spread(f"control distances {part}")
        for part in PARTS
    },
    "patterns drawn again": _spread("redrawn"),
}
"""Row of the table -> the number of an image, or ``None`` if it has none."""


def _is_off(r: Found) -> bool:
    return r["errors"]["H_orig"] > SHARE_LIMIT


def _is_another_class(r: Found) -> bool:
    return r["class with H_orig"] != r["after"]


def _flips_more(r: Found) -> bool:
    return r["gates flipped"] > sum(r["near kinks"])


def _most(text: str, flags: dict[str, list[bool]]) -> Claim:
    """A claim about most images.

    It holds if the 95 % interval of the share lies above one half for each network.
    """
    words = []
    verdicts = []
    for name, held in flags.items():
        if held:
            count = len(held)
            outside = held.count(False)
            low, high = interval(count, outside, count, outside)
            words.append(
                f"{name}: {count - outside} of {count} ({100 * low:.0f} to {100 * high:.0f} %)"
            )
            verdicts.append(True if low > 0.5 else False if high < 0.5 else None)
    holds = False if False in verdicts else None if None in verdicts or not verdicts else True
    return Claim(text, "; ".join(words) or "no image", holds)


def _of_part(text: str, pairs: dict[str, list[tuple[float | None, float]]]) -> Iterator[Claim]:
    """A claim that one number exceeds another in most images.

    No claim is made if no image has the first number.
    """
    flags = {
        name: [number > other for number, other in found if number is not None]
        for name, found in pairs.items()
    }
    if any(flags.values()):
        yield _most(f"{text}, in most images.", flags)


def _fooled(found: Sequence[Found]) -> list[Found]:
    return [r for r in found if r["fooled"]]


def _record_path(folder: Path, name: str, job: Found) -> Path:
    """The record's file: each job has its own."""
    return folder / KEY / f"{name}-{hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8]}.jsonl"


def _pictures(folder: Path, networks: Networks) -> Iterator[Picture]:
    """Flipped gates per layer for each data set, then angles and spread ratios of all images."""
    for classes in ("cifar10", "cifar100"):
        chosen = {
            name: found
            for name, found in networks.items()
            if name.endswith(f"-{classes}") and _fooled(found)
        }
        if chosen:
            # The deepest network comes first: it sets the order of the layers on the axis.
            deepest = sorted(chosen, key=lambda name: -len(chosen[name][0]["flipped"]))
            values = {name: _by_layer(_fooled(chosen[name])) for name in deepest}
            title = f"Gates that flip under adversarial noise ({classes})"
            drawing = plots.by_layer(
                values,
                title,
                "% of a layer's gates: median, and where nine in ten images lie",
            )
            yield _saved(folder, f"flipped-{classes}", drawing)
    turned = {
        part: {n: [r["angle"].get(part) for r in _fooled(f)] for n, f in networks.items()}
        for part in PARTS
    }
    yield _saved(
        folder,
        "angles",
        _strips(turned, "Angle between H and H_adv of the label's class", "degrees", False),
    )
    ratios = {
        part: {n: [r["spread"][f"distances {part}"] for r in f] for n, f in networks.items()}
        for part in PARTS
    }
    title = "Spread of the label's hyperplane: adversarial over Gaussian patterns"
    yield _saved(
        folder,
        "spread",
        _strips(ratios, title, "ratio of mean distances; the line is at 1", True),
    )


def _by_layer(found: Sequence[Found]) -> dict[str, tuple[float, float, float]]:
    shares = {
        layer: Quantiles.of([r["flipped"][layer] for r in found], 100.0)
        for layer in found[0]["flipped"]
    }
    return {layer: (share.median, share.low, share.high) for layer, share in shares.items()}


def _strips(
    values: dict[str, dict[str, list[Any]]],
    title: str,
    quantity: str,
    ratio: bool,
) -> Drawing:
    """A row of points for each network and part, with its median.

    Image parts and bias parts have different colours.
    """
    rows = [
        (name, part)
        for name in values["image"]
        for part in values
        if any(v is not None for v in values[part][name])
    ]
    figure = new_figure(WIDTH, 1.5 + 0.45 * max(1, len(rows)), title)
    axes = figure.add_subplot()
    numbers = {}
    for place, (name, part) in enumerate(rows):
        known = np.array([v for v in values[part][name] if v is not None])
        # Points are spread over the height of the row so that they do not hide each other.
        heights = place + np.linspace(-0.25, 0.25, len(known))
        look = PARTS.index(part)
        axes.scatter(
            known,
            heights,
            s=12,
            color=COLOURS[look],
            marker=MARKERS[look],
            alpha=0.6,
            linewidths=0,
        )
        axes.plot([np.median(known)] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        numbers[f"{name} {part}"] = known
    if ratio:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_yticks(
        range(len(rows)),
        [f"{name}, {part} part" for name, part in rows],
        fontsize=SMALL,
    )
    axes.invert_yaxis()
    axes.set_xlabel(quantity, fontsize=MEDIUM)
    axes.tick_params(axis="x", which="both", labelsize=SMALL)
    return finished(figure, numbers, "a point for each image, a black line at the median")


def _saved(folder: Path, stem: str, drawing: Drawing) -> Picture:
    path = plots.save(drawing, folder / KEY / f"{stem}.png", formats=("png", "svg"))
    return Picture(path.relative_to(folder), drawing.caption)
