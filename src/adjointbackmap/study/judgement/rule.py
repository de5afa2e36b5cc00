"""The rule of judgement: a row for each sentence, its number, threshold and reason.

It was written before the numbers were computed. A row is judged by the interval of its number over
images, for each of its networks and each of two draws of images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from adjointbackmap.report.sheets import PagePlace, Sheet
from adjointbackmap.study.results import Found

PLAIN = ("vgg7-nobias-cifar10", "fixup-resnet20-nobias-cifar10")
BIASED = ("vgg7-cifar10", "resnet20-cifar10", "fixup-resnet20-cifar10")
ALL = (*PLAIN, *BIASED)
Number = Callable[[Found], float | None]  # of an image, from its results

ERROR = 0.05  # chance that some interval of the page misses its number, shared by all of them
HIGH_GAIN = 0.1  # a tenth of a map's energy


@dataclass(frozen=True)
class Row:
    """A sentence, and what decides it.

    Attributes:
        key: Its name in results.
        sentence: What is claimed.
        source: Section of the dissertation; empty for a question of our own.
        number: The number of an image; ``None`` if the image has none.
        quantity: This number in words.
        networks: The networks that the sentence is about.
        threshold: The sentence holds on one side of it.
        reason: Why there.
        above: Whether it holds above the threshold, or below.
        statistic: What is taken over the images.
    """

    key: str
    sentence: str
    source: str
    number: Number
    quantity: str
    networks: tuple[str, ...]
    threshold: float
    reason: str
    above: bool = True
    statistic: Literal["median", "mean"] = "median"

    @property
    def own(self) -> bool:
        """Whether it is a question of our own."""
        return not self.source

    @property
    def side(self) -> str:
        """When it holds, in words."""
        return f"{'above' if self.above else 'below'} {self.threshold:g}"


def at(*keys: str) -> Number:
    """The number under some keys of an image's results; ``None`` if it is not there."""

    def number(found: Found) -> float | None:
        here: Any = found
        for key in keys:
            if key not in here:
                return None
            here = here[key]
        return float(here)

    return number


def over(first: Number, second: Number) -> Number:
    """One number divided by another."""
    return _both(first, second, lambda a, b: a / b if b else None)


def minus(first: Number, second: Number) -> Number:
    """One number minus another."""
    return _both(first, second, lambda a, b: a - b)


def _both(first: Number, second: Number, join: Callable[[float, float], float | None]) -> Number:
    def number(found: Found) -> float | None:
        a, b = first(found), second(found)
        return None if a is None or b is None else join(a, b)

    return number


HALF = "Half of its length: a smaller change leaves a hyperplane more like itself than not."
ROWS = (
    Row(
        "angle-image",
        "The hyperplanes of a class at two of its images differ significantly (image parts).",
        "2.5.3",
        at("angle", "image", "one class"),
        "angle in degrees between the label's image parts at two images of the label",
        ALL,
        45.0,
        "At 45 degrees two hyperplanes share half of their squared length.",
    ),
    Row(
        "angle-bias",
        "The hyperplanes of a class at two of its images differ significantly (bias parts).",
        "3.5.3",
        at("angle", "bias", "one class"),
        "angle in degrees between the label's bias parts at two images of the label",
        BIASED,
        45.0,
        "At 45 degrees two hyperplanes share half of their squared length.",
    ),
    Row(
        "high",
        "Hyperplanes have stronger amplitudes at high frequencies than images.",
        "2.5.3",
        minus(at("high", "hyperplane"), at("high", "pixels")),
        "share of the energy above a quarter cycle per pixel, hyperplane minus image",
        ALL,
        HIGH_GAIN,
        "A tenth of all energy; images have a few hundredths there.",
    ),
    Row(
        "irregular",
        "RM1 turns from shapes to irregular pixels as the layer goes high.",
        "2.5.3",
        minus(at("RM1", "last"), at("RM1", "first")),
        "mean of the same share over 16 channels, last convolution minus conv1",
        ALL,
        HIGH_GAIN,
        "A tenth of all energy. conv0 is no start: its hyperplanes depend on no image.",
    ),
    Row(
        "whole",
        "Few kernels use the whole of their receptive field.",
        "2.5.3",
        at("kernels", "whole"),
        "share of kernels (RM4, middle of the middle convolution) without a zero in their field",
        ALL,
        0.5,
        "Few is less than half.",
        above=False,
        statistic="mean",
    ),
    Row(
        "change-image",
        "Under adversarial noise the label's hyperplane differs significantly (image part).",
        "4.2.1, 4.3.1",
        at("noise", "image", "adversarial"),
        "norm of its change over its norm",
        ALL,
        0.5,
        HALF,
    ),
    Row(
        "change-bias",
        "Under adversarial noise the label's hyperplane differs significantly (bias part).",
        "4.3.1",
        at("noise", "bias", "adversarial"),
        "norm of its change over its norm",
        BIASED,
        0.5,
        HALF,
    ),
    Row(
        "hardly",
        "The images hardly differ.",
        "4.2.1, 4.3.1",
        at("noise", "input"),
        "norm of the input's change over its norm",
        ALL,
        0.1,
        "A tenth of its length.",
        above=False,
    ),
    Row(
        "class-same",
        "With the original image's hyperplanes, the adversarial image has the network's class.",
        "4.2.1",
        at("noise", "same class with H_orig"),
        "share of images",
        PLAIN,
        0.5,
        "Most images.",
        statistic="mean",
    ),
    Row(
        "class-other",
        "With the original image's hyperplanes, the adversarial image has another class.",
        "4.3.1",
        at("noise", "same class with H_orig"),
        "share of images with the network's class",
        BIASED,
        0.5,
        "Most images.",
        above=False,
        statistic="mean",
    ),
    Row(
        "targets",
        "Adversarial noise spreads a hyperplane almost as far as images of other classes do.",
        "4.2.2, 4.3.2",
        at("targets", "image"),
        "mean distance of the image parts under nine targeted attacks over that at ten images of "
        "other classes",
        ALL,
        0.8,
        "Almost is at least four fifths.",
    ),
    Row(
        "far",
        "The distances between these hyperplanes are very large although the noise is small.",
        "4.2.2, 4.3.2",
        at("targets", "least change"),
        "the smallest change of nine attacks, norm over norm",
        ALL,
        0.5,
        HALF,
    ),
    Row(
        "scaled-image",
        "Hyperplanes are more spread out under scaled adversarial than under Gaussian noise "
        "(image parts).",
        "4.2.3, 4.3.3",
        at("patterns", "image", "Gaussian"),
        "mean distance under adversarial patterns over that under Gaussian ones",
        ALL,
        1.0,
        "At 1 both spread as far.",
    ),
    Row(
        "scaled-bias",
        "Hyperplanes are more spread out under scaled adversarial than under Gaussian noise "
        "(bias parts).",
        "4.3.3",
        at("patterns", "bias", "Gaussian"),
        "mean distance under adversarial patterns over that under Gaussian ones",
        BIASED,
        1.0,
        "At 1 both spread as far.",
    ),
    Row(
        "classes-apart",
        "The angle between two classes is larger than that of one class.",
        "",
        minus(at("angle", "image", "two classes"), at("angle", "image", "one class")),
        "difference of the two angles at different images, in degrees",
        ALL,
        5.0,
        "Angles of random directions in so many dimensions vary by one degree.",
    ),
    Row(
        "angle-learned",
        "The angle of one class at two images is learned.",
        "",
        minus(at("angle", "image", "one class"), at("angle", "image", "untrained")),
        "angle of the trained network minus that of its untrained twin, in degrees",
        ALL,
        5.0,
        "The same five degrees.",
    ),
    Row(
        "white-noise",
        "Hyperplanes have more energy at high frequencies than white noise.",
        "",
        minus(at("high", "hyperplane"), at("high", "white noise")),
        "share of the energy above a quarter cycle per pixel, hyperplane minus white noise",
        ALL,
        0.0,
        "White noise has the same energy at every frequency.",
    ),
    Row(
        "high-learned",
        "The energy at high frequencies is learned.",
        "",
        minus(at("high", "hyperplane"), at("high", "untrained")),
        "share of the trained network minus that of its untrained twin",
        ALL,
        HIGH_GAIN,
        "A tenth of all energy.",
    ),
    Row(
        "direction-image",
        "The direction of adversarial noise matters for the change (image part).",
        "",
        over(at("noise", "image", "adversarial"), at("noise", "image", "random signs")),
        "change under adversarial noise over that under the same noise with random signs",
        ALL,
        1.25,
        "A quarter more.",
    ),
    Row(
        "direction-bias",
        "The direction of adversarial noise matters for the change (bias part).",
        "",
        over(at("noise", "bias", "adversarial"), at("noise", "bias", "random signs")),
        "change under adversarial noise over that under the same noise with random signs",
        BIASED,
        1.25,
        "A quarter more.",
    ),
    Row(
        "sensitivity-learned",
        "The sensitivity of hyperplanes to noise is learned.",
        "",
        over(at("steady", "trained"), at("steady", "untrained")),
        "change under random signs of 0.008 over that of the untrained twin",
        ALL,
        1.5,
        "Half as much again.",
    ),
    Row(
        "rank-image",
        "Hyperplanes are more spread out under adversarial noise than under nine Gaussian "
        "directions (image parts).",
        "",
        at("patterns", "image", "nine directions"),
        "mean distance under adversarial patterns over that under Gaussian ones of the same rank, "
        "lengths and factors",
        ALL,
        1.0,
        "At 1 both spread as far.",
    ),
    Row(
        "rank-bias",
        "Hyperplanes are more spread out under adversarial noise than under nine Gaussian "
        "directions (bias parts).",
        "",
        at("patterns", "bias", "nine directions"),
        "mean distance under adversarial patterns over that under Gaussian ones of the same rank, "
        "lengths and factors",
        BIASED,
        1.0,
        "At 1 both spread as far.",
    ),
)
"""In the order of the dissertation; then our own questions, which are its controls."""

NO_ROWS = {
    "The hyperplanes of the adversarial image reproduce its outputs.": "cannot fail: it is the "
    "definition of a hyperplane, and a test of the computation",
    "The difference starts from conv1.": "cannot fail: conv0 has no gate before it",
    "Some kernel takes null from the image.": "cannot fail where a ReLU is off, and cannot hold "
    "with leaky slopes",
    "Hyperplanes are not human-recognizable (5.1.1).": "not testable here: it needs people",
    "tSNE shows the hyperplanes far apart (4.2.2).": "not testable here: distances of tSNE have no "
    "scale",
}
"""Sentences that are no row, and why."""

INTERVALS = sum(len(row.networks) for row in ROWS)
LEVEL = 1 - ERROR / INTERVALS
"""Level of each interval: Bonferroni's correction for all rows and networks."""


def rule_sheets() -> tuple[Sheet, Sheet, Sheet]:
    """Tables of the rule: sentences of the dissertation, our own questions, and no rows."""
    head = ["sentence", "section", "number of an image", "holds", "reason", "networks"]
    sheets = (Sheet("Sentences of the dissertation", head), Sheet("Controls", head))
    for row in ROWS:
        kind = {ALL: "all five", PLAIN: "without biases", BIASED: "with biases"}[row.networks]
        number = f"{row.quantity} ({row.statistic})"
        cells = [row.sentence, row.source, number, row.side, row.reason, kind]
        sheets[row.own].rows.append(cells)
    left = Sheet("Sentences without a row", ["sentence", "why"])
    left.rows.extend(list(pair) for pair in NO_ROWS.items())
    return *sheets, left


RULE_PLACE = PagePlace(
    "<!-- rule: written by adjointbackmap.study.judgement -->", "<!-- rule: end -->"
)


def rule_page() -> str:
    """The tables of the rule as Markdown."""
    return "\n\n".join(sheet.markdown() for sheet in rule_sheets())
