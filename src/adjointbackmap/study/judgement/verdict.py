"""Intervals over images, and the verdicts that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adjointbackmap.study.judgement.rule import LEVEL, ROWS, Row
from adjointbackmap.study.results import Found

RESAMPLES = 20_000  # each end of an interval at the corrected level still has five beyond it
PART = 1000  # resamples at a time
Draws = dict[str, list[Found]]  # seed of a draw -> numbers of its images


@dataclass(frozen=True)
class Interval:
    """A number over images with its interval.

    Attributes:
        low: Lower end; NaN if no image has the number.
        value: The number.
        high: Upper end.
        images: Number of images that have it.
    """

    low: float
    value: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def side(self, threshold: float, above: bool) -> bool | None:
        """Whether the whole interval is on one side of a threshold; ``None`` if neither is.

        Example:
            >>> [Interval(1.0, 1.5, 2.0, 9).side(edge, above=True) for edge in (0.5, 1.2, 3.0)]
            [True, None, False]
        """
        if self.low > threshold:
            return above
        return (not above) if self.high < threshold else None


def interval_of(numbers: Sequence[float], statistic: str, level: float = LEVEL) -> Interval:
    """The median or mean of some numbers, with its bootstrap interval (percentiles).

    Args:
        numbers: A number for each image.
        statistic: ``"median"`` or ``"mean"``.
        level: Level of the interval.
    """
    if not numbers:
        return Interval(np.nan, np.nan, np.nan, 0)
    values = np.asarray(numbers, float)
    take = np.median if statistic == "median" else np.mean
    source = np.random.default_rng(0)
    drawn = np.concatenate(
        [
            take(values[source.integers(len(values), size=(PART, len(values)))], axis=1)
            for _ in range(RESAMPLES // PART)
        ]
    )
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(take(values)), float(high), len(values))


@dataclass(frozen=True)
class Verdict:
    """A row, judged.

    Attributes:
        row: The row.
        intervals: Network -> its interval in each draw.
    """

    row: Row
    intervals: dict[str, tuple[Interval, ...]]

    def by_draw(self, draw: int) -> bool | None:
        """The verdict over all networks from one draw."""
        sides = {
            intervals[draw].side(self.row.threshold, self.row.above)
            for intervals in self.intervals.values()
        }
        if False in sides:
            return False
        return None if None in sides or not sides else True

    @property
    def draws(self) -> list[bool | None]:
        """The verdict from each draw."""
        count = min((len(found) for found in self.intervals.values()), default=0)
        return [self.by_draw(draw) for draw in range(count)]

    @property
    def changed(self) -> bool:
        """Whether the draws differ."""
        return len(set(self.draws)) > 1

    @property
    def holds(self) -> bool | None:
        """The verdict that every draw gives; ``None`` if they differ or cannot tell."""
        draws = set(self.draws)
        return draws.pop() if len(draws) == 1 else None

    def of(self, network: str) -> bool | None:
        """The verdict of one network that every draw gives."""
        sides = {
            found.side(self.row.threshold, self.row.above) for found in self.intervals[network]
        }
        return sides.pop() if len(sides) == 1 else None

    @property
    def against(self) -> list[str]:
        """Networks for which it does not hold."""
        return [name for name in self.intervals if self.of(name) is False]


def judge(networks: dict[str, Draws]) -> list[Verdict]:
    """Judge every row.

    Args:
        networks: Name of a network -> numbers of the images of each draw.
    """
    return [_judged(row, networks) for row in ROWS]


def _judged(row: Row, networks: dict[str, Draws]) -> Verdict:
    intervals = {}
    for name in (name for name in row.networks if name in networks):
        intervals[name] = tuple(
            interval_of([n for n in map(row.number, images) if n is not None], row.statistic)
            for images in networks[name].values()
        )
    return Verdict(row, intervals)
