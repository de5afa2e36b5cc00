"""The numbers of one image that the rule of judgement asks for, with those of its controls."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.attacks import Attack, basic_iterative, study_attack
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.spectra import high_share
from adjointbackmap.study.adversarial.noise_patterns import Patterns, make_patterns
from adjointbackmap.study.adversarial.pairs import relative_change
from adjointbackmap.study.adversarial.spread import spread
from adjointbackmap.study.adversarial.targets import OTHER_IMAGES, TARGETS, label_hyperplanes
from adjointbackmap.study.judgement.untrained import Untrained
from adjointbackmap.study.pictures.likeness import mutual_angles
from adjointbackmap.study.pictures.panels import convolutions
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import SCALE, Trained, image_seed

PATTERNS = 27  # of each kind: three for each of nine attacks
RADIUS = 8 / 255  # of experiment 2; ten steps without a limit reach 21/255, which is plainly seen
MOST_STEPS = 40  # of experiment 2, which stops at a success
STEADY = 0.008  # of random signs, one step of the study
CHANNELS = 16  # of RM1 and RM4, drawn anew for each image
NOISE_MAPS = 32  # of white noise


@dataclass(frozen=True)
class Companions:
    """The other images that one image is compared with.

    Attributes:
        same: One of the same class.
        other: One of another class.
        others: Ten of other classes.
    """

    same: data.Images
    other: data.Images
    others: data.Images

    @classmethod
    def draw(cls, pool: data.Images, one: data.Images, generator: torch.Generator) -> "Companions":
        """Draw them from a pool.

        Args:
            pool: Images that the network classifies correctly.
            one: The image, which is in the pool.
            generator: Source of the draws.
        """
        order = pool[torch.randperm(len(pool), generator=generator)]
        alike = order.labels == one.labels
        itself = torch.tensor([hashed == one.hashes[0] for hashed in order.hashes])
        others = order[~alike]
        return cls(order[alike & ~itself][:1], others[:1], others[1 : 1 + OTHER_IMAGES])


@dataclass(frozen=True)
class Sample:
    """An image, its companions, and the two networks that see it.

    Attributes:
        trained: The network.
        twin: The same before its training.
        one: The image.
        beside: Its companions.
        generator: Source of all noise.
    """

    trained: Trained
    twin: Untrained
    one: data.Images
    beside: Companions
    generator: torch.Generator

    @property
    def pixels(self) -> Tensor:
        """The image, ``(1, 3, 32, 32)``."""
        return self.one.unit_interval()

    @property
    def label(self) -> int:
        """Its class."""
        return int(self.one.labels)

    def planes(self, pixels: Tensor, network: Trained | None = None) -> Hyperplanes:
        """The label's hyperplane at some images."""
        return label_hyperplanes(network or self.trained, pixels, self.label)

    def signs(self) -> Tensor:
        """A random sign for each pixel."""
        return torch.randint(2, self.pixels.shape, generator=self.generator) * 2.0 - 1


def measure(trained: Trained, pool: data.Images, one: data.Images, seed: int) -> Found:
    """All numbers of one image.

    Args:
        trained: The network.
        pool: Images that it classifies correctly.
        one: One of them.
        seed: Seed of the draw of images. Each image has draws of its own.
    """
    generator = torch.Generator().manual_seed(image_seed(seed, one.hashes[0]))
    twin = Untrained(trained.name, trained.root, trained.sample)
    sample = Sample(trained, twin, one, Companions.draw(pool, one, generator), generator)
    return {
        "label": sample.label,
        "angle": angles_of(sample),
        "high": high_of(sample),
        "RM1": rm1_of(sample),
        "kernels": kernels_of(sample),
        "noise": noise_of(sample),
        "steady": steady_of(sample),
        "targets": targets_of(sample),
        "patterns": patterns_of(sample, image_seed(seed, one.hashes[0], 1)),
    }


def parts_of(planes: Hyperplanes) -> dict[str, Tensor]:
    """Image parts and bias parts of one unit at each image, ``(N, D)``; no empty ones."""
    parts = {"image": planes.image.flatten(1), "bias": planes.bias.flatten(1)}
    return {part: found for part, found in parts.items() if found.numel()}


def angles_of(sample: Sample) -> Found:
    """Angles at two images: of one class, of two classes, and of one class before training.

    The second class's hyperplane is that at an image of its own.
    """
    beside = sample.beside
    at_same = parts_of(sample.planes(torch.cat([sample.pixels, beside.same.unit_interval()])))
    other = label_hyperplanes(
        sample.trained, beside.other.unit_interval(), int(beside.other.labels)
    )
    of_other = parts_of(other)
    found: Found = {}
    for part, (own, same) in at_same.items():
        found[part] = {
            "one class": float(mutual_angles(own[None], same[None])),
            "two classes": float(mutual_angles(own[None], of_other[part])),
        }
    both = torch.cat([sample.pixels, beside.same.unit_interval()])
    first, second = parts_of(sample.planes(both, sample.twin))["image"]
    found["image"]["untrained"] = float(mutual_angles(first[None], second[None]))
    return found


def high_of(sample: Sample) -> Found:
    """Share of the energy above a quarter cycle per pixel, the mean of three colours."""
    noise = torch.randn(NOISE_MAPS, *sample.pixels.shape[1:], generator=sample.generator)
    maps = {
        "pixels": sample.pixels,
        "hyperplane": sample.planes(sample.pixels).image,
        "untrained": sample.planes(sample.pixels, sample.twin).image,
        "white noise": noise,
    }
    return {name: float(high_share(part).mean()) for name, part in maps.items()}


def rm1_of(sample: Sample) -> Found:
    """The same share of RM1: the mean over some channels of conv1 and of the last convolution."""
    network = sample.trained.network
    x = sample.trained.input(sample.pixels)
    layers = convolutions(network)
    found = {}
    for key, layer in (("first", layers[1]), ("last", layers[-1])):
        chosen = torch.randperm(layer.out_shape[0], generator=sample.generator)[:CHANNELS]
        image = hyperplanes(network, x, layer.name, "RM1", chosen.numpy(), scale=SCALE).image[0]
        alive = image[image.flatten(1).any(1)]
        found[key] = float(high_share(alive).mean()) if len(alive) else 0.0
    return found


def kernels_of(sample: Sample) -> Found:
    """Kernels (RM4) in the middle of the middle convolution: those without a zero in their field.

    ``null`` is the share of those that take nothing from the image.
    """
    network = sample.trained.network
    x = sample.trained.input(sample.pixels)
    layers = convolutions(network)
    layer = layers[len(layers) // 2]
    middle = layer.out_shape[1] // 2
    chosen = torch.randperm(layer.out_shape[0], generator=sample.generator)[:CHANNELS].numpy()
    units = (middle, middle, chosen, slice(None))
    planes = hyperplanes(network, x, layer.name, "RM4", units, scale=SCALE)
    used = planes.image[0].flatten(0, 1).flatten(1).ne(0)  # kernels, pixels
    field = used.any(0).sum()  # pixels that some kernel uses
    return {
        "whole": float((used.sum(1) == field).float().mean()),
        "null": float((~used.any(1)).float().mean()),
    }


def noise_of(sample: Sample) -> Found:
    """Experiment 1: the label's hyperplane after the attack, and after random signs of its size.

    There is only the success if the attack does not succeed.
    """
    pixels = sample.pixels
    subject = sample.trained.subject
    attack = study_attack(1, pixels, subject.prepare)
    found = basic_iterative(subject.module, pixels, sample.one.labels, attack, subject.prepare)
    if not found.fooled(sample.one.labels).all():
        return {"fooled": False}
    shaken = (pixels + found.noise.abs() * sample.signs()).clamp(0, 1)
    inputs = torch.cat([pixels, found.adversarial, shaken])
    changes = {
        part: {
            "adversarial": float(relative_change(own, attacked, 0)),
            "random signs": float(relative_change(own, random, 0)),
        }
        for part, (own, attacked, random) in parts_of(sample.planes(inputs)).items()
    }
    x, attacked, _ = sample.trained.input(inputs)
    every = hyperplanes(sample.trained.network, x[None], "fc", "RM0", scale=SCALE)
    rebuilt = int(every.reconstruct(attacked[None])[0].argmax())
    return {
        "fooled": True,
        "steps": None if found.steps is None else int(found.steps),
        "input": float(relative_change(x, attacked, 0)),
        "same class with H_orig": float(rebuilt == int(found.after)),
        **changes,
    }


def steady_of(sample: Sample) -> Found:
    """Change of the label's image part under random signs, and that of the untrained twin."""
    both = torch.cat([sample.pixels, (sample.pixels + STEADY * sample.signs()).clamp(0, 1)])
    found = {}
    for key, network in (("trained", sample.trained), ("untrained", sample.twin)):
        own, shaken = parts_of(sample.planes(both, network))["image"]
        found[key] = float(relative_change(own, shaken, 0))
    return found


def targets_of(sample: Sample) -> Found:
    """Experiment 2 in a ball, until success: spread over that at ten images of other classes."""
    targets = torch.tensor([c for c in range(len(sample.one.classes)) if c != sample.label])
    pixels = sample.pixels.expand(TARGETS, -1, -1, -1)
    subject = sample.trained.subject
    labels = torch.full_like(targets, sample.label)
    found = basic_iterative(
        subject.module, pixels, labels, target_attack(sample), subject.prepare, targets
    )
    inputs = torch.cat([sample.pixels, found.adversarial, sample.beside.others.unit_interval()])
    parts = parts_of(sample.planes(inputs))
    red = 1 + TARGETS
    ratios = {part: spread(p[:red]) / spread(p[red:]) for part, p in parts.items()}
    own = parts["image"][:1].expand(TARGETS, -1)
    changes = relative_change(own, parts["image"][1:red], 1)
    return {
        **ratios,
        "linf": float(found.linf.max()),
        "reached": int((found.after == targets).sum()),
        "least change": float(changes.min()),
    }


def target_attack(sample: Sample) -> Attack:
    """The attack of experiment 2 in a ball, until success."""
    study = study_attack(2, sample.pixels, sample.trained.subject.prepare)
    return replace(study, iterations=MOST_STEPS, until_success=True, radius=RADIUS)


def patterns_of(sample: Sample, seed: int) -> Found:
    """Experiment 3: spread under adversarial patterns over that under two kinds of Gaussian ones.

    ``Gaussian`` patterns are those of the dissertation, and span as many dimensions as there are
    patterns. ``nine directions`` has one Gaussian direction for each attack: patterns have the
    rank, the lengths and the factors of the adversarial ones.
    """
    made = make_patterns(sample.trained, sample.pixels, sample.label, seed, PATTERNS)
    if made.missing:
        return {"missing": made.missing}
    kinds = {
        "adversarial": made.images["adversarial"],
        "Gaussian": made.images["Gaussian"],
        "nine directions": (sample.pixels + same_rank(made, sample.generator)).clamp(0, 1),
    }
    parts = parts_of(sample.planes(torch.cat(list(kinds.values()))))
    found: Found = {}
    for part, points in parts.items():
        spreads = dict(zip(kinds, map(spread, points.split(PATTERNS)), strict=True))
        found[part] = {
            kind: spreads["adversarial"] / spreads[kind] for kind in kinds if kind != "adversarial"
        }
    return found


def same_rank(made: Patterns, generator: torch.Generator) -> Tensor:
    """A Gaussian direction for each attack, with the lengths of the adversarial patterns."""
    noise = made.noise["adversarial"]
    directions = torch.randn(len(made.targets), *noise.shape[1:], generator=generator)
    of = torch.searchsorted(made.targets, made.target)  # targets are in ascending order
    lengths, own = (part.flatten(1).norm(dim=1) for part in (noise, directions[of]))
    return directions[of] * (lengths / own).view(-1, 1, 1, 1)
