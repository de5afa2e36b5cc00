"""Summary of numbers over many images: the median, and the range of the middle 90 %."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ENDS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Quantiles:
    """The median of some numbers, and their 5 % and 95 % quantiles.

    Attributes:
        low: 5 % quantile.
        median: 50 % quantile.
        high: 95 % quantile.

    Example:
        >>> str(Quantiles.of(np.arange(101)))
        '50 (5 to 95)'
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float] | np.ndarray, factor: float = 1.0) -> "Quantiles":
        """Quantiles of some numbers, times a factor: 100 gives percent.

        They are NaN if there are no numbers.
        """
        found = (
            np.quantile(np.asarray(numbers, float), ENDS) if len(numbers) else np.full(3, np.nan)
        )
        return cls(*(factor * found).tolist())

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"
