"""Linear regions on a part of a plane: areas, gates, values, classes and boundaries."""

from dataclasses import replace

import pytest
import torch
from checks import assert_close
from torch import nn

import adjointbackmap as abm

WINDOW = ((-0.05, 0.1), (-0.04, 0.11))
WIDE = ((-0.4, 0.6), (-0.4, 0.6))  # for networks with few gates
PIECES = (
    "plain-conv-chain saturated-on-both-sides max-pool-with-overlap-padding-and-ceil "
    "max-pool-with-ties infinite-constants dead-units residual-with-zero-padded-channels "
    "mlp-on-flat-inputs maximum maximum-with-constants largest largest-of-all hard-shrink where "
    "where-several sign unpooling group-sort masks-compared infinite-where-data-says relu-rnn-cell"
).split()
FINER = ("sorted-channels", "order-statistics", "top-k", "place-of-the-largest", "where-equal")


def mapped(traced, window=WINDOW, **options):
    """The slice through the two images of a catalogue network, and a third one."""
    origin, other = traced.x
    third = torch.randn(origin.shape, generator=torch.Generator().manual_seed(5)).double()
    return abm.region_map(traced.network, origin, other - origin, third, window, **options)


@pytest.mark.parametrize("name", [*PIECES, *FINER])
def test_map_of_a_network(traced_case, name):
    """Polygons cover the window, gates are constant on each, and no two have the same gates."""
    found = mapped(traced_case(name))
    if len(found.polygons) < 4:
        found = mapped(traced_case(name), WIDE)
    figures = abm.map_test(found)
    assert figures["area"] <= 1e-12
    assert len(found.polygons) > 1
    if name not in FINER:
        assert len(found.patterns.unique()) == len(found.polygons)


def classifier(*middle):
    """A small classifier, traced, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 3, 3), *middle, nn.Flatten(), nn.LazyLinear(3)]
        model = nn.Sequential(*layers)
        model(torch.zeros(1, 1, 7, 7))
        x = 2 * torch.randn(3, 1, 7, 7)
        model[-1].bias.data -= model(x).mean(0).detach()  # so that no class wins everywhere
    return abm.trace(model.double().eval(), x.double()), x.double()


class Step(nn.Module):
    """A function that jumps."""

    def forward(self, x):
        return torch.where(x > 0.2, x + 1, 0.1 * x)


@pytest.mark.parametrize("middle", [(nn.ReLU(), nn.MaxPool2d(2)), (Step(),)], ids=["relu", "step"])
def test_classes_and_boundaries(middle):
    """Classes are the model's own; scores are level on a boundary, or the class jumps there."""
    network, x = classifier(*middle)
    found = abm.region_map(network, x[0], x[1] - x[0], x[2] - x[0], ((-1, 2), (-1, 2)))
    cells = found.cells
    assert_close(cells.polygons.areas().sum(), found.areas.sum(), rtol=1e-12, atol=0)
    wide = cells.polygons.areas() > 1e-9
    own = network.model(found.at(cells.polygons.centres()[wide])).argmax(1)
    assert (own == cells.classes[wide]).all()
    assert sum(found.class_areas().values()) == pytest.approx(1)
    assert found.boundaries
    length = 0.0
    for line in found.boundaries:
        one, other = line.classes
        middles = (line.points[1:] + line.points[:-1]) / 2
        along = line.points[1:] - line.points[:-1]
        length += float(along.norm(dim=1).sum())
        normal = 1e-7 * torch.stack([-along[:, 1], along[:, 0]], 1) / along.norm(dim=1)[:, None]
        long = along.norm(dim=1) > 1e-5
        sides = [network.model(found.at(middles + sign * normal)).argmax(1) for sign in (-1, 1)]
        both = torch.stack(sides, 1)[long].sort(1).values
        assert (both == torch.tensor([one, other])).all()
    assert length == pytest.approx(crossings(network, found), rel=0.1)


def crossings(network, found, rows=400):
    """Length of the boundaries by Crofton's formula: crossings of rows in many directions."""
    (a, b), (c, d) = found.limits
    centre = torch.tensor([(a + b) / 2, (c + d) / 2]).double()
    radius = float(torch.tensor([b - a, d - c]).norm()) / 2
    total, directions = 0.0, 12
    for turn in range(directions):
        angle = torch.tensor((turn + 0.5) * torch.pi / directions).double()
        along = torch.stack([angle.cos(), angle.sin()])
        across = torch.stack([-angle.sin(), angle.cos()])
        steps = torch.linspace(-radius, radius, rows).double()
        grid = centre + steps[:, None, None] * across + steps[None, :, None] * along
        inside = (grid[..., 0] > a) & (grid[..., 0] < b) & (grid[..., 1] > c) & (grid[..., 1] < d)
        classes = network.model(found.at(grid.view(-1, 2))).argmax(1).view(rows, rows)
        changed = (classes[:, 1:] != classes[:, :-1]) & inside[:, 1:] & inside[:, :-1]
        total += float(changed.sum()) * 2 * radius / (rows - 1)
    return total * torch.pi / 2 / directions


def test_one_score_is_compared_with_zero():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.eye(2)
    model[2].weight.data = torch.tensor([[1.0, -1.0]])
    network = abm.trace(model.double().eval(), torch.zeros(1, 2).double())
    unit = torch.eye(2).double()
    found = abm.region_map(network, 0 * unit[0], *unit, ((-1, 1), (-1, 1)))
    (line,) = found.boundaries  # where both units are dead, the score is zero on a whole region
    assert line.classes == (0, 1)
    assert line.points[[0, -1]].sort(0).values.tolist() == [[0, -1], [1, 1]]
    assert found.class_areas()[1] == pytest.approx(0.375)  # x > max(y, 0)


def test_budget_and_zoom(traced_case):
    """A map that meets its budget gives what is finished; a window inside is complete."""
    traced = traced_case("plain-conv-chain")
    whole = mapped(traced)
    part = mapped(traced, budget=20, memory="60kB")
    assert not part.complete
    assert 20 <= len(part.polygons) < len(whole.polygons)
    assert 0 < part.covered < 1
    assert float(part.areas.sum()) == pytest.approx(part.covered * part.window_area)
    # what is finished is exact: each polygon is one of the whole map
    gaps = part.polygons.centres()[:, None] - whole.polygons.centres()
    assert float(gaps.norm(dim=2).amin(1).max()) < 1e-9
    assert "of the window" in repr(part)
    inner = whole.zoom(((0, 0.03), (0, 0.03)))
    assert inner.complete
    assert len(inner.polygons) < len(whole.polygons)
    assert_close(
        mapped(traced, memory="60kB").areas.sort()[0], whole.areas.sort()[0], atol=1e-12, rtol=0
    )


def test_faults_are_found(traced_case):
    """The public test of a map sees a missing polygon, joined ones, and wrong values."""
    found = mapped(traced_case("plain-conv-chain"))
    numbers = torch.arange(len(found.polygons))
    with pytest.raises(RuntimeError, match="areas that sum to the window's"):
        abm.map_test(replace(found, polygons=found.polygons.chosen(numbers[1:])))
    window = type(found.polygons).window(found.limits, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"constant gates inside polygons\. Got others in \[0\]"):
        abm.map_test(replace(found, polygons=window))
    with pytest.raises(RuntimeError, match="values of the network to"):
        abm.map_test(replace(found, coefficients=1.01 * found.coefficients))


def test_pictures(traced_case, tmp_path):
    pytest.importorskip("plotly", reason="the interactive page needs Plotly")
    found = mapped(traced_case("mlp-on-flat-inputs"))
    figure = found.plot(marks=["image", "adversarial", "other"])
    assert figure.axes[0].get_xlim() == found.limits[0]
    assert len(figure.axes[0].collections) == 3
    found.html(tmp_path / "map.html", names=list("abcde"))
    page = (tmp_path / "map.html").read_text()
    assert "decision boundary" in page
    assert "https://cdn.plot.ly" not in page.split("plotly.js")[0]


def test_arguments_that_do_not_fit(traced_case):
    traced = traced_case("plain-conv-chain")
    with pytest.raises(ValueError, match=r"limits must be .*each growing"):
        mapped(traced, ((0, 0), (0, 1)))
    with pytest.raises(ValueError, match="budget must be at least 1"):
        mapped(traced, budget=0)
    with pytest.raises(ValueError, match="u must be one image"):
        abm.region_map(traced.network, traced.x[0], traced.x, traced.x[0])
    with pytest.raises(ValueError, match="The output must be one number for each class"):
        mapped(traced).class_areas()
