"""Recipes of training: our own, and the schedules that the study published."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from adjointbackmap import models
from adjointbackmap.training import augmentation
from adjointbackmap.training.objectives import OBJECTIVES

RECIPE_PRESETS = ("own", "study")
AUGMENTATIONS = ("crop", "study")
Intervals = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent.

    The learning rate rises and falls linearly, or is constant in intervals.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in a step.
        peak_rate: Largest learning rate.
        rise: Share of the steps in which the rate rises.
        momentum: Nesterov's momentum; 0 is plain gradient descent.
        weight_decay: Factor of the squared parameters in the loss.
        label_smoothing: Share of the label that is spread over all classes.
        crop_padding: Pixels that the augmentation ``"crop"`` adds on every side before the crop.
        intervals: Constant learning rates, each with its number of epochs. The last one is kept to
            the end. If empty, the rate rises and falls.
        l1: Factor of the sum of the kernels' absolute values in the loss.
        validate_every: Epochs from one validation to the next. The last epoch is always validated.
        augmentation: ``"crop"`` or ``"study"``, see :mod:`adjointbackmap.training.augmentation`.
        objective: ``"plain"``, ``"adversarial"``, ``"local-linearity"`` or ``"gradient-norm"``,
            see :mod:`adjointbackmap.training.objectives`.
        radius: Largest change of a pixel in [0, 1] that an objective looks at.
        strength: Factor of the penalty of ``"local-linearity"`` and ``"gradient-norm"``.

    Raises:
        ValueError: If a count is less than 1, the radius or the strength is negative, or there is
            no such augmentation or objective.
    """

    epochs: int = 30
    batch: int = 128
    peak_rate: float = 0.2
    rise: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_padding: int = 4
    intervals: Intervals = ()
    l1: float = 0.0
    validate_every: int = 1
    augmentation: str = "crop"
    objective: str = "plain"
    radius: float = 8 / 255
    strength: float = 1.0

    def __post_init__(self) -> None:
        lengths = [length for _, length in self.intervals]
        if min(self.epochs, self.batch, self.validate_every, *lengths) < 1:
            msg = (
                "Epochs, batch, validate_every and the epochs of each interval must be at least 1. "
                f"Got {self.epochs}, {self.batch}, {self.validate_every} and {lengths}."
            )
            raise ValueError(msg)
        if min(self.radius, self.strength) < 0:
            msg = (
                "Radius and strength of an objective must be at least 0. "
                f"Got {self.radius} and {self.strength}."
            )
            raise ValueError(msg)
        for name, chosen, known in (
            ("augmentation", self.augmentation, AUGMENTATIONS),
            ("objective", self.objective, OBJECTIVES),
        ):
            if chosen not in known:
                msg = f"The {name} must be one of {', '.join(known)}. Got {chosen!r}."
                raise ValueError(msg)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step.

        It is that of the step's interval. Without intervals it rises from near 0 to ``peak_rate``,
        then falls to near 0.
        """
        if self.intervals:
            epoch = step * self.epochs // steps
            ends = accumulate(length for _, length in self.intervals)
            return next(
                (rate for (rate, _), end in zip(self.intervals, ends, strict=True) if epoch < end),
                self.intervals[-1][0],
            )
        peak = self.rise * steps
        position = step + 0.5  # the middle of the step, so that the rate is never 0
        return self.peak_rate * min(position / peak, (steps - position) / (steps - peak))

    def augment(
        self, pixels: UInt8[Tensor, "n 3 h w"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """Augment bytes ``(N, 3, H, W)``. The result has pixels on the scale of [0, 1]."""
        if self.augmentation == "study":
            return augmentation.study(pixels, generator)
        return augmentation.crop(pixels, self.crop_padding, generator)


STUDY_INTERVALS: dict[tuple[str, str], Intervals] = {
    ("vgg7-nobias", "cifar10"): ((2e-4, 200), (1e-4, 50), (5e-5, 51)),
    ("fixup-resnet20-nobias", "cifar10"): ((2e-3, 100), (1e-3, 50), (5e-4, 51)),
    ("vgg7", "cifar10"): ((0.01, 300), (0.002, 100), (0.0005, 101)),
    ("resnet20", "cifar10"): ((0.01, 100), (0.001, 50), (0.0002, 51)),
    ("fixup-resnet20", "cifar10"): ((0.002, 80), (0.001, 40), (0.0005, 31)),
    ("vgg7", "cifar100"): ((0.01, 500), (0.002, 100), (0.0005, 101)),
    ("resnet20", "cifar100"): ((0.01, 100), (0.001, 50), (0.0002, 51)),
    ("fixup-resnet20", "cifar100"): ((0.002, 40), (0.001, 40), (0.0005, 41)),
}
"""Network and data set -> learning rates, each with its number of epochs.

See [Wan2022, Tables 2.1, 3.1, 3.2].
"""


def study_recipe(network: str, dataset: str) -> Recipe:
    """The study's training of a network [Wan2022, sections 2.5.1 and 3.5.1].

    It is plain gradient descent in batches of 100 on cross-entropy and the L1 norm of the kernels,
    with a validation every two epochs. The factor 1e-4 of L1 is from section 2.5.1.4. Chapter 3
    gives no factor, so the same is used.

    Args:
        network: An architecture, or one followed by a data set.
        dataset: ``"cifar10"`` or ``"cifar100"``.

    Raises:
        ValueError: If there is no such network, or the study did not train it on this data set.

    Example:
        >>> study_recipe("resnet20", "cifar10").epochs
        201
    """
    key = (models.architecture(network), dataset)
    if key not in STUDY_INTERVALS:
        known = ", ".join(" on ".join(pair) for pair in STUDY_INTERVALS)
        asked = " on ".join(key)
        msg = f"The study's recipes must be of {known}. Got {asked}: leave the preset out."
        raise ValueError(msg)
    recipe = Recipe(
        batch=100,
        momentum=0.0,
        weight_decay=0.0,
        label_smoothing=0.0,
        l1=1e-4,
        validate_every=2,
        augmentation="study",
    )
    return replace(recipe, **_constant_rates(STUDY_INTERVALS[key]))


def choose_recipe(network: str, dataset: str, preset: str = "own", **changes: Any) -> Recipe:
    """The recipe of a preset, with changes.

    Args:
        network: An architecture, or one followed by a data set.
        dataset: ``"cifar10"`` or ``"cifar100"``.
        preset: ``"own"`` for the defaults of :class:`Recipe`, or ``"study"`` for
            :func:`study_recipe`.
        **changes: Fields of :class:`Recipe`. ``None`` changes nothing. New ``intervals`` also set
            the number of epochs.

    Raises:
        ValueError: If there is no such preset, or ``peak_rate`` or ``rise`` come with intervals.

    Example:
        >>> choose_recipe("vgg7", "cifar10", "study", batch=128, epochs=None).epochs
        501
    """
    if preset not in RECIPE_PRESETS:
        msg = f"The preset must be one of {', '.join(RECIPE_PRESETS)}. Got {preset!r}."
        raise ValueError(msg)
    recipe = study_recipe(network, dataset) if preset == "study" else Recipe()
    changes = {name: value for name, value in changes.items() if value is not None}
    recipe = replace(recipe, **_constant_rates(changes.pop("intervals", recipe.intervals)))
    linear = [name for name in ("peak_rate", "rise") if name in changes]
    if recipe.intervals and linear:
        msg = (
            "With intervals of constant rates there must be no peak_rate and no rise. "
            f"Got {', '.join(linear)}: leave it out."
        )
        raise ValueError(msg)
    return replace(recipe, **changes)


def _constant_rates(intervals: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The fields of a recipe that follow from intervals."""
    if not intervals:
        return {}
    peak_rate = max(rate for rate, _ in intervals)
    epochs = sum(length for _, length in intervals)
    return {"intervals": tuple(intervals), "epochs": epochs, "peak_rate": peak_rate, "rise": 0.0}
