"""The spread of points, ratios of spreads with intervals, and low-dimensional projections."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

MEASURES = ("distances", "variances")
DRAWS = 2000  # of the bootstrap
PERPLEXITY = 5.0  # of tSNE, suitable for 20 points
EXAGGERATION = 12.0  # early exaggeration of tSNE, scikit-learn's default
MOST_STEPS = 5000  # limit of tSNE, far above the default of 1,000


def spread(points: Float[Tensor, "n d"], measure: str = "distances") -> float:
    r"""The spread of points: a mean over all pairs of different points, in float64.

    Args:
        points: At least two points.
        measure: ``"distances"`` is the mean pairwise distance. ``"variances"`` is the total
            variance: the trace of the sample covariance, or the mean of
            :math:`|p_i - p_j|^2 / 2`.

    Raises:
        ValueError: If there are fewer than two points, or the measure is unknown.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> spread(points), spread(points, "variances")
        (5.0, 12.5)
    """
    return _mean(_pairs(points, measure), torch.ones(1, len(points), dtype=torch.float64)).item()


@dataclass(frozen=True)
class Ratio:
    """The spread of one group divided by that of another.

    Attributes:
        value: The ratio.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread_ratio(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "m d"],
    measure: str,
    seed: int = 0,
    draws: int = DRAWS,
) -> Ratio:
    """The spread of one group divided by that of another, with a 95 % bootstrap interval.

    Each draw resamples the points of both groups. A point that is drawn twice has distance zero to
    its copy, which would shrink the spread. Therefore the mean of a draw is only over pairs of
    different original points, weighted by how often both were drawn. A draw that consists of copies
    of one point has no such pair and is left out.

    Args:
        first: Points, at least two.
        second: Points, at least two of which differ.
        measure: ``"distances"`` or ``"variances"``, see :func:`spread`.
        seed: Seed of the draws.
        draws: Number of draws.

    Raises:
        ValueError: If a group has fewer than two points, the second group has no spread, or the
            measure is unknown.

    Example:
        >>> points = torch.eye(4)  # each point is as far from each other point
        >>> ratio = spread_ratio(2 * points, points, "distances")
        >>> round(ratio.value, 6), round(ratio.low, 6), round(ratio.high, 6)
        (2.0, 2.0, 2.0)
    """
    value = spread(first, measure)
    other = spread(second, measure)
    if not other:
        msg = f"The second group must have points that differ. Got {len(second)} that are the same."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        _mean(_pairs(points, measure), _resampled(len(points), draws, generator))
        for points in (first, second)
    ]
    ratios = drawn[0] / drawn[1]
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return Ratio(value / other, low, high)


def tsne(points: Float[Tensor, "n d"], seed: int, perplexity: float = PERPLEXITY) -> "np.ndarray":
    """Project points to three dimensions by tSNE: ``(n, 3)``.

    The start is the principal components, and the gradients are exact. The learning rate is
    scikit-learn's n / 12 / 4, with an early exaggeration of 12 but without the lower limit of
    50. At a rate of 50, twenty points fly apart and do not reach a minimum.

    Args:
        points: At least three points.
        seed: Seed of the principal components.
        perplexity: Roughly the number of neighbours that count.

    Raises:
        ValueError: If the perplexity is less than 1, or not less than the number of points.
    """
    if not 1 <= perplexity < len(points):
        msg = f"perplexity must be from 1 to less than the {len(points)} points. Got {perplexity}."
        raise ValueError(msg)
    from sklearn.manifold import TSNE

    rate = len(points) / EXAGGERATION / 4
    look = {
        "early_exaggeration": EXAGGERATION,
        "learning_rate": rate,
        "init": "pca",
        "method": "exact",
        "max_iter": MOST_STEPS,
    }
    return TSNE(3, perplexity=perplexity, random_state=seed, **look).fit_transform(
        points.double().numpy()
    )


def factors(points: Float[Tensor, "n d"], count: int, seed: int) -> "np.ndarray":
    """Scores of a factor analysis, ``(n, count)``.

    It is fitted by maximum likelihood. Each of the d coordinates has its own noise variance.

    Args:
        points: More points than factors.
        count: Number of factors.
        seed: Seed of the singular value decompositions.

    Raises:
        ValueError: If there are not more points than factors.
    """
    if not 0 < count < len(points):
        msg = f"count must be from 1 to less than the {len(points)} points. Got {count}."
        raise ValueError(msg)
    from sklearn.decomposition import FactorAnalysis

    return FactorAnalysis(count, random_state=seed).fit_transform(points.double().numpy())


def _pairs(points: Tensor, measure: str) -> Float[Tensor, "n n"]:
    """The term of each pair of points in the mean.

    Raises:
        ValueError: If there are fewer than two points, or the measure is unknown.
    """
    if measure not in MEASURES:
        msg = f"measure must be one of {', '.join(MEASURES)}. Got {measure!r}."
        raise ValueError(msg)
    if len(points) < 2:
        msg = f"A spread must be that of at least two points. Got {len(points)}."
        raise ValueError(msg)
    exact = points.double()
    distances = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    return distances if measure == "distances" else distances.square() / 2


def _mean(pairs: Tensor, weights: Float[Tensor, "draws n"]) -> Float[Tensor, " draws"]:
    """Weighted mean over pairs of different points, for each draw.

    The weight of a pair is the product of how often its two points were drawn.
    """
    count = weights.sum(1).square() - weights.square().sum(1)
    return ((weights @ pairs) * weights).sum(1) / count


def _resampled(count: int, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n"]:
    """How often each of ``count`` points occurs in each draw."""
    chosen = torch.randint(count, (draws, count), generator=generator)
    ones = torch.ones(chosen.shape, dtype=torch.float64)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, chosen, ones)
