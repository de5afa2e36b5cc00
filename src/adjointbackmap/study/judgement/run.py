"""Measure the images of two draws with every network, image by image."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from adjointbackmap import data
from adjointbackmap.attacks import study_attack
from adjointbackmap.exactness.journal import Record
from adjointbackmap.study.judgement import measure as numbers
from adjointbackmap.study.judgement.rule import ALL
from adjointbackmap.study.results import Found
from adjointbackmap.study.setup import SCALE, Setup, Trained, write_json

KEY = "judgement"
DRAWS = 2  # draws of images: a verdict counts only if all agree


def compute_judgement(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Measure the images of both draws with every network of a run that is in the rule.

    Finished images are not measured again.

    Args:
        setup: Networks, number of images, seed of the first draw and folder.
        report: Called with the current task and its finished share.
    """
    for name in (name for name in ALL if name in setup.networks):
        trained = setup.trained(name)
        pool = setup.many(name, len(trained.images))
        draws = {}
        for seed in range(setup.seed, setup.seed + DRAWS):
            images = replace(setup, seed=seed).many(name)
            told = partial(report, f"{name}: images of draw {seed}")
            draws[str(seed)] = _draw(setup, trained, pool, images, seed, told)
        content = {**trained.about, "asked": setup.images, "draws": draws}
        write_json(setup.folder / KEY / f"{name}.json", content)


def _draw(
    setup: Setup,
    trained: Trained,
    pool: data.Images,
    images: data.Images,
    seed: int,
    report: Callable[[float], None],
) -> dict[str, Found]:
    """Hash of each image of a draw -> its numbers."""
    job = job_of(trained, images, seed)
    hashed = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    record = Record(setup.folder / KEY / f"{trained.name}-{seed}-{hashed[:8]}.jsonl", job)
    report(0.0)
    for n, image in enumerate(images.hashes):
        if image not in record.names:
            record.append(image, numbers.measure(trained, pool, images[[n]], seed))
        report((n + 1) / len(images))
    kept = dict(record.results())
    return {image: kept[image] for image in images.hashes}


def job_of(trained: Trained, images: data.Images, seed: int) -> Found:
    """What identifies the results of a draw, as JSON has it."""
    prepare = trained.subject.prepare
    attack = asdict(study_attack(1, images.unit_interval()[:1], prepare))
    settings = {
        "seed": seed,
        "scale": SCALE,
        "attack": attack,
        "patterns": numbers.PATTERNS,
        "radius": numbers.RADIUS,
        "steps": numbers.MOST_STEPS,
        "random signs": numbers.STEADY,
        "channels": numbers.CHANNELS,
    }
    return json.loads(json.dumps({**trained.about, **settings}))
