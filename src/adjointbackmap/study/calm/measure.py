"""How calm a network is: what noise does to the label's hyperplane, image by image."""

from collections.abc import Callable
from pathlib import Path

import torch

from adjointbackmap import data
from adjointbackmap.analysis.angles import angles
from adjointbackmap.analysis.kinks import kink_distances
from adjointbackmap.analysis.lines import region_line
from adjointbackmap.attacks import Ball, apgd, pgd
from adjointbackmap.exactness.journal import Record
from adjointbackmap.study.adversarial.spread import spread
from adjointbackmap.study.adversarial.strengths import flip_shares, noises_of
from adjointbackmap.study.adversarial.targets import label_hyperplanes
from adjointbackmap.study.calm.candidates import Candidate
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import image_seed

LEVELS = (2, 8)  # radii in grey levels of 255; the turn at the first is the primary outcome
STEPS = 20  # of PGD
SLOW = 10  # one image in ten also has its kinks, and the regions of a line
ATTACKED = 200  # images of the accuracies under attack
APGD_STEPS = 50


def measure_candidate(
    candidate: Candidate,
    count: int,
    seed: int,
    keep: Path,
    report: Callable[[float], None],
) -> Found:
    """The numbers of some images, and the accuracies.

    Args:
        candidate: The network.
        count: Number of images, drawn from those that it classifies correctly.
        seed: Seed of all draws.
        keep: Folder for finished images.
        report: Called with the finished share.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(candidate.images), generator=generator)
    chosen = candidate.images[order[candidate.known[order]][:count]]
    about = {"weights sha256": candidate.network.weights_hash(), "split": candidate.split}
    job = {**about, "seed": seed, "levels": list(LEVELS), "steps": STEPS, "slow": SLOW}
    name = f"{candidate.title}-{candidate.split}-{about['weights sha256'][:8]}.jsonl"
    record = Record(keep / name, job)
    for n, image in enumerate(chosen.hashes):
        if image not in record.names:
            slow = n % SLOW == SLOW - 1
            record.append(image, measure_image(candidate, chosen[[n]], seed, slow))
        report((n + 1) / len(chosen))
    if "accuracies" not in record.names:
        record.append("accuracies", accuracies(candidate, candidate.images[order][:ATTACKED]))
    kept = dict(record.results())
    return {
        "title": candidate.title,
        "words": candidate.words,
        **about,
        "accuracies": kept["accuracies"],
        "images": [kept[image] for image in chosen.hashes],
    }


def measure_image(candidate: Candidate, one: data.Images, seed: int, slow: bool) -> Found:
    """Turn, flips and spread at each radius, and the share that biases carry.

    Args:
        candidate: The network.
        one: One image that it classifies correctly.
        seed: Seed of the run; each image has draws of its own.
        slow: Whether to find the nearest kink, and the regions of two lines.
    """
    generator = torch.Generator().manual_seed(image_seed(seed, one.hashes[0]))
    found: Found = {"biases": bias_share(candidate, one)}
    for level in LEVELS:
        found[str(level)] = at_radius(candidate, one, level / 255, generator, slow)
    if slow:
        kinks = kink_distances(
            candidate.subject.trace_in_pixels(), one.unit_interval().double(), sweep=torch.float32
        )
        nearest = {norm: kinks.nearest(norm) for norm in ("l2", "linf")}
        found["kinks"] = {norm: kink and kink.distance for norm, kink in nearest.items()}
    return found


def bias_share(candidate: Candidate, one: data.Images) -> float:
    """Share of the label's logit that biases carry."""
    x = candidate.input(one.unit_interval())
    planes = label_hyperplanes(candidate, one.unit_interval(), int(one.labels))
    value = float(planes.value.flatten()[0])
    return 1 - float((planes.image.flatten().double() * x.flatten().double()).sum()) / value


def at_radius(
    candidate: Candidate,
    one: data.Images,
    radius: float,
    generator: torch.Generator,
    slow: bool,
) -> Found:
    """What PGD and random signs of a radius do to the label's hyperplane."""
    pixels = one.unit_interval()
    label = int(one.labels)
    subject = candidate.subject
    draw = int(torch.randint(2**31, (), generator=generator))
    attacked = pgd(
        subject.module, pixels, one.labels, Ball(radius), subject.prepare, steps=STEPS, seed=draw
    )
    signs = torch.randint(2, pixels.shape, generator=generator) * 2.0 - 1
    ends = torch.cat([attacked.adversarial, (pixels + radius * signs).clamp(0, 1)])
    own, *others = label_hyperplanes(candidate, torch.cat([pixels, ends]), label).image.flatten(1)
    flips = flip_shares(candidate, torch.cat([pixels, ends]))
    found: Found = {}
    for kind, plane, flip, end in zip(("PGD", "random"), others, flips, ends, strict=True):
        found[kind] = {"turn": float(angles(own, plane, 0)), "flips": float(flip)}
        if slow and radius == LEVELS[0] / 255:
            line = region_line(subject.trace_in_pixels(), pixels[0].double(), end.double())
            found[kind]["regions"] = line.regions
    patterns = noises_of(candidate, pixels, label, radius, generator)
    spreads = {
        kind: spread(
            label_hyperplanes(candidate, (pixels + noise).clamp(0, 1), label).image.flatten(1)
        )
        for kind, noise in patterns.items()
        if kind in ("PGD", "nine directions")
    }
    found["spread ratio"] = spreads["PGD"] / spreads["nine directions"]
    return found


def accuracies(candidate: Candidate, images: data.Images) -> Found:
    """Accuracy on all images of the split, and under attack on some of them."""
    subject = candidate.subject
    pixels = images.unit_interval()
    found: Found = {"clean": float(candidate.known.double().mean()), "attacked": len(images)}
    for level in LEVELS:
        ball = Ball(level / 255)
        attacks = {
            "PGD": pgd(subject.module, pixels, images.labels, ball, subject.prepare, steps=STEPS),
            "APGD": apgd(
                subject.module, pixels, images.labels, ball, subject.prepare, steps=APGD_STEPS
            ),
        }
        for name, attack in attacks.items():
            right = (attack.before == images.labels) & (attack.after == images.labels)
            found[f"{name} {level}"] = float(right.double().mean())
    return found
