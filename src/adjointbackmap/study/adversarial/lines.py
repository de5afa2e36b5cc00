"""The line of experiment 1: every linear region on the way from an image to its adversarial one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.analysis.line_profile import LineProfile, line_profile
from adjointbackmap.analysis.lines import region_line
from adjointbackmap.attacks import basic_iterative, study_attack
from adjointbackmap.engine.network import Network
from adjointbackmap.exactness.journal import Record
from adjointbackmap.study.adversarial.pairs import attack_of
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import Setup, Trained, image_seed, write_json

KEY = "line"
RANDOM = "Gaussian, of the length of the attack"


def compute_lines(setup: Setup, report: Callable[[str, float], None]) -> Path:
    """Measure the line of each image with every network of a run.

    An image is skipped if it was finished earlier with the same settings.

    Args:
        setup: Networks, number of images, seed and folder.
        report: Called with the current task and its finished share.

    Returns:
        The folder of the results.
    """
    folder = setup.folder / KEY
    for name in setup.networks:
        report(f"{name}: lines", 0.0)
        trained = setup.trained(name)
        images = setup.many(name)
        job = {**attack_of(trained, images), "seed": setup.seed, "random": RANDOM}
        hashed = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        record = Record(folder / f"{name}-{hashed[:8]}.jsonl", job)
        network = trained.subject.trace_in_pixels()
        try:
            for n, image in enumerate(images.hashes):
                if image not in record.names:
                    record.append(image, measure_line(trained, network, images[[n]], setup.seed))
                report(f"{name}: lines", (n + 1) / len(images))
        finally:
            kept = dict(record.results())
            finished = {image: kept[image] for image in images.hashes if image in kept}
            content = {"job": job, "asked": setup.images, "images": finished}
            write_json(folder / f"{name}.json", content)
    return folder


def measure_line(trained: Trained, network: Network, one: data.Images, seed: int) -> Found:
    """The lines from an image to its adversarial image, and to a random one equally far away.

    Args:
        trained: The network.
        network: The network in pixels, in float64.
        one: One image that it classifies correctly.
        seed: Seed of the random direction.
    """
    pixels = one.unit_interval()
    label = int(one.labels)
    subject = trained.subject
    attack = study_attack(1, pixels, subject.prepare)
    found = basic_iterative(subject.module, pixels, one.labels, attack, subject.prepare)
    start = pixels[0].double()
    step = found.adversarial[0].double() - start
    ends = {"adversarial": step, "random": random_step(step, one.hashes[0], seed)}
    result: dict[str, Any] = {
        "label": label,
        "fooled": bool(found.fooled(one.labels)),
        "steps": int(found.steps) if found.steps is not None else None,
        "l2": float(step.norm()),
        "linf": float(step.abs().max()),
    }
    for name, direction in ends.items():
        line = region_line(network, start, start + direction)
        result[name] = summary(line_profile(line, unit=label, planes=1))
    return result


def random_step(step: Tensor, image: str, seed: int) -> Tensor:
    """A Gaussian direction of the same l2 length, drawn anew for each image."""
    drawn = image_seed(seed, image)
    direction = torch.randn(
        step.shape, generator=torch.Generator().manual_seed(drawn), dtype=step.dtype
    )
    return direction * step.norm() / direction.norm()


def summary(profile: LineProfile) -> Found:
    """The numbers of a line, with the label's hyperplane H."""
    line = profile.line
    change = profile.change
    return {
        "regions": line.regions,
        "flips": line.flips_by_operation(),
        "class changes at": None if change is None else change.t,
        "to class": None if change is None else change.after,
        "regions until there": None if change is None else change.region + 1,
        "turn until there": None if change is None else profile.turned_at(change.region),
        "turn": float(profile.turned[-1]),
        "stretch": float(profile.stretched[-1]),
    }
