"""Experiment 3 [Wan2022, sections 4.2.3 and 4.3.3]: scaled-down adversarial and Gaussian noise.

The hyperplane of the label's class is compared under the two kinds of noise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data, plots
from adjointbackmap.plots.drawing import MEDIUM
from adjointbackmap.plots.groups import Interval
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.noise_patterns import PATTERNS, TRIES, Patterns, make_patterns
from adjointbackmap.study.adversarial.spread import MEASURES, Ratio, factors, spread, spread_ratio
from adjointbackmap.study.adversarial.targets import PARTS, label_hyperplanes, settings_of
from adjointbackmap.study.charts import interval_rows
from adjointbackmap.study.results import Arrays, Found, keep, kept, run_words, save_picture
from adjointbackmap.study.setup import Setup, Trained

KEY = "scaled"
OTHER_KINDS = ("Gaussian", "control")  # adversarial patterns are compared with these
FACTORS = 2  # axes of the pictures


def spread_of(
    trained: Trained,
    pixels: Float[Tensor, "1 3 32 32"],
    label: int,
    seed: int,
    patterns: int = PATTERNS,
) -> dict[str, Any]:
    """Compare how far a class's hyperplane spreads under adversarial and under Gaussian noise.

    The adversarial noise is scaled down. A ratio is the spread under adversarial noise divided by
    the spread under the other noise.

    Args:
        trained: The network.
        pixels: An image in [0, 1] that it classifies correctly.
        label: Its class.
        seed: Seed of all draws.
        patterns: Number of patterns of each kind, at least two.

    Returns:
        A JSON-compatible dictionary. The ratios to Gaussian noise are ``"distances image"``,
        ``"variances image"``, ``"distances bias"`` and ``"variances bias"``. The ratios to the
        control have the same names after ``"control "``. A bias ratio is ``None`` for a network
        without biases. ``"redrawn"`` is the number of patterns that were drawn again, and
        ``"targets"`` the number of the nine targets that were reached. ``"missing"`` says which
        patterns could not be made, or is ``None``. If some are missing, all ratios are ``None``.

    Raises:
        ValueError: If ``patterns`` is less than 2.
    """
    made = make_patterns(trained, pixels, label, seed, patterns)
    parts = {} if made.missing else hyperplane_parts(trained, made, label)
    found: dict[str, Any] = {}
    for before, kind in (("", "Gaussian"), ("control ", "control")):
        for part in PARTS:
            known = bool(parts) and parts[kind][part].numel() > 0
            for measure in MEASURES:
                ratio = None
                if known:
                    other = spread(parts[kind][part], measure)
                    ratio = spread(parts["adversarial"][part], measure) / other
                found[f"{before}{measure} {part}"] = ratio
    return found | {
        "redrawn": sum(made.redrawn.values()),
        "targets": len(made.targets),
        "missing": made.missing,
    }


def hyperplane_parts(
    trained: Trained,
    made: Patterns,
    label: int,
) -> dict[str, dict[str, Float[Tensor, "n d"]]]:
    """Image parts and bias parts of the label's hyperplane under each pattern, for each kind.

    The bias parts have no columns if the network has no biases.
    """
    planes = label_hyperplanes(trained, torch.cat(list(made.images.values())), label)
    images = planes.image.flatten(1).split(made.wanted)
    biases = planes.bias.split(made.wanted)
    groups = zip(made.images, images, biases, strict=True)
    return {kind: {"image": image, "bias": bias} for kind, image, bias in groups}


def compute_scaled(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Run the experiment on every network of a run.

    A network is skipped if the folder has its results for the same weights, image and settings.

    Args:
        setup: Networks, image, seed and folder.
        report: Called with what is computed and the share that is done.
    """
    for number, name in enumerate(setup.networks):
        report(f"{name}: adversarial and Gaussian noise", number / len(setup.networks))
        trained = setup.trained(name)
        image = setup.one(name)
        settings = {**settings_of(trained, image, setup.seed), "patterns": PATTERNS, "tries": TRIES}
        measure = partial(measure_scaled, trained, image, setup.seed)
        keep(setup.folder / KEY / f"{name}.json", settings, measure)
    report("adversarial and Gaussian noise", 1.0)


def measure_scaled(trained: Trained, image: data.Images, seed: int) -> tuple[Found, Arrays]:
    """Compute the numbers of one network at one image, and the arrays for its pictures.

    Args:
        trained: The network.
        image: The one image.
        seed: Seed of all draws.
    """
    pixels = image.unit_interval()
    label = int(image.labels)
    made = make_patterns(trained, pixels, label, seed, PATTERNS)
    found: Found = {
        "classes": list(image.classes),
        "label": label,
        "targets": made.targets.tolist(),
        "of": torch.bincount(made.target, minlength=len(image.classes))[made.targets].tolist(),
        "beta": [float(end) for end in made.beta.aminmax()] if len(made.beta) else [],
        "noise": {
            kind: _described(noise, made.images[kind] - pixels)
            for kind, noise in made.noise.items()
        },
        "redrawn": made.redrawn,
        "missing": made.missing,
    }
    if made.missing:
        return found, {}
    parts = hyperplane_parts(trained, made, label)
    for kind, images in made.images.items():
        parts[kind]["noise"] = (images - pixels).flatten(1)
    found["ratios"] = {kind: {} for kind in OTHER_KINDS}
    arrays = {}
    found["factors"] = {}
    for part, points in parts["adversarial"].items():
        if not points.numel():
            continue
        for kind in OTHER_KINDS:
            found["ratios"][kind][part] = _ratios(points, parts[kind][part], seed)
        if part != "noise":
            arrays[part] = factors(torch.cat([points, parts["Gaussian"][part]]), FACTORS, seed)
            red, blue = torch.from_numpy(arrays[part]).split(len(points))
            found["factors"][part] = _ratios(red, blue, seed)
    return found, arrays


def _ratios(first: Tensor, second: Tensor, seed: int) -> Found:
    """The spread of the first points divided by that of the second, in each measure."""
    return {measure: asdict(spread_ratio(first, second, measure, seed)) for measure in MEASURES}


def _described(drawn: Tensor, clipped: Tensor) -> Found:
    """Statistics of the patterns, as drawn and after clipping.

    Mean and standard deviation are over all pixels of all patterns. The norm is the mean Euclidean
    norm after clipping.
    """
    if not len(drawn):
        return {"patterns": 0}
    return {
        "patterns": len(drawn),
        "mean drawn": float(drawn.double().mean()),
        "mean clipped": float(clipped.double().mean()),
        "deviation drawn": float(drawn.double().std()),
        "deviation clipped": float(clipped.double().std()),
        "l2": float(clipped.double().flatten(1).norm(dim=1).mean()),
    }


def scaled_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results of all experiments.
    """
    results = list(kept(folder / KEY))
    if not results:
        return None
    blocks: list[ReportBlock] = [
        Table(_summary(results), SUMMARY_CAPTION),
        Table(_pattern_rows(results), PATTERNS_CAPTION),
    ]
    blocks += _ratio_charts(folder, {name: found for name, found, _ in results})
    for name, found, arrays in results:
        blocks += [*_claims(name, found), *_pictures(folder, name, found, arrays)]
    ran = (RAN, *(f"{run_words(name, found)}." for name, found, _ in results))
    title = "Experiment 3: scaled-down adversarial noise and Gaussian noise"
    return Section(KEY, title, ran, tuple(blocks))


RAN = (
    "The noises of experiment 2 that reached their targets are scaled down by factors drawn from "
    f"0 to 1: {PATTERNS} patterns that still deceive the network, the same number for each target "
    f"if possible. They are compared with {PATTERNS} Gaussian patterns that have the mean and the "
    "variance of all their pixels and do not change the class, and with a control: Gaussian "
    "patterns with their variance in each pixel. The sum of image and pattern is clipped to "
    "pixels from 0 to 1. A pattern with the wrong effect on the class is drawn again, "
    f"{TRIES} times at most. The hyperplane is that of the label's class (RM0, pattern at 1/8)."
)
SUMMARY_CAPTION = (
    "Spread under adversarial patterns over that under Gaussian ones or the control: of the "
    "patterns themselves (clipped), of the hyperplanes in the original space, and of the points "
    "in the pictures of two factors. Columns are mean pairwise distances, or total variances if "
    "they are named, with the bootstrap's 95 % interval over patterns. The adversarial patterns "
    "come from nine attacks; the interval does not cover other attacks. Factors are the directions "
    "that patterns share, and all else counts as noise: the pictures leave it out, so that only "
    "the ratio in the original space is evidence."
)
PATTERNS_CAPTION = (
    "Patterns in pixels from 0 to 1: how many, how many drawn ones did not fit, mean and "
    "standard deviation over all pixels of all patterns as drawn and after clipping, mean "
    "Euclidean norm after clipping; for adversarial patterns the targets, how many patterns of "
    "each, and the range of the factor."
)


def _summary(results: Sequence[tuple[str, Found, Arrays]]) -> Sheet:
    head = ["network", "image", "against", "patterns themselves"]
    for part in PARTS:
        head += [f"{part} part", f"{part} part, variances", f"{part} part, two factors"]
    sheet = Sheet("Spread under adversarial patterns over that under others", head)
    for name, found, _ in results:
        for kind in OTHER_KINDS if not found["missing"] else ():
            ratios = found["ratios"][kind]
            placed = found["factors"] if kind == "Gaussian" else {}
            row = [f"`{name}`", found["classes"][found["label"]], kind, _ratio(ratios, "noise")]
            for part in PARTS:
                row += [_ratio(ratios, part), _ratio(ratios, part, "variances")]
                row.append(_ratio(placed, part))
            sheet.rows.append(row)
        if found["missing"]:
            row = [f"`{name}`", found["classes"][found["label"]], found["missing"]]
            sheet.rows.append(row + [""] * (len(head) - len(row)))
    return sheet


def _ratio(ratios: Found, part: str, measure: str = "distances") -> str:
    """A ratio with its interval; empty if there is none."""
    return str(Ratio(**ratios[part][measure])) if part in ratios else ""


def _pattern_rows(results: Sequence[tuple[str, Found, Arrays]]) -> Sheet:
    """Table with a row for each network and kind of patterns."""
    numbers = ["mean drawn", "mean clipped", "deviation drawn", "deviation clipped", "l2"]
    head = ["network", "kind", "patterns", "redrawn", *numbers]
    sheet = Sheet("Patterns", [*head, "patterns of each target", "factor"])
    for name, found, _ in results:
        targets = zip(found["targets"], found["of"], strict=True)
        of = ", ".join(f"{found['classes'][target]} {count}" for target, count in targets)
        beta = " to ".join(f"{end:.2f}" for end in found["beta"])
        for kind, noise in found["noise"].items():
            row = [f"`{name}`", kind, str(noise["patterns"]), str(found["redrawn"][kind])]
            made = noise["patterns"] > 0
            row += [f"{noise[number]:.5f}" if made else "" for number in numbers]
            sheet.rows.append([*row, *((of, beta) if kind == "adversarial" else ("", ""))])
    return sheet


def _claims(name: str, found: Found) -> Iterator[Claim]:
    """The published claim for each part, in the original space and in the plane of two factors."""
    sentence = (
        "effective hyperplanes of adversarial cases are significantly more spread out than "
        "non-adversarial cases"
    )
    if found["missing"]:
        yield Claim(f"In the original space: {sentence}.", found["missing"], None, network=name)
        return
    published = f"in a picture: {_published(found)}"
    for part, both in found["factors"].items():
        ratio, control = (Ratio(**found["ratios"][kind][part]["distances"]) for kind in OTHER_KINDS)
        plane = Ratio(**both["distances"])
        noise = _ratio(found["ratios"]["Gaussian"], "noise")
        quotient = "adversarial / Gaussian, mean pairwise distance"
        measured = f"{quotient}: {ratio}; / control: {control}; of the patterns: {noise}"
        text = f"{part.capitalize()} part, in the original space: {sentence}."
        yield Claim(text, measured, ratio.low > 1, published, name)
        measured = f"{quotient} of the points in the picture: {plane}"
        text = f"{part.capitalize()} part, in the plane of two factors: {sentence}."
        yield Claim(text, measured, plane.low > 1, published, name)


def _published(found: Found) -> str:
    return "Figs. 4.12-4.14" if "bias" in found["factors"] else "Fig. 4.5"


def _ratio_charts(folder: Path, networks: dict[str, Found]) -> Iterator[Picture]:
    """Spread under adversarial patterns over that under the other two kinds, for each network."""
    for part in PARTS:
        values: dict[str, dict[str, Interval]] = {f"over {kind}": {} for kind in OTHER_KINDS}
        values["over Gaussian, in the picture of two factors"] = {}
        for name, found in networks.items():
            if found["missing"] or part not in found["factors"]:
                continue
            for series, ratios in zip(
                values,
                (*(found["ratios"][kind] for kind in OTHER_KINDS), found["factors"]),
                strict=True,
            ):
                ratio = Ratio(**ratios[part]["distances"])
                values[series][name] = (ratio.value, ratio.low, ratio.high)
        if any(values.values()):
            title = f"Spread of the label's {part} parts under adversarial patterns over others"
            quantity = "ratio of mean pairwise distances"
            interval = "95 % interval of the bootstrap over patterns"
            drawing = interval_rows(values, title, quantity, interval, mark=1.0, log=True)
            yield save_picture(folder, f"{KEY}/ratios-{part}", drawing, drawing.caption)


def _pictures(folder: Path, name: str, found: Found, arrays: Arrays) -> Iterator[Picture]:
    for part, scores in arrays.items():
        names = ("adversarial noise, misclassified", "Gaussian noise, classified correctly")
        groups = dict(zip(names, np.split(scores, 2), strict=True))
        title = f"{name}: factor analysis of {part} parts"
        drawing = plots.points(groups, title, ("factor 1", "factor 2"))
        # "best" is where the legend hides the fewest points
        drawing.figure.axes[0].legend(loc="best", fontsize=MEDIUM)
        words = f"black ones (blue in the study): {_ratio(found['factors'], part)}"
        caption = (
            f"Hyperplanes of one unit; {drawing.caption}. "
            f"Mean distance of red points over that of {words}."
        )
        yield save_picture(folder, f"{KEY}/{name}-{part}", drawing, caption, _published(found))
