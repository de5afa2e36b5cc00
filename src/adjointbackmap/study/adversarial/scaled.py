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
from adjointbackmap.report.sections import Block, Claim, Picture, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.noise_patterns import PATTERNS, TRIES, Patterns, make_patterns
from adjointbackmap.study.adversarial.spread import MEASURES, Ratio, factors, spread, spread_ratio
from adjointbackmap.study.adversarial.targets import PARTS, label_hyperplanes, settings_of
from adjointbackmap.study.results import Arrays, Found, keep, kept, run_words
from adjointbackmap.study.setup import Setup, Trained

KEY = "scaled"
OTHERS = ("Gaussian", "control")  # adversarial patterns are compared with these
FACTORS = 2


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
                spreads = (
                    [spread(parts[k][part], measure) for k in ("adversarial", kind)]
                    if known
                    else []
                )
                found[f"{before}{measure} {part}"] = spreads[0] / spreads[1] if known else None
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
    groups = zip(
        made.images,
        planes.image.flatten(1).split(made.wanted),
        planes.bias.split(made.wanted),
        strict=True,
    )
    return {kind: {"image": image, "bias": bias} for kind, image, bias in groups}


def compute(setup: Setup, report: Callable[[str, float], None]) -> None:
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
        keep(
            setup.folder / KEY / f"{name}.json",
            settings,
            partial(measured, trained, image, setup.seed),
        )
    report("adversarial and Gaussian noise", 1.0)


def measured(trained: Trained, image: data.Images, seed: int) -> tuple[Found, Arrays]:
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
    found["ratios"] = {kind: {} for kind in OTHERS}
    arrays = {}
    found["factors"] = {}
    for part, points in parts["adversarial"].items():
        if not points.numel():
            continue
        for kind in OTHERS:
            found["ratios"][kind][part] = _ratios(points, parts[kind][part], seed)
        if part != "noise":
            arrays[part] = factors(torch.cat([points, parts["Gaussian"][part]]), FACTORS, seed)
            red, blue = torch.from_numpy(arrays[part]).split(len(points))
            found["factors"][part] = _ratios(red, blue, seed)
    return found, arrays


def _ratios(first: Tensor, second: Tensor, seed: int) -> Found:
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
        **{
            f"mean {when}": float(noise.double().mean())
            for when, noise in (("drawn", drawn), ("clipped", clipped))
        },
        **{
            f"deviation {when}": float(noise.double().std())
            for when, noise in (("drawn", drawn), ("clipped", clipped))
        },
        "l2": float(clipped.double().flatten(1).norm(dim=1).mean()),
    }


def section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results of all experiments.
    """
    results = list(kept(folder / KEY))
    if not results:
        return None
    blocks: list[Block] = [
        Table(_summary(results), SUMMARY_CAPTION),
        Table(_pattern_rows(results), PATTERNS_CAPTION),
    ]
    for name, found, arrays in results:
        blocks += [*_claims(name, found), *_pictures(folder, name, found, arrays)]
    ran = (RAN, *(f"{run_words(name, found)}." for name, found, _ in results))
    return Section(
        KEY,
        "Experiment 3: scaled-down adversarial noise and Gaussian noise",
        ran,
        tuple(blocks),
    )


RAN = (
    "The noises of experiment 2 that reached their targets are scaled down by factors drawn from "
    f"0 to 1: {PATTERNS} patterns that still deceive the network, as many of each target as it "
    f"gives. Against them stand {PATTERNS} Gaussian patterns of the mean and the variance of all "
    "their pixels, under which the network still knows the image; and as a control, Gaussian "
    "patterns with their variance in each pixel. The sum of image and pattern is clipped to "
    "pixels from 0 to 1. A pattern under which the network says otherwise is drawn again, "
    f"{TRIES} times at most. The hyperplane is that of the label's class (RM0, pattern at 1/8)."
)
SUMMARY_CAPTION = (
    "Spread under adversarial patterns over that under the Gaussian ones or the control: of the "
    "patterns themselves (clipped), of the hyperplanes in the original space, and of the points "
    "in the pictures of two factors; mean pairwise distances, or total variances where it says "
    "so, with the bootstrap's 95 % interval over patterns. The adversarial ones come from nine "
    "attacks: the interval tells nothing of other attacks. Factors are the directions that "
    "patterns share, all else counts as noise: what they leave out is in no picture, and the "
    "ratio in the original space is the one that tells."
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
        for kind in OTHERS if not found["missing"] else ():
            ratios = found["ratios"][kind]
            placed = found["factors"] if kind == "Gaussian" else {}
            row = [f"`{name}`", found["classes"][found["label"]], kind, _ratio(ratios, "noise")]
            for part in PARTS:
                row += [
                    _ratio(ratios, part),
                    _ratio(ratios, part, "variances"),
                    _ratio(placed, part),
                ]
            sheet.rows.append(row)
        if found["missing"]:
            sheet.rows.append(
                [
                    f"`{name}`",
                    found["classes"][found["label"]],
                    found["missing"],
                    *[""] * (len(head) - 3),
                ]
            )
    return sheet


def _ratio(ratios: Found, part: str, measure: str = "distances") -> str:
    return str(Ratio(**ratios[part][measure])) if part in ratios else ""


def _pattern_rows(results: Sequence[tuple[str, Found, Arrays]]) -> Sheet:
    numbers = ["mean drawn", "mean clipped", "deviation drawn", "deviation clipped", "l2"]
    sheet = Sheet(
        "Patterns",
        ["network", "kind", "patterns", "redrawn", *numbers, "patterns of each target", "factor"],
    )
    for name, found, _ in results:
        of = ", ".join(
            f"{found['classes'][t]} {n}" for t, n in zip(found["targets"], found["of"], strict=True)
        )
        beta = " to ".join(f"{end:.2f}" for end in found["beta"])
        for kind, noise in found["noise"].items():
            row = [f"`{name}`", kind, str(noise["patterns"]), str(found["redrawn"][kind])]
            row += (
                [f"{noise[number]:.5f}" for number in numbers]
                if noise["patterns"]
                else [""] * len(numbers)
            )
            sheet.rows.append([*row, *((of, beta) if kind == "adversarial" else ("", ""))])
    return sheet


def _claims(name: str, found: Found) -> Iterator[Claim]:
    """The published claim for each part, in the original space and in the plane of two factors."""
    sentence = "effective hyperplanes of adversarial cases are significantly more spread out than non-adversarial cases"
    if found["missing"]:
        yield Claim(f"{name}: {sentence}.", found["missing"], None)
        return
    published = f"in a picture: {_published(found)}"
    for part, both in found["factors"].items():
        ratio, control = (Ratio(**found["ratios"][kind][part]["distances"]) for kind in OTHERS)
        plane = Ratio(**both["distances"])
        noise = _ratio(found["ratios"]["Gaussian"], "noise")
        measured = f"adversarial / Gaussian, mean pairwise distance: {ratio}; / control: {control}; of the patterns: {noise}"
        yield Claim(
            f"{name}, {part} part, in the original space: {sentence}.",
            measured,
            ratio.low > 1,
            published,
        )
        measured = (
            f"adversarial / Gaussian, mean pairwise distance of the points in the picture: {plane}"
        )
        yield Claim(
            f"{name}, {part} part, in the plane of two factors: {sentence}.",
            measured,
            plane.low > 1,
            published,
        )


def _published(found: Found) -> str:
    return "Figs. 4.12-4.14" if "bias" in found["factors"] else "Fig. 4.5"


def _pictures(folder: Path, name: str, found: Found, arrays: Arrays) -> Iterator[Picture]:
    for part, scores in arrays.items():
        names = ("adversarial noise, misclassified", "Gaussian noise, classified correctly")
        groups = dict(zip(names, np.split(scores, 2), strict=True))
        drawing = plots.points(
            groups,
            f"{name}: factor analysis of {part} parts",
            ("factor 1", "factor 2"),
        )
        drawing.figure.axes[0].legend(
            loc="best", fontsize=MEDIUM
        )  # where it hides the fewest points
        path = plots.save(drawing, folder / KEY / f"{name}-{part}.png", formats=("png", "svg"))
        words = f"black ones (blue in the study): {_ratio(found['factors'], part)}"
        caption = f"Hyperplanes of one unit; {drawing.caption}. Mean distance of red points over that of {words}."
        yield Picture(path.relative_to(folder), caption, _published(found))
