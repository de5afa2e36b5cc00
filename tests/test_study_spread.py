"""Spread of points: measures and ratios against plain loops, bootstrap, projections."""

import numpy as np
import pytest
import torch

from adjointbackmap.study.adversarial import spread as module
from adjointbackmap.study.adversarial.spread import MEASURES, factors, spread, spread_ratio, tsne


def points(count, seed, size=4):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def plain(chosen, measure):
    """Slow twin over pairs in the order drawn; ``chosen`` holds places and points."""
    places, found = chosen
    terms = [
        np.linalg.norm(found[i] - found[j])
        if measure == "distances"
        else ((found[i] - found[j]) ** 2).sum() / 2
        for i in range(len(places))
        for j in range(i)
        if places[i] != places[j]
    ]
    return np.mean(terms) if terms else np.nan


def test_total_variance_is_the_trace_of_the_sample_covariance():
    found = points(7, 0)
    assert spread(found, "variances") == pytest.approx(np.trace(np.cov(found.double().numpy().T)))


def test_spread_keeps_its_precision_far_from_zero():
    """Float32 points whose common part is a thousand times their distances."""
    found = points(30, 0)
    assert spread(found + 4096) == pytest.approx(spread((found + 4096) - 4096), rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_ratio_and_interval_are_those_of_plain_loops(measure):
    first = points(5, 0)
    second = points(4, 1)
    found = spread_ratio(first, second, measure, seed=3, draws=40)
    generator = torch.Generator().manual_seed(3)
    groups = [g.double().numpy() for g in (first, second)]
    whole = [plain((range(len(g)), g), measure) for g in groups]
    chosen = [torch.randint(len(g), (40, len(g)), generator=generator).numpy() for g in groups]
    drawn = [
        [plain((places, g[places]), measure) for places in c]
        for c, g in zip(chosen, groups, strict=True)
    ]
    assert found.value == pytest.approx(whole[0] / whole[1])
    assert (found.low, found.high) == pytest.approx(
        tuple(np.nanquantile(np.divide(*drawn), [0.025, 0.975]))
    )
    assert found == spread_ratio(first, second, measure, seed=3, draws=40)
    assert str(found) == f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def test_doubles_in_a_draw_do_not_shrink_it():
    """All points are equally far apart, so every draw gives the same; lone points are left out."""
    assert spread_ratio(3 * torch.eye(2), torch.eye(2), "distances").low == pytest.approx(3)
    assert spread_ratio(3 * torch.eye(5), torch.eye(5)[:3], "variances").high == pytest.approx(9)


def test_most_intervals_hold_the_true_ratio():
    """Groups of one distribution look alike; a group twice as broad is seen."""
    pairs = [(points(30, 2 * s), points(30, 2 * s + 1)) for s in range(100)]
    same = [spread_ratio(*pair, "distances", draws=300) for pair in pairs]
    assert 86 <= sum(r.low <= 1 <= r.high for r in same) <= 99
    assert all(
        spread_ratio(2 * first, second, "distances", draws=300).low > 1
        for first, second in pairs[:20]
    )


def test_spread_takes_points_that_have_one():
    with pytest.raises(ValueError, match=r"at least two points. Got 1\."):
        spread(points(1, 0))
    with pytest.raises(
        ValueError, match=r"measure must be one of distances, variances. Got 'width'"
    ):
        spread(points(3, 0), "width")
    with pytest.raises(ValueError, match=r"points that differ. Got 3 that are the same"):
        spread_ratio(points(3, 0), torch.ones(3, 4), "distances")


def test_tsne_keeps_groups_apart_and_repeats_itself():
    two = torch.cat([points(10, 0, 30), points(10, 1, 30) + 20])
    found = tsne(two, seed=0)
    assert found.shape == (20, 3)
    assert np.array_equal(found, tsne(two, seed=0))
    distances = np.linalg.norm(found[:, None] - found[None], axis=2) + np.diag([np.inf] * 20)
    assert ((distances.argmin(1) < 10) == (np.arange(20) < 10)).all()


def test_factors_are_found_again():
    """Two planted factors and uneven noise: scores explain the factors, and repeat."""
    planted = points(60, 0, 2)
    noise = points(60, 1, 30) * torch.linspace(0.1, 1, 30)
    whole = planted @ points(2, 2, 30) + noise
    scores = factors(whole, 2, seed=0)
    fitted = scores @ np.linalg.lstsq(scores, planted.double().numpy(), rcond=None)[0]
    centred = planted.double().numpy() - planted.double().numpy().mean(0)
    assert ((fitted - centred) ** 2).sum() < 0.05 * (centred**2).sum()
    assert np.array_equal(scores, factors(whole, 2, seed=0))


def test_projections_take_enough_points():
    with pytest.raises(
        ValueError, match=r"perplexity must be from 1 to less than the 5 points. Got 5\.0"
    ):
        tsne(points(5, 0), seed=0, perplexity=module.PERPLEXITY)
    with pytest.raises(ValueError, match=r"count must be from 1 to less than the 2 points. Got 2"):
        factors(points(2, 0), 2, seed=0)
