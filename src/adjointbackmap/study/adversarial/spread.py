"""How far points spread, the ratio of two groups with its interval, and projections to a few dimensions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

MEASURES = ("distances", "variances")
DRAWS = 2000
PERPLEXITY = 5.0  # of tSNE: fit for 20 points
EXAGGERATION, MOST_STEPS = 12.0, 5000


def spread(points: Float[Tensor, "n d"], measure: str = "distances") -> float:
    r"""How far points spread, as a mean over pairs of two different ones, in float64.

    Args:
        points: At least two points.
        measure: ``"distances"`` for the mean pairwise distance; ``"variances"`` for the total variance, the trace of the
            sample covariance, which is the mean of :math:`|p_i - p_j|^2 / 2`.

    Raises:
        ValueError: If there are fewer points, or there is no such measure.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> spread(points), spread(points, "variances")
        (5.0, 12.5)
    """
    return _mean(_pairs(points, measure), torch.ones(1, len(points), dtype=torch.float64)).item()


@dataclass(frozen=True)
class Ratio:
    """The spread of a group over that of another one.

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
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], measure: str, seed: int = 0, draws: int = DRAWS
) -> Ratio:
    """The spread of one group over that of another, with a bootstrap interval (percentiles 2.5 and 97.5).

    Each draw resamples the points of both groups. A point that is drawn twice has no distance to itself: a draw's mean is
    over pairs of different original points, each as often as it was drawn, so that doubles do not shrink it. A draw of one
    point alone tells nothing and is left out.

    Args:
        first: Points, at least two.
        second: Points, at least two of which differ.
        measure: ``"distances"`` or ``"variances"``, see :func:`spread`.
        seed: Of the draws.
        draws: How many.

    Raises:
        ValueError: If there are fewer points, the second group has no spread, or there is no such measure.

    Example:
        >>> ratio = spread_ratio(2 * torch.eye(4), torch.eye(4), "distances")
        >>> round(ratio.value, 6), round(ratio.low, 6), round(ratio.high, 6)  # all points as far from each other
        (2.0, 2.0, 2.0)
    """
    value, other = spread(first, measure), spread(second, measure)
    if not other:
        msg = f"The second group must have points that differ. Got {len(second)} that are the same."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(seed)
    drawn = [_mean(_pairs(points, measure), _resampled(len(points), draws, generator)) for points in (first, second)]
    ratios = drawn[0] / drawn[1]
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return Ratio(value / other, low, high)


def tsne(points: Float[Tensor, "n d"], seed: int, perplexity: float = PERPLEXITY) -> "np.ndarray":
    """Points in three dimensions by tSNE, started from their principal components, with exact gradients: ``(n, 3)``.

    The learning rate is scikit-learn's, n / 12 / 4 with its early exaggeration of 12, without the floor of 50: there, twenty
    points fly apart and end in no minimum.

    Args:
        points: At least three points.
        seed: Of the principal components.
        perplexity: How many neighbours count, about.

    Raises:
        ValueError: If the perplexity is less than 1, or not less than the number of points.
    """
    if not 1 <= perplexity < len(points):
        msg = f"perplexity must be from 1 to less than the {len(points)} points. Got {perplexity}."
        raise ValueError(msg)
    from sklearn.manifold import TSNE

    rate = len(points) / EXAGGERATION / 4
    look = {"early_exaggeration": EXAGGERATION, "learning_rate": rate, "init": "pca", "method": "exact", "max_iter": MOST_STEPS}
    return TSNE(3, perplexity=perplexity, random_state=seed, **look).fit_transform(points.double().numpy())


def factors(points: Float[Tensor, "n d"], count: int, seed: int) -> "np.ndarray":
    """Scores of factor analysis, ``(n, count)``: by maximum likelihood, with a noise variance for each of the d numbers.

    Args:
        points: More points than factors.
        count: How many factors.
        seed: Of the singular value decompositions.

    Raises:
        ValueError: If there are not more points than factors.
    """
    if not 0 < count < len(points):
        msg = f"count must be from 1 to less than the {len(points)} points. Got {count}."
        raise ValueError(msg)
    from sklearn.decomposition import FactorAnalysis

    return FactorAnalysis(count, random_state=seed).fit_transform(points.double().numpy())


def _pairs(points: Tensor, measure: str) -> Float[Tensor, "n n"]:
    """What each pair of points adds to the measure.

    Raises:
        ValueError: If there are fewer than two points, or there is no such measure.
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
    """Means over pairs of different points, each as often as its points were drawn."""
    count = weights.sum(1).square() - weights.square().sum(1)
    return ((weights @ pairs) * weights).sum(1) / count


def _resampled(count: int, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n"]:
    """How often each of ``count`` points is in each draw."""
    chosen = torch.randint(count, (draws, count), generator=generator)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64))
