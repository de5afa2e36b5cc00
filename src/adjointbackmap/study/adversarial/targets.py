"""Experiment 2 [Wan2022, sections 4.2.2 and 4.3.2]: one hyperplane under nine targeted attacks.

The hyperplane is that of the label's class. Each attack targets another class.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data, plots
from adjointbackmap.attacks import basic_iterative, study_attack
from adjointbackmap.examples import Attacked, scores_of
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.plots.biases import UNIT
from adjointbackmap.plots.classes import IMAGE_UNIT
from adjointbackmap.plots.drawing import MEDIUM, WIDTH, Drawing, finished, new_figure
from adjointbackmap.plots.scale import PIXEL_SCALE
from adjointbackmap.report.sections import Block, Claim, Picture, Scene, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.spread import (
    DRAWS,
    MEASURES,
    PERPLEXITY,
    Ratio,
    spread,
    spread_ratio,
    tsne,
)
from adjointbackmap.study.results import Arrays, Found, keep, kept, run_words
from adjointbackmap.study.setup import SCALE, Setup, Trained

KEY = "targets"
TARGETS = 9
OTHERS = 10  # images of other classes
PARTS = ("image", "bias")
ALMOST = 0.8  # our threshold for the study's "almost as broad"
FACTOR = 10  # pictures show the noise times this factor, as in the study
IN_A_ROW = 5  # panels per row
AXES = ("tSNE 1", "tSNE 2", "tSNE 3")


def attack_targets(
    trained: Trained,
    pixels: Float[Tensor, "1 3 32 32"],
    label: int,
    seed: int,
) -> tuple[Tensor, Attacked]:
    """Attack an image nine times, each time with another class as the target.

    The method is the study's iterative least-likely class method. It takes all its steps.

    Args:
        trained: The network.
        pixels: An image in [0, 1].
        label: Its class.
        seed: Seed for the choice of the nine targets if there are more than nine other classes.

    Returns:
        The nine targets in ascending order, and the nine attacked images.
    """
    others = torch.tensor([c for c in range(len(trained.subject.classes)) if c != label])
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    targets = others[order[:TARGETS]].sort().values
    images = pixels.repeat(TARGETS, 1, 1, 1)
    labels = torch.full_like(targets, label)
    module = trained.subject.module
    prepare = trained.subject.prepare
    return targets, basic_iterative(
        module,
        images,
        labels,
        study_attack(2, pixels, prepare),
        prepare,
        targets,
    )


def label_hyperplanes(
    trained: Trained,
    pixels: Float[Tensor, "n 3 32 32"],
    label: int,
) -> Hyperplanes:
    """The RM0 hyperplane of one class at each image, in the units of the network's input."""
    return hyperplanes(
        trained.network,
        trained.input(pixels),
        "fc",
        "RM0",
        units=(label,),
        scale=SCALE,
    )


def other_images(setup: Setup, name: str, label: int) -> data.Images:
    """Ten test images of other classes that the network classifies correctly, drawn by seed."""
    drawn = setup.many(name, len(setup.trained(name).images))
    return drawn[drawn.labels != label][:OTHERS]


def settings_of(trained: Trained, image: data.Images, seed: int) -> Found:
    """Settings that identify the results, as JSON-compatible values.

    They are the weights, the image, the attack, the scale of the pattern, the seed and the
    number of bootstrap draws.
    """
    attack = study_attack(2, image.unit_interval(), trained.subject.prepare)
    found = {
        **trained.about,
        "image": image.hashes[0],
        "attack": asdict(attack),
        "scale": SCALE,
        "seed": seed,
        "draws": DRAWS,
    }
    return json.loads(json.dumps(found))


def compute(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Run the experiment on every network of a run.

    A network is skipped if the folder has its results for the same weights, image and settings.

    Args:
        setup: Networks, image, seed and folder.
        report: Called with what is computed and the share that is done.
    """
    for number, name in enumerate(setup.networks):
        report(f"{name}: attacks at nine classes", number / len(setup.networks))
        trained = setup.trained(name)
        image = setup.one(name)
        others = other_images(setup, name, int(image.labels))
        settings = {
            **settings_of(trained, image, setup.seed),
            "perplexity": PERPLEXITY,
            "others": list(others.hashes),
        }
        keep(
            setup.folder / KEY / f"{name}.json",
            settings,
            partial(measured, trained, image, others, setup.seed),
        )
    report("attacks at nine classes", 1.0)


def measured(
    trained: Trained,
    image: data.Images,
    others: data.Images,
    seed: int,
) -> tuple[Found, Arrays]:
    """Compute the numbers of one network at one image, and the arrays for its pictures.

    The first ten rows of the arrays are the attacked images in the order of their target classes.
    The original image is at the position of its own class. The next ten rows are the images of
    other classes.

    Args:
        trained: The network.
        image: The one image.
        others: Ten images of other classes.
        seed: Seed of all draws.
    """
    label = int(image.labels)
    pixels = image.unit_interval()
    targets, attacked = attack_targets(trained, pixels, label, seed)
    shown, order = torch.cat([targets, image.labels]).sort()
    inputs = torch.cat([torch.cat([attacked.adversarial, pixels])[order], others.unit_interval()])
    planes = label_hyperplanes(trained, inputs, label)
    parts = {"image": planes.image.flatten(1), "bias": planes.bias}
    parts = {part: points for part, points in parts.items() if points.numel()}
    placed = {part: tsne(points, seed) for part, points in parts.items()}
    own = int((shown == label).nonzero())
    red = len(shown)
    changes = {part: _changes(points[:red], own) for part, points in parts.items()}
    found = {
        "classes": list(image.classes),
        "label": label,
        "shown": shown.tolist(),
        "attacks": _attacks(trained, targets, attacked, changes, shown.tolist()),
        "others": others.labels.tolist(),
        "values": planes.value.tolist(),
        "ratios": {
            part: {m: asdict(spread_ratio(points[:red], points[red:], m, seed)) for m in MEASURES}
            for part, points in parts.items()
        },
        "tsne": {
            part: spread(torch.from_numpy(p[:red])) / spread(torch.from_numpy(p[red:]))
            for part, p in placed.items()
        },
    }
    arrays = {"inputs": inputs, "image": planes.image, "bias": planes.bias}
    numbers = {key: t.numpy() for key, t in arrays.items()} | {
        f"tsne_{part}": p for part, p in placed.items()
    }
    return found, numbers | {"pixels": pixels[0].numpy()}


def _changes(points: Tensor, own: int) -> list[float]:
    """Distance of each hyperplane to that of the original image, relative to the latter's norm."""
    return ((points - points[own]).norm(dim=1) / points[own].norm()).tolist()


def _attacks(
    trained: Trained,
    targets: Tensor,
    attacked: Attacked,
    changes: Mapping[str, Sequence[float]],
    shown: list[int],
) -> list[Found]:
    """The outcome of each attack."""
    shares = (
        scores_of(trained.subject.module, attacked.adversarial, trained.subject.prepare)
        .softmax(1)
        .amax(1)
    )
    return [
        {
            "target": target,
            "given": int(attacked.after[i]),
            "reached": int(attacked.after[i]) == target,
            "confidence": float(shares[i]),
            "l2": float(attacked.l2[i]),
            "linf": float(attacked.linf[i]),
            "changed": {part: change[shown.index(target)] for part, change in changes.items()},
        }
        for i, target in enumerate(targets.tolist())
    ]


def section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results of all experiments.
    """
    results = list(kept(folder / KEY))
    if not results:
        return None
    blocks: list[Block] = [Table(_summary(results), SUMMARY_CAPTION)]
    for name, found, arrays in results:
        blocks += _blocks(folder, name, found, arrays)
    ran = (
        "An image that the network classifies correctly is attacked at nine other classes, each "
        "by the iterative least-likely class method with that class as the target, a fixed "
        "number of steps and no radius. The hyperplane of the label's class (RM0, pattern at "
        "1/8) is taken under the nine attacked images and the image itself, and under ten images "
        "of other classes that the network classifies correctly. For CIFAR-100, nine drawn "
        "classes are the targets: beyond the study.",
        *(_ran(name, found) for name, found, _ in results),
    )
    return Section(
        KEY,
        "Experiment 2: one hyperplane under attacks at nine classes",
        ran,
        tuple(blocks),
    )


SUMMARY_CAPTION = (
    "Spread of the hyperplanes under attack (nine attacked images and the image itself) over "
    "that under ten images of other classes, in the original space, with the bootstrap's 95 % "
    "interval: mean pairwise distances, and total variances. Beside it the ratio of mean "
    "distances among the points of the tSNE pictures, which even out how dense points lie: the "
    "ratio in the original space is the one that tells."
)


def _ran(name: str, found: Found) -> str:
    hashes = found["settings"]["others"]
    classes = found["classes"]
    others = [f"{h[:8]} {classes[c]}" for h, c in zip(hashes, found["others"], strict=True)]
    return f"{run_words(name, found)}; images of other classes: {', '.join(others)}."


def _summary(results: Sequence[tuple[str, Found, Arrays]]) -> Sheet:
    head = ["network", "image", "targets reached"]
    head += [f"{part} part, {what}" for part in PARTS for what in (*MEASURES, "tSNE")]
    sheet = Sheet("Spread under attack over spread under other classes", head)
    for name, found, _ in results:
        reached = sum(attack["reached"] for attack in found["attacks"])
        row = [
            f"`{name}`",
            found["classes"][found["label"]],
            f"{reached} of {len(found['attacks'])}",
        ]
        for part in PARTS:
            ratios = found["ratios"].get(part)
            row += (
                [*(str(Ratio(**ratios[m])) for m in MEASURES), f"{found['tsne'][part]:.2f}"]
                if ratios
                else ["none"] * 3
            )
        sheet.rows.append(row)
    return sheet


def _blocks(folder: Path, name: str, found: Found, arrays: Arrays) -> Iterator[Block]:
    """Claims, table, pictures and 3D scenes of one network."""
    yield from _claims(name, found)
    yield Table(_attack_rows(name, found), ATTACKS_CAPTION)
    for kind, drawing, published in _drawings(name, found, arrays):
        path = plots.save(drawing, folder / KEY / f"{name}-{kind}.png", formats=("png", "svg"))
        caption = (
            f"{drawing.caption}. {_tsne_words(found)}"
            if kind.startswith("tsne")
            else drawing.caption
        )
        yield Picture(path.relative_to(folder), caption, published)
    for part in found["ratios"]:
        yield _scene(name, part, found, arrays[f"tsne_{part}"])


ATTACKS_CAPTION = (
    "Each attack: the class that the network gives, whether it is the target, its softmax; the "
    "noise's Euclidean norm and largest magnitude in pixels from 0 to 1; how far the label's "
    "hyperplane is from that under the image itself, in lengths of that one."
)


def _claims(name: str, found: Found) -> Iterator[Claim]:
    ratios = {part: Ratio(**both["distances"]) for part, both in found["ratios"].items()}
    measured = "; ".join(f"{part} part {ratio}" for part, ratio in ratios.items())
    yield Claim(
        f"{name}: the spread due to adversarial noise is almost as broad as that due to inputs "
        f"from different classes. (Our reading of almost: at least {ALMOST} of it.)",
        f"mean pairwise distance of hyperplanes, under attack / under other classes: {measured}",
        all(ratio.value >= ALMOST for ratio in ratios.values()),
        "in pictures: Figs. 4.4, 4.9-4.11",
    )
    least = {part: min(attack["changed"][part] for attack in found["attacks"]) for part in ratios}
    yield Claim(
        f"{name}: the distances between the hyperplanes are very large although the noise is "
        "small. (Our reading: every attack changes the hyperplane by more than half its length.)",
        "least change of an attack: "
        + "; ".join(f"{part} part {change:.2f}" for part, change in least.items()),
        min(least.values()) > 0.5,
    )


def _attack_rows(name: str, found: Found) -> Sheet:
    parts = list(found["ratios"])
    head = [
        "target",
        "class given",
        "reached",
        "softmax",
        "l2",
        "largest",
        *(f"{part} part differs by" for part in parts),
    ]
    sheet = Sheet(f"{name}: nine attacks on a {found['classes'][found['label']]}", head)
    classes = found["classes"]
    for attack in found["attacks"]:
        reached = "yes" if attack["reached"] else "**no**"
        row = [
            classes[attack["target"]],
            classes[attack["given"]],
            reached,
            f"{attack['confidence']:.4f}",
        ]
        row += [
            f"{attack['l2']:.3f}",
            f"{attack['linf']:.3f}",
            *(f"{attack['changed'][part]:.2f}" for part in parts),
        ]
        sheet.rows.append(row)
    return sheet


def _names(found: Found) -> tuple[list[str], list[str]]:
    """Names of the ten inputs under attack, and of the images of other classes."""
    classes = found["classes"]
    label = found["label"]
    red = [f"{classes[c]}{' (no noise)' if c == label else ''}" for c in found["shown"]]
    return red, [classes[c] for c in found["others"]]


def _scene(name: str, part: str, found: Found, placed: np.ndarray) -> Scene:
    groups = _groups(found, placed)
    points = {group: p.tolist() for group, p in groups.items()}
    labels = dict(zip(groups, _names(found), strict=True))
    return Scene(
        points,
        labels,
        f"{name}: tSNE of {part} parts",
        f"Hyperplanes of one unit. {_tsne_words(found)}",
    )


def _tsne_words(found: Found) -> str:
    settings = found["settings"]
    return (
        f"tSNE in three dimensions, perplexity {settings['perplexity']:g}, started from principal "
        f"components, seed {settings['seed']}; its distances are not those of the original space."
    )


def _groups(found: Found, placed: np.ndarray) -> Arrays:
    """Split the points into those under attack and those of other classes."""
    red = len(found["shown"])
    return {
        "under attack, and without noise": placed[:red],
        "images of other classes": placed[red:],
    }


def _drawings(name: str, found: Found, arrays: Arrays) -> Iterator[tuple[str, Drawing, str]]:
    """For each picture: its kind, the drawing and the published figures."""
    unit = found["classes"][found["label"]]
    (red, black) = _names(found)
    published = "Figs. 4.9-4.11" if "bias" in found["ratios"] else "Fig. 4.4"
    count = len(red)
    inputs = arrays["inputs"]
    image = arrays["image"]
    bias = arrays["bias"]
    noise = FACTOR * (inputs[:count] - arrays["pixels"])
    title = f"{name}: image of the class {unit} under nine attacks"
    caption = "grey is zero, black -0.5 and white 0.5 of the pixels' 0 to 1"
    rows = {
        f"noise x {FACTOR}": (red, noise, plots.Scale(-0.5, 0.5)),
        "inputs": (red, inputs[:count], PIXEL_SCALE),
    }
    yield "inputs", _panels(title, rows, f"noise x {FACTOR}: {caption}"), published
    valued = [
        f"{word}\n{value:.2f}" for word, value in zip(red + black, found["values"], strict=True)
    ]
    maps = {
        "image": image,
        "bias": np.stack([plots.near_square(torch.from_numpy(b)) for b in bias]),
    }
    for part in found["ratios"]:
        scale = plots.Scale.of([maps[part]])
        rows = {
            "under attack": (valued[:count], maps[part][:count], scale),
            "under other classes": (valued[count:], maps[part][count:], scale),
        }
        words = scale.words(IMAGE_UNIT) if part == "image" else scale.words(UNIT, channels=False)
        size = (
            ""
            if part == "image"
            else f"; {bias.shape[1]} biases in the order of execution, row by row"
        )
        caption = f"headings: the input, and the unit's value under it{size}; on one scale: {words}"
        yield (
            part,
            _panels(f"{name}: hyperplane of the unit {unit}, {part} parts", rows, caption),
            published,
        )
    for part in found["ratios"]:
        drawing = plots.points(
            _groups(found, arrays[f"tsne_{part}"]),
            f"{name}: tSNE of {part} parts",
            AXES,
        )
        yield f"tsne-{part}", drawing, published


def _panels(
    title: str,
    groups: Mapping[str, tuple[Sequence[str], np.ndarray, plots.Scale]],
    caption: str,
) -> Drawing:
    """Groups of panels, one group below the other.

    Each group has names, maps and a colour scale.
    """
    rows = [-(-len(names) // IN_A_ROW) for names, _, _ in groups.values()]
    ratio = min(1.0, max(0.2, *(maps.shape[-2] / maps.shape[-1] for _, maps, _ in groups.values())))
    figure = new_figure(WIDTH, 1.0 + sum(rows) * (WIDTH / (IN_A_ROW + 0.5) * ratio + 0.25), title)
    for i, (group, (names, maps, scale)) in enumerate(groups.items()):
        for j, (name, part) in enumerate(zip(names, maps, strict=True)):
            axes = figure.add_subplot(sum(rows), IN_A_ROW, sum(rows[:i]) * IN_A_ROW + j + 1)
            scale.show(axes, part, name)
            if j % IN_A_ROW == 0:
                axes.set_ylabel(group, fontsize=MEDIUM)
    numbers = {f"maps_{i}": maps for i, (_, maps, _) in enumerate(groups.values())}
    return finished(figure, numbers | {"groups": np.array(list(groups))}, caption)
