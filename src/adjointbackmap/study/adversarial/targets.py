"""Experiment 2 [Wan2022, sections 4.2.2 and 4.3.2]: one hyperplane under nine targeted attacks.

The hyperplane is that of the label's class. Each attack targets another class.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.attacks import basic_iterative, study_attack
from adjointbackmap.examples import Attacked, scores_of
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.plots.biases import layer_starts
from adjointbackmap.study.adversarial.spread import (
    DRAWS,
    MEASURES,
    PERPLEXITY,
    spread,
    spread_ratio,
    tsne,
)
from adjointbackmap.study.results import Arrays, Found, keep
from adjointbackmap.study.setup import SCALE, Setup, Trained

KEY = "targets"
TARGETS = 9
OTHER_IMAGES = 10  # images of other classes
PARTS = ("image", "bias")


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
    attack = study_attack(2, pixels, prepare)
    return targets, basic_iterative(module, images, labels, attack, prepare, targets)


def label_hyperplanes(
    trained: Trained,
    pixels: Float[Tensor, "n 3 32 32"],
    label: int,
) -> Hyperplanes:
    """The RM0 hyperplane of one class at each image, in the units of the network's input."""
    x = trained.input(pixels)
    return hyperplanes(trained.network, x, "fc", "RM0", units=(label,), scale=SCALE)


def other_images(setup: Setup, name: str, label: int) -> data.Images:
    """Ten test images of other classes that the network classifies correctly, drawn by seed."""
    drawn = setup.many(name, len(setup.trained(name).images))
    return drawn[drawn.labels != label][:OTHER_IMAGES]


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


def compute_targets(setup: Setup, report: Callable[[str, float], None]) -> None:
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
        measure = partial(measure_targets, trained, image, others, setup.seed)
        keep(setup.folder / KEY / f"{name}.json", settings, measure)
    report("attacks at nine classes", 1.0)


def measure_targets(
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
    red = len(shown)  # points under attack and without noise, drawn in red
    changes = {part: _changes(points[:red], own) for part, points in parts.items()}
    found = {
        "classes": list(image.classes),
        "label": label,
        "shown": shown.tolist(),
        "attacks": _attacks(trained, targets, attacked, changes, shown.tolist()),
        "others": others.labels.tolist(),
        "values": planes.value.tolist(),
        "bias starts": layer_starts(trained.network.biases),
        "ratios": {part: _ratios(points, red, seed) for part, points in parts.items()},
        "tsne": {part: _spread_in_picture(points, red) for part, points in placed.items()},
    }
    tensors = {"inputs": inputs, "image": planes.image, "bias": planes.bias, "pixels": pixels[0]}
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    return found, arrays | {f"tsne_{part}": points for part, points in placed.items()}


def _ratios(points: Tensor, red: int, seed: int) -> Found:
    """The spread of the first points divided by that of the others, in each measure."""
    first = points[:red]
    others = points[red:]
    return {measure: asdict(spread_ratio(first, others, measure, seed)) for measure in MEASURES}


def _spread_in_picture(points: np.ndarray, red: int) -> float:
    """The same ratio for the points of a tSNE picture, without an interval."""
    return spread(torch.from_numpy(points[:red])) / spread(torch.from_numpy(points[red:]))


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
    subject = trained.subject
    scores = scores_of(subject.module, attacked.adversarial, subject.prepare)
    shares = scores.softmax(1).amax(1)
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
