"""Experiments 1 and 3 on many images: distributions and failure counts instead of one picture."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.analysis.angles import angles
from adjointbackmap.engine.pattern import record_pattern
from adjointbackmap.exactness.journal import Record
from adjointbackmap.study.adversarial.gates import flipped, gate_counts, near_kinks
from adjointbackmap.study.adversarial.noise_patterns import PATTERNS
from adjointbackmap.study.adversarial.pairs import (
    Pair,
    attack_of,
    attacked_pair,
    relative_change,
)
from adjointbackmap.study.adversarial.scaled import spread_of
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import SCALE, Setup, Trained, write_json

KEY = "many"
BATCH = 20  # images per forward pass


def compute_many(setup: Setup, report: Callable[[str, float], None]) -> None:
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
            _measure(trained, images, setup.seed, record, partial(report, f"{name}: images"))
        finally:
            kept = dict(record.results())
            finished = {image: kept[image] for image in images.hashes if image in kept}
            content = {"job": job, "asked": setup.images, "images": finished}
            write_json(setup.folder / KEY / f"{name}.json", content)


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
        for n, found in enumerate(measure_many(trained, part)):
            one = part[n]
            pixels = one.unit_interval()
            found["spread"] = spread_of(trained, pixels, int(one.labels), seed, PATTERNS)
            record.append(part.hashes[n], found)
            report(1 - (len(missing) - start - n - 1) / len(images))
    report(1.0)


def measure_many(trained: Trained, images: data.Images) -> list[Found]:
    """Experiment 1 on a batch: the changes between each image and its attacked version.

    Args:
        trained: The network.
        images: Images that it classifies correctly.

    Returns:
        A JSON-compatible dictionary for each image. ``errors`` holds the largest error of all
        outputs, relative to the largest output. ``changed`` and ``angle`` (in degrees) are those of
        the label's hyperplane.
    """
    batch = _Batch.of(trained, images)
    return [batch.result(n, label) for n, label in enumerate(images.labels.tolist())]


@dataclass(frozen=True)
class _Batch:
    """The changes of all images of a batch.

    Attributes:
        pair: Images and hyperplanes before and after the attack.
        fooled: Whether the attack of each image succeeded.
        near: Gates within rounding of their kink, before and after the attack, ``(N,)``.
        flips: Layer -> share of its gates that flip, ``(N,)``.
        gates: Layer -> number of its gates.
        rebuilt: Outputs at the attacked images, reconstructed by two hyperplanes.
    """

    pair: Pair
    fooled: Bool[Tensor, " n"]
    near: list[Int64[Tensor, " n"]]
    flips: dict[str, Float[Tensor, " n"]]
    gates: dict[str, int]
    rebuilt: dict[str, Float[Tensor, "n classes"]]

    @classmethod
    def of(cls, trained: Trained, images: data.Images) -> "_Batch":
        """Attack the images, and compare before and after."""
        pair = attacked_pair(trained, images)
        network = trained.network
        both = (pair.original.x, pair.adversarial.x)
        patterns = [record_pattern(network, x, SCALE) for x in both]
        near = [torch.stack([*near_kinks(network, x).values()]).sum(0) for x in both]
        return cls(
            pair,
            pair.found.fooled(images.labels),
            near,
            flipped(*patterns),
            gate_counts(patterns[0]),
            {"H_adv": pair.adversarial.reconstruct(), "H_orig": pair.with_original},
        )

    @cached_property
    def errors(self) -> dict[str, Float[Tensor, " n"]]:
        """Largest error of all outputs, relative to the largest output."""
        value = self.pair.adversarial.value
        largest = value.abs().amax(1)
        return {key: (sums - value).abs().amax(1) / largest for key, sums in self.rebuilt.items()}

    @cached_property
    def changed(self) -> dict[str, Float[Tensor, "n classes"]]:
        """Part -> relative change of each class's hyperplane."""
        return {part: relative_change(*both, 2) for part, both in self.pair.parts.items()}

    @cached_property
    def turned(self) -> dict[str, Float[Tensor, "n classes"]]:
        """Part -> angle between each class's hyperplanes before and after, in degrees."""
        return {part: angles(*both, 2) for part, both in self.pair.parts.items()}

    @cached_property
    def inputs_changed(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Relative change of the pixels, and of the network's input."""
        found = self.pair.found
        return relative_change(found.pixels, found.adversarial, 1), self.pair.inputs_changed

    def result(self, n: int, label: int) -> Found:
        """The numbers of one image."""
        found = self.pair.found
        numbers = ("before", "after", "steps", "l2", "linf")
        pixels, inputs = self.inputs_changed
        flips = {layer: float(share[n]) for layer, share in self.flips.items()}
        return {
            "label": label,
            **{key: getattr(found, key)[n].item() for key in numbers},
            "fooled": bool(self.fooled[n]),
            "pixels changed": float(pixels[n]),
            "inputs changed": float(inputs[n]),
            "changed": {part: float(change[n, label]) for part, change in self.changed.items()},
            "angle": {part: float(angle[n, label]) for part, angle in self.turned.items()},
            "median angle": {part: float(angle[n].median()) for part, angle in self.turned.items()},
            "errors": {key: float(error[n]) for key, error in self.errors.items()},
            "class with H_orig": int(self.rebuilt["H_orig"][n].argmax()),
            "flipped": flips,
            "gates flipped": round(sum(flips[layer] * self.gates[layer] for layer in flips)),
            "near kinks": [int(count[n]) for count in self.near],
            "gates": sum(self.gates.values()),
        }


def _record_path(folder: Path, name: str, job: Found) -> Path:
    """The record's file: each job has its own."""
    hashed = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    return folder / KEY / f"{name}-{hashed[:8]}.jsonl"
