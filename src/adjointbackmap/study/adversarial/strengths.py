"""Attacks of today against controls: turn, flips and spread as the noise grows.

Projected gradient descent [Madry2018] aims at nine classes. Each of its noises counts whole and
halved, so that there are 18 patterns in nine directions. The controls have as many patterns.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.analysis.angles import angles
from adjointbackmap.attacks import Ball, pgd
from adjointbackmap.engine.pattern import record_pattern
from adjointbackmap.exactness.journal import Record
from adjointbackmap.study.adversarial.gates import flipped, gate_counts
from adjointbackmap.study.adversarial.spread import spread
from adjointbackmap.study.adversarial.targets import label_hyperplanes
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import SCALE, Setup, Trained, image_seed, write_json

KEY = "strengths"
LEVELS = (1, 2, 4, 8)  # radii in grey levels of 255
STEPS = 10  # of PGD
PART = 5  # a fifth of the run's images: each has 288 hyperplanes
KINDS = ("PGD", "random signs", "nine directions", "Gaussian")


def compute_strengths(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Measure some images of every network of a run on CIFAR-10; finished ones are not repeated.

    Args:
        setup: Networks, number of images, seed and folder. A fifth of the images is measured.
        report: Called with the current task and its finished share.
    """
    for name in (name for name in setup.networks if name.endswith("cifar10")):
        trained = setup.trained(name)
        images = setup.many(name, max(1, setup.images // PART))
        job = json.loads(json.dumps(_job(trained, setup.seed)))
        hashed = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        record = Record(setup.folder / KEY / f"{name}-{hashed[:8]}.jsonl", job)
        told = partial(report, f"{name}: strengths")
        told(0.0)
        for n, image in enumerate(images.hashes):
            if image not in record.names:
                record.append(image, measure_strengths(trained, images[[n]], setup.seed))
            told((n + 1) / len(images))
        kept = dict(record.results())
        finished = {image: kept[image] for image in images.hashes}
        write_json(setup.folder / KEY / f"{name}.json", {"job": job, "images": finished})


def _job(trained: Trained, seed: int) -> Found:
    """What identifies the results."""
    return {**trained.about, "seed": seed, "scale": SCALE, "levels": LEVELS, "steps": STEPS}


def measure_strengths(trained: Trained, one: data.Images, seed: int) -> Found:
    """The numbers of one image: radius -> kind of noise -> numbers.

    Args:
        trained: The network.
        one: One image that it classifies correctly.
        seed: Seed of the run. Each image has draws of its own.
    """
    generator = torch.Generator().manual_seed(image_seed(seed, one.hashes[0]))
    return {str(level): _at_radius(trained, one, level / 255, generator) for level in LEVELS}


def _at_radius(
    trained: Trained, one: data.Images, radius: float, generator: torch.Generator
) -> Found:
    """The numbers of each kind of noise at one radius."""
    pixels = one.unit_interval()
    label = int(one.labels)
    noises = noises_of(trained, pixels, label, radius, generator)
    inputs = torch.cat([pixels, *((pixels + noise).clamp(0, 1) for noise in noises.values())])
    planes = label_hyperplanes(trained, inputs, label)
    counts = [1, *(len(noise) for noise in noises.values())]
    flips = flip_shares(trained, inputs)
    own, *image = planes.image.flatten(1).split(counts)
    _, *bias = planes.bias.flatten(1).split(counts)
    shares = flips.split(counts[1:])
    fooled = _fooled(trained, inputs, label).split(counts)[1:]
    found = {}
    for n, kind in enumerate(noises):
        found[kind] = {
            "turn": float(angles(own.expand_as(image[n]), image[n], 1).median()),
            "flips": float(shares[n].mean()),
            "spread image": spread(image[n]) / float(own.double().norm()),
            "spread bias": _relative_spread(bias[n], planes.bias[:1].flatten(1)),
            "fooled": float(fooled[n].double().mean()),
        }
    return found


def noises_of(
    trained: Trained, pixels: Tensor, label: int, radius: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The patterns of each kind, ``(18, 3, 32, 32)``, before the sum is cut to [0, 1].

    ``nine directions`` has a Gaussian direction for each attack, and ``Gaussian`` one for each
    pattern. Both have the lengths of the patterns of PGD.

    Args:
        trained: The network.
        pixels: One image, ``(1, 3, 32, 32)``.
        label: Its class.
        radius: Largest change of a pixel by PGD and by random signs.
        generator: Source of all draws.
    """
    subject = trained.subject
    targets = torch.tensor([c for c in range(len(subject.classes)) if c != label])
    many = pixels.expand(len(targets), -1, -1, -1)
    seed = int(torch.randint(2**31, (), generator=generator))
    labels = torch.full_like(targets, label)
    ball = Ball(radius)
    attacked = pgd(
        subject.module, many, labels, ball, subject.prepare, targets, steps=STEPS, seed=seed
    )
    noise = torch.cat([attacked.noise, attacked.noise / 2])
    shape = noise.shape
    nine = torch.randn(len(targets), *shape[1:], generator=generator).repeat(2, 1, 1, 1)
    signs = torch.randint(2, (len(targets), *shape[1:]), generator=generator) * 2.0 - 1
    return {
        "PGD": noise,
        "random signs": radius * torch.cat([signs, signs / 2]),
        "nine directions": _as_long(nine, noise),
        "Gaussian": _as_long(torch.randn(shape, generator=generator), noise),
    }


def _as_long(noise: Tensor, other: Tensor) -> Tensor:
    """Patterns with the lengths of other ones."""
    lengths, own = (part.flatten(1).norm(dim=1) for part in (other, noise))
    return noise * (lengths / own).view(-1, 1, 1, 1)


def flip_shares(trained: Trained, inputs: Tensor) -> Tensor:
    """Share of all gates that differ from those of the first input, for each of the others.

    Args:
        trained: The network.
        inputs: Images in pixels, at least two.
    """
    x = trained.input(inputs)
    first = record_pattern(trained.network, x[:1].expand_as(x[1:]), SCALE)
    others = record_pattern(trained.network, x[1:], SCALE)
    counts = gate_counts(first)
    shares = flipped(first, others)
    total = sum(counts[layer] for layer in shares)
    return torch.stack([share * counts[layer] for layer, share in shares.items()]).sum(0) / total


def _fooled(trained: Trained, inputs: Tensor, label: int) -> Tensor:
    """Which inputs the untouched network assigns to another class."""
    with torch.no_grad():
        return trained.subject.module(trained.input(inputs)).argmax(1) != label


def _relative_spread(points: Tensor, own: Tensor) -> float | None:
    """Spread over the length of the image's own bias part; ``None`` without biases."""
    return spread(points) / float(own.double().norm()) if points.numel() else None
