"""Attacks on images: those of the study, and projected gradient descent within a ball.

Images, steps, radii and norms are in pixels. ``prepare`` maps pixels to the model's input. One
attack is therefore the same for networks with and without normalisation.
"""

from adjointbackmap.attacks.ball import NORMS, Ball, apgd, pgd
from adjointbackmap.attacks.iterative import (
    Attack,
    basic_iterative,
    kurakin_iterations,
    least_likely,
    pixel_steps,
    study_attack,
)

__all__ = [
    "NORMS",
    "Attack",
    "Ball",
    "apgd",
    "basic_iterative",
    "kurakin_iterations",
    "least_likely",
    "pgd",
    "pixel_steps",
    "study_attack",
]
