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

PRESETS = ("own", "study")
AUGMENTATIONS = ("crop", "study")
Intervals = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent; the rate rises and falls linearly, or is constant in intervals.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in a step.
        peak_rate: Largest learning rate.
        rise: Share of the steps in which the rate rises.
        momentum: Nesterov's momentum; 0 is plain gradient descent.
        weight_decay: Factor of the squared parameters in the loss.
        label_smoothing: Share of the label that all classes have.
        crop_padding: Pixels around the image from which the augmentation ``"crop"`` crops.
        intervals: Learning rates, each with the epochs in which it is kept; the last one is kept to the end. None: the
            rate rises and falls.
        l1: Factor of the sum of the kernels' absolute values in the loss.
        validate_every: Epochs from one validation to the next; the last epoch has one in any case.
        augmentation: ``"crop"`` or ``"study"``, see :mod:`adjointbackmap.training.augmentation`.

    Raises:
        ValueError: If a count is less than 1 or there is no such augmentation.
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

    def __post_init__(self) -> None:
        lengths = [length for _, length in self.intervals]
        if min(self.epochs, self.batch, self.validate_every, *lengths) < 1:
            msg = (
                "Epochs, batch, validate_every and the epochs of each interval must be at least 1. "
                f"Got {self.epochs}, {self.batch}, {self.validate_every} and {lengths}."
            )
            raise ValueError(msg)
        if self.augmentation not in AUGMENTATIONS:
            msg = f"The augmentation must be one of {', '.join(AUGMENTATIONS)}. Got {self.augmentation!r}."
            raise ValueError(msg)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: that of its interval, or from near 0 up to ``peak_rate``, then down to near 0."""
        if self.intervals:
            epoch = step * self.epochs // steps
            ends = accumulate(length for _, length in self.intervals)
            return next(
                (rate for (rate, _), end in zip(self.intervals, ends, strict=True) if epoch < end),
                self.intervals[-1][0],
            )
        peak = self.rise * steps
        position = step + 0.5
        return self.peak_rate * min(position / peak, (steps - position) / (steps - peak))

    def augment(
        self, pixels: UInt8[Tensor, "n 3 h w"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 h w"]:
        """Images of a step: bytes ``(N, 3, H, W)`` in, pixels on the scale of [0, 1] out."""
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
"""Network and data set -> learning rates, each with its number of epochs [Wan2022, Tables 2.1, 3.1, 3.2]."""


def study_recipe(network: str, dataset: str) -> Recipe:
    """The study's training of a network [Wan2022, sections 2.5.1 and 3.5.1].

    Plain gradient descent in batches of 100, cross-entropy and L1 of the kernels, validated every two epochs. The factor
    1e-4 of L1 is that of section 2.5.1.4; chapter 3 gives none, and has the same here.

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
        msg = (
            f"The study's recipes must be of {known}. Got {' on '.join(key)}: leave the preset out."
        )
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
    """The recipe of a preset, with some of its fields changed.

    Args:
        network: An architecture, or one followed by a data set.
        dataset: ``"cifar10"`` or ``"cifar100"``.
        preset: ``"own"``, the defaults of :class:`Recipe`, or ``"study"``, see :func:`study_recipe`.
        **changes: Fields of :class:`Recipe`; those that are None stay as they are. New ``intervals`` bring their epochs.

    Raises:
        ValueError: If there is no such preset, or a rate that rises and falls is mixed with intervals.

    Example:
        >>> choose_recipe("vgg7", "cifar10", "study", batch=128, epochs=None).epochs
        501
    """
    if preset not in PRESETS:
        msg = f"The preset must be one of {', '.join(PRESETS)}. Got {preset!r}."
        raise ValueError(msg)
    recipe = study_recipe(network, dataset) if preset == "study" else Recipe()
    changes = {name: value for name, value in changes.items() if value is not None}
    recipe = replace(recipe, **_constant_rates(changes.pop("intervals", recipe.intervals)))
    linear = [name for name in ("peak_rate", "rise") if name in changes]
    if recipe.intervals and linear:
        msg = f"With intervals of constant rates there must be no peak_rate and no rise. Got {', '.join(linear)}: leave it out."
        raise ValueError(msg)
    return replace(recipe, **changes)


def _constant_rates(intervals: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The fields of a recipe that follow from intervals."""
    if not intervals:
        return {}
    peak_rate = max(rate for rate, _ in intervals)
    epochs = sum(length for _, length in intervals)
    return {"intervals": tuple(intervals), "epochs": epochs, "peak_rate": peak_rate, "rise": 0.0}
