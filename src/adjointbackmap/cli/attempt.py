"""One attack on some images, as the options of the command attack ask for it."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from adjointbackmap.sources import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.attacks import Attack
    from adjointbackmap.examples import Attacked

BALL_METHODS = ("pgd", "apgd")
BALL_RADIUS = 8 / 255  # the usual one for linf and CIFAR
BALL_STEPS = {"pgd": 20, "apgd": 100}


@dataclass(frozen=True)
class Steps:
    """Options of the steps, as they were given."""

    step: list[float] | None
    radius: list[float] | None
    iterations: int | None
    until_success: bool | None


@dataclass(frozen=True)
class BallSettings:
    """Settings of PGD or APGD."""

    radius: float
    norm: Literal["linf", "l2"]
    iterations: int
    starts: int
    seed: int
    step: float | None = None

    def run(
        self, method: str, subject: Subject, pixels: "Tensor", labels: "Tensor", targets: Any
    ) -> "Attacked":
        """Attack some images."""
        from adjointbackmap.attacks import Ball, apgd, pgd

        ball = Ball(self.radius, self.norm)
        counts: dict[str, Any] = {
            "steps": self.iterations,
            "starts": self.starts,
            "seed": self.seed,
        }
        if method == "pgd":
            counts["step"] = self.step
        attack = pgd if method == "pgd" else apgd
        return attack(subject.module, pixels, labels, ball, subject.prepare, targets, **counts)


@dataclass(frozen=True)
class Attempt:
    """An attack on some images: all that its results depend on."""

    subject: Subject
    pixels: "Tensor"
    method: str
    goal: int | None  # the class of --target
    settings: "Attack | BallSettings"

    @cached_property
    def job(self) -> dict[str, Any]:
        """What identifies the results, as JSON has it."""
        chosen = {"method": self.method, "target": self.goal, **asdict(self.settings)}
        return job_of(self.subject, chosen)

    def run(self, part: slice) -> "Attacked":
        """Attack one batch of the images."""
        import torch

        from adjointbackmap.attacks import basic_iterative, least_likely
        from adjointbackmap.examples import scores_of

        module = self.subject.module
        prepare = self.subject.prepare
        pixels = self.pixels[part]
        labels = scores_of(module, pixels, prepare).argmax(1)
        targets = None if self.goal is None else torch.full_like(labels, self.goal)
        if isinstance(self.settings, BallSettings):
            return self.settings.run(self.method, self.subject, pixels, labels, targets)
        if self.method == "least-likely":
            return least_likely(module, pixels, self.settings, prepare)
        return basic_iterative(module, pixels, labels, self.settings, prepare, targets)


def ball_settings(
    method: str, norm: Literal["linf", "l2"], starts: int, seed: int, steps: Steps
) -> BallSettings:
    """The settings of PGD or APGD, with the options that were given.

    Raises:
        ValueError: If an option is one of the study's attacks alone.
    """
    several = [
        name
        for name, numbers in (("--step", steps.step), ("--radius", steps.radius))
        if numbers is not None and len(numbers) != 1
    ]
    if several:
        msg = f"{several[0]} must be one number for --method {method}. Got several."
        raise ValueError(msg)
    unfit = {
        "--until-success": steps.until_success,
        "--step": steps.step if method == "apgd" else None,
    }
    for option, given in unfit.items():
        if given is not None:
            msg = f"{option} must be left out for --method {method}, which has none. Got {given}."
            raise ValueError(msg)
    return BallSettings(
        steps.radius[0] if steps.radius else BALL_RADIUS,
        norm,
        steps.iterations or BALL_STEPS[method],
        starts,
        seed,
        steps.step[0] if steps.step else None,
    )


def study_settings(method: str, subject: Subject, pixels: "Tensor", steps: Steps) -> "Attack":
    """The attack of the study, with the options that were given."""
    from adjointbackmap.attacks import study_attack

    options: dict[str, Any] = {
        "step": tuple(steps.step or ()) or None,
        "radius": tuple(steps.radius or ()) or None,
        "iterations": steps.iterations,
        "until_success": steps.until_success,
    }
    given = {name: value for name, value in options.items() if value is not None}
    experiment = 1 if method == "basic" else 2
    return replace(study_attack(experiment, pixels, subject.prepare), **given)


def job_of(subject: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """What identifies the results, as JSON has it."""
    made_by = {"network": subject.title, "weights sha256": subject.trace().weights_hash()}
    return json.loads(json.dumps(made_by | settings))
