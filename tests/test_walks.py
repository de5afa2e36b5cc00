"""Walks to the nearest class boundary: against dense samples and the untouched model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap.analysis import walks
from adjointbackmap.analysis.nearest import nearest_point

pytest.importorskip("scipy")
NORMS = ("l2", "linf")


def length(step, norm):
    return torch.linalg.vector_norm(step, 2 if norm == "l2" else torch.inf, -1)


def plane_network(seed):
    """A network on the plane with three classes, and an image."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model, torch.randn(2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_on_a_dense_grid(norm, seed):
    """The point has another class, no grid point within the lower bound has."""
    model, x = plane_network(seed)
    walk = abm.region_walk(abm.trace(model, x[None]), x, norm)
    assert walk.predicted == int(model(x[None]).argmax())
    assert walk.found == int(model(walk.point[None]).argmax()) != walk.predicted
    assert walk.upper == float(length(walk.point - x, norm))
    assert 0 < walk.lower <= walk.upper * (1 + 1e-6)
    assert all(a > b for a, b in zip(walk.distances, walk.distances[1:], strict=False))
    axis = torch.linspace(-1, 1, 401, dtype=torch.float64)
    around = torch.cartesian_prod(axis, axis)
    near = x + 0.999 * walk.lower * around / (length(around, norm)[:, None]).clamp_min(1)
    assert (model(near).argmax(1) == walk.predicted).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_a_region_is_exact(norm):
    """Among many points of the region and of another class, none is nearer."""
    model, x = plane_network(1)
    network = abm.trace(model, x[None])
    walk = abm.region_walk(network, x, norm)
    step = walk.point - x
    axis = torch.linspace(-1, 1, 801, dtype=torch.float64)
    # points around the end, those of its region
    points = walk.point + 0.2 * length(step, norm) * torch.cartesian_prod(axis, axis)
    gates = model[0](points) > 0
    same = (gates == (model[0](walk.point) > 0)).all(1)
    other = same & (model(points).argmax(1) != walk.predicted)
    assert other.sum() > 100
    assert length(points[other] - x, norm).min() >= walk.upper * (1 - 1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_pixels_stay_in_their_bounds(norm):
    """A convolution with max pooling; without the bounds the point leaves them."""
    torch.manual_seed(2)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    model = nn.Sequential(*layers).double().eval()
    x = torch.rand(1, 6, 6, dtype=torch.float64)
    network = abm.trace(model, x[None])
    free = abm.region_walk(network, x, norm, 60)
    walk = abm.region_walk(network, x, norm, 60, bounds=(0, 1))
    assert free.point.min() < 0 or free.point.max() > 1
    assert 0 <= walk.point.min() <= walk.point.max() <= 1
    for found in (free, walk):
        assert found.lower <= found.upper
        assert int(model(found.point[None]).argmax()) == found.found != found.predicted


def test_a_walk_that_finds_nothing_says_so():
    """One class always wins."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    model[2].weight.data.zero_()
    model[2].bias.data.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(2, dtype=torch.float64)
    walk = abm.region_walk(abm.trace(model, x[None]), x)
    assert walk.point is None
    assert walk.found is None
    assert walk.upper == float("inf")
    assert "no point found" in repr(walk)
    assert walk.reason.startswith("Neither steps towards the nearest class boundary")


@pytest.mark.parametrize("norm", NORMS)
def test_random_ways_where_steps_lead_nowhere(norm):
    """The margin of this network has a minimum near the image."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.tensor([0.6, 0.8], dtype=torch.float64)
    walk = abm.region_walk(abm.trace(model, x[None]), x, norm)
    assert walk.by_bisection
    assert int(model(walk.point[None]).argmax()) == walk.found != walk.predicted
    before = torch.lerp(x, walk.point, 1 - 1e-9)
    assert int(model(before[None]).argmax()) == walk.predicted
    # the nearest on a dense grid
    assert 3.7 < float((walk.point - x).norm()) < 20


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [None, (-4, 4)])
def test_a_short_walk_has_a_point_by_bisection(norm, bounds):
    """One region holds no boundary: the point has another class, just before it is the image's."""
    torch.manual_seed(2)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    model = nn.Sequential(*layers).double().eval()
    x = torch.rand(1, 6, 6, dtype=torch.float64)
    network = abm.trace(model, x[None])
    long = abm.region_walk(network, x, norm, bounds=bounds)
    short = abm.region_walk(network, x, norm, 1, bounds)
    assert not long.by_bisection
    assert short.by_bisection
    assert short.reason == ""
    assert long.upper <= short.upper * (1 + 1e-6) < float("inf")
    assert int(model(short.point[None]).argmax()) == short.found != short.predicted
    before = torch.lerp(x, short.point, 1 - 1e-9)
    assert int(model(before[None]).argmax()) == short.predicted
    if bounds is not None:
        assert bounds[0] <= float(short.point.min()) <= float(short.point.max()) <= bounds[1]


def test_no_lower_bound_without_all_kinks(monkeypatch):
    model, x = plane_network(0)
    original = walks.kink_distances
    monkeypatch.setattr(
        walks, "kink_distances", lambda *a, **k: replace(original(*a, **k), unmeasured=("mask",))
    )
    assert abm.region_walk(abm.trace(model, x[None]), x).lower is None


def test_arguments_are_checked():
    model, x = plane_network(0)
    network = abm.trace(model, x[None])
    with pytest.raises(ValueError, match=r"norm must be one of l2, linf\. Got 'l1'"):
        abm.region_walk(network, x, "l1")
    with pytest.raises(ValueError, match=r"regions must be at least 1\. Got 0"):
        abm.region_walk(network, x, regions=0)
    with pytest.raises(ValueError, match="x must lie in bounds"):
        abm.region_walk(network, x, bounds=(50, 51))


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_behind_walls(norm):
    """A corner, an empty polyhedron, and walls that are found one after the other."""
    corner = (np.array([[-1.0, 0.0], [0.0, -1.0]]), np.array([-1.0, -2.0]))
    nothing = (np.zeros((0, 2)), np.zeros(0))
    np.testing.assert_allclose(nearest_point(corner, lambda _: nothing, norm)[1], 2)
    found = nearest_point((corner[0][:1], corner[1][:1]), lambda _: corner, norm)
    assert (corner[0] @ found <= corner[1] + 1e-9).all()
    empty = (np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([-1.0, -1.0]))
    assert nearest_point(empty, lambda _: nothing, norm) is None
