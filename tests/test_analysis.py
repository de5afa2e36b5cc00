"""Kinks, class boundaries, effective fields and sparsity, against dense Jacobians and steps."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Net, make
from checks import assert_close
from torch import nn

import adjointbackmap as abm
from adjointbackmap import models
from adjointbackmap.analysis.crossings import NORMS, Plane, reach
from adjointbackmap.analysis.kinks import Gap
from adjointbackmap.rules import RULES
from adjointbackmap.rules.piecewise import Gate

PIECEWISE = (
    "absolute prelu rrelu relu6 hardtanh hard-sigmoid threshold threshold-at-zero clamp-max "
    "clamp-between-tensors maximum maximum-with-constants largest largest-channel maxout "
    "maxout-kept adaptive-max max-pool-with-indices max-pool1d adaptive-max1d max-pool3d "
    "largest-of-all sort group-sort sort-of-channels top-k order-statistics order-statistics-kept "
    "quantile smallest-and-largest norms relu-rnn relu-rnn-cell hard-shrink soft-shrink where "
    "where-several where-equal mask-as-factor sign"
).split()
MASKED = ("sorted-by-another place-of-the-largest unpooling").split()


def dense(function, x, kinks=(0.0,)):
    """Distances ``(2, *units)`` to the nearest kink for one image, from the whole Jacobian."""
    jacobian = torch.func.jacrev(lambda z: function(z[None])[0])(x)
    value = function(x[None])[0]
    rows = jacobian.flatten(-x.dim())
    gap = torch.stack([(value - kink).abs() for kink in kinks]).amin(0)
    norms = torch.stack([rows.square().sum(-1).sqrt(), rows.abs().sum(-1)])
    return torch.where(norms > 0, gap / norms, torch.inf)


def assert_distances(network, x, expected):
    """Every distance is the dense one, under the operation's name."""
    found = abm.kink_distances(network, x).distances
    assert list(found) == list(expected)
    for name, distances in expected.items():
        assert_close(found[name], distances, rtol=1e-9, atol=1e-12)


# distances to kinks


def test_distances_of_relu_and_leaky_relu(traced_case):
    """Every unit before an activation has the distance of the dense Jacobian in both norms."""
    traced = traced_case("plain-conv-chain")
    x = traced_case("plain-conv-chain").x[0]
    assert_distances(
        traced.network, x, {"1": dense(traced.model[:1], x), "3": dense(traced.model[:3], x)}
    )


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("mlp-on-flat-inputs", (2, 4)),
        ("conv-in-one-dimension", (2,)),
        ("linear-with-positions", (1,)),
    ],
)
def test_distances_of_other_inputs(traced_case, name, gates):
    """Flat inputs, one dimension, positions."""
    traced = traced_case(name)
    x = traced.x[0]
    assert_distances(traced.network, x, {str(n): dense(traced.model[:n], x) for n in gates})


def test_distances_of_functions_with_two_kinks(traced_case):
    """The nearer kink of a clamp counts: ReLU6 at 0 and 6, bounds on either side, a bound alone."""
    traced = traced_case("saturated-on-both-sides")
    net = traced.model
    x = traced.x[0]

    def before(last):
        def run(z):
            z = net.conv1(4 * z)
            z = z if last < 1 else 20 * net.conv2(F.hardtanh(z, -0.7, 0.9))
            z = z if last < 2 else net.conv3(F.relu6(z))
            return z if last < 3 else net.fc(torch.clamp(z, -0.3, 1.2).flatten(1))

        return run

    kinks = {
        "conv1.hardtanh": (-0.7, 0.9),
        "relu6": (0, 6),
        "conv3.clamp": (-0.3, 1.2),
        "output": (0.1,),
    }
    assert_distances(
        traced.network,
        x,
        {name: dense(before(n), x, at) for n, (name, at) in enumerate(kinks.items())},
    )


def test_distances_of_max_pooling(traced_case):
    """Every element of every window: the zero of its difference to the winner."""
    traced = traced_case("max-pool-with-overlap-padding-and-ceil")
    x = traced.x[0]
    conv = traced.model[0]
    found = abm.kink_distances(traced.network, x).distances
    for n, (i, j) in enumerate(product(range(3), range(3))):

        def gap(z, i=i, j=j):
            maps = F.pad(conv(z), (1, 2, 1, 2), value=-torch.inf)
            pooled = F.max_pool2d(conv(z), 3, 2, padding=1, ceil_mode=True)
            element = maps[:, :, i::2, j::2][:, :, : pooled.shape[2], : pooled.shape[3]]
            return torch.where(element.isinf(), 0, pooled - element)

        assert_close(found[f"1[{n}]"], dense(gap, x), rtol=1e-9, atol=1e-12)


def test_distances_of_maxima():
    """Two values, and all elements of a dimension: zeros of the differences."""

    def forward(net, x):
        x = net.first(x)
        return torch.maximum(x[:, :2], x[:, 2:]).amax((2, 3))

    model, images = make(lambda: (Net(forward, first=nn.Conv2d(1, 4, 3)), (1, 5, 5)))
    network = abm.trace(model, images)
    x = images[0]

    def larger(z):
        return torch.maximum(model.first(z)[:, :2], model.first(z)[:, 2:])

    gaps = {
        "maximum": dense(lambda z: model.first(z)[:, :2] - model.first(z)[:, 2:], x),
        "output": dense(lambda z: larger(z).amax((2, 3), keepdim=True) - larger(z), x),
    }
    assert_distances(network, x, gaps)


def test_dead_units_are_infinitely_far(traced_case):
    """What no step moves has no kink to reach: windows of dead channels, units behind them."""
    model, images = make(
        lambda: (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()), (3,))
    )
    model[0].bias.data.fill_(-100)
    found = abm.kink_distances(abm.trace(model, images), images[0])
    assert found.distances["3"].eq(torch.inf).all()
    assert found.nearest("l2").name == "1"
    traced = traced_case("dead-units")
    pooled = abm.kink_distances(traced.network, traced.x[0]).distances["2[0]"]
    assert pooled[:, [0, 2]].eq(torch.inf).all()
    assert pooled[:, 1].isfinite().any()


def test_image_on_a_kink_has_distance_zero():
    """Pixels that tie in a max pooling are where a region ends."""
    model, images = make(lambda: (nn.MaxPool2d(2), (1, 4, 4)))
    images[0, 0, 0, :2] = 9
    found = abm.kink_distances(abm.trace(model, images), images[0])
    assert min(float(found.distances[f"output[{n}]"][0, 0, 0, 0]) for n in range(4)) == 0
    assert found.nearest("l2").distance("l2") == 0


def test_nearest_kink_does_not_trust_the_sweep(traced_case):
    """The nearest kink is found even if the sweep gives too small distances to immovable units."""
    traced = traced_case("dead-units")
    found = abm.kink_distances(traced.network, traced.x[0])
    right = found.nearest("l2")
    wrong = {name: torch.where(part.isinf(), 0, part) for name, part in found.distances.items()}
    assert any(part.eq(0).any() for part in wrong.values())
    again = replace(found, distances=wrong).nearest("l2")
    assert (again.name, again.unit) == (right.name, right.unit)


def test_model_that_casts_is_swept_in_its_own_dtype():
    """Where nothing can be computed in float32, the nearest kink is still that of float64."""
    model, images = make(
        lambda: (
            Net(lambda net, x: net.conv(x.double()).relu(), conv=nn.Conv2d(1, 2, 3)),
            (1, 5, 5),
        )
    )
    network = abm.trace(model, images)
    assert not network.is_computed_in(torch.float32)
    own, swept = (
        abm.kink_distances(network, images[0], sweep=sweep).nearest("l2")
        for sweep in (None, torch.float32)
    )
    assert (own.unit, own.distance("l2")) == (swept.unit, swept.distance("l2"))


def test_network_without_kinks_has_no_nearest():
    """An affine network is one region."""
    model, images = make(lambda: (nn.Linear(3, 2), (3,)))
    found = abm.kink_distances(abm.trace(model, images), images[0])
    assert (found.distances, found.unmeasured) == ({}, ())
    assert found.nearest("l2") is None


@pytest.mark.parametrize("sweep", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*CASES, *PIECEWISE])
def test_region_ends_at_the_nearest_kink(traced_case, name, sweep):
    """The pattern is the same just before the nearest kink, and another just after it."""
    traced = traced_case(name)
    for x, norm in product(traced.x, NORMS):
        found = abm.kink_distances(traced.network, x)
        kink = abm.kink_distances(traced.network, x, sweep=sweep).nearest(norm)
        assert kink is not None
        (reached,) = reach(traced.network, [kink], norm)
        assert reached.ends_region, (kink.name, kink.unit, kink.at, reached)
        least = min(
            float(distances[NORMS.index(norm)].min()) for distances in found.distances.values()
        )
        assert reached.distance == pytest.approx(least, rel=1e-8)
        assert found.unmeasured == ()


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_named_as_unmeasured(traced_case, name):
    """Comparisons are no kinks that are measured, and the result says so."""
    traced = traced_case(name)
    assert abm.kink_distances(traced.network, traced.x[0]).unmeasured != ()


def test_gate_of_the_users_own_is_unmeasured(traced_case, monkeypatch):
    """A rule whose kinks nobody knows is not taken for one without kinks."""

    class Own(Gate):
        def slope(self, c, scale):
            return (c > scale).to(c.dtype)

    monkeypatch.setitem(RULES, "aten.relu.default", Own)
    model, images = make(lambda: (nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (3,)))
    found = abm.kink_distances(abm.trace(model, images, audit=False), images[0])
    assert (found.distances, found.unmeasured) == ({}, ("1",))


def test_gap_is_linear_with_its_adjoint():
    """Dot test of the difference to a maximum, with and without a missing dimension."""
    for dims, shape in (((), (2, 3)), ((2,), (2,))):
        a, b, g = (torch.randn(4, *s, dtype=torch.float64) for s in (shape, (2, 3), (2, 3)))
        first, second = Gap(dims).adjoint((), g, [shape, (2, 3)])
        assert_close(
            (Gap(dims).forward((), a, b) * g).sum(), (a * first).sum() + (b * second).sum()
        )


def test_several_images_are_refused(traced_case):
    """Each image has a region of its own."""
    traced = traced_case("plain-conv-chain")
    with pytest.raises(
        ValueError, match=r"x must be one image: each has a linear region of its own. Got 2"
    ):
        abm.kink_distances(traced.network, traced.x)


# planes


def test_steps_end_on_the_plane():
    """The shortest steps lead onto the plane and are as long as the distance."""
    x, weights = torch.randn(2, 3, 4, dtype=torch.float64)
    plane = Plane(x, weights, 0.7)
    for norm, order in (("l2", 2), ("linf", torch.inf)):
        step = plane.step(norm)
        assert Plane(x + step, weights, 0.7).value == pytest.approx(0, abs=1e-14)
        assert float(torch.linalg.vector_norm(step, order)) == pytest.approx(plane.distance(norm))


def test_plane_without_weights_cannot_be_reached():
    """Its distance is infinite and it has no step; other norms are refused."""
    plane = Plane(torch.ones(2), torch.zeros(2), 1.0)
    assert plane.distance("linf") == float("inf")
    with pytest.raises(ValueError, match=r"must have weights. Got zeros"):
        plane.step("l2")
    with pytest.raises(ValueError, match=r"norm must be one of l2, linf. Got 'l1'"):
        plane.distance("l1")


# class boundaries


def classifier():
    """A small classifier of maps."""
    layers = [
        nn.Conv2d(3, 3, 3),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    ]
    return nn.Sequential(*layers), (3, 6, 6)


@pytest.fixture(scope="module")
def classes():
    """A traced classifier and two images."""
    model, images = make(classifier)
    return model, images, abm.trace(model, images)


def test_boundary_is_the_difference_of_two_outputs(classes):
    """Weights are the difference of two Jacobian rows; the value is the model's own margin."""
    model, images, network = classes
    for x in images:
        rows = torch.func.jacrev(lambda z: model(z[None])[0])(x).detach()
        between = abm.boundary(network, x, 2, 0)
        assert_close(between.weights, rows[2] - rows[0])
        out = model(x[None])[0].detach()
        assert between.value == pytest.approx(float(out[2] - out[0]), rel=1e-11)
        assert between.distance("l2") == pytest.approx(
            abs(between.value) / float((rows[2] - rows[0]).norm())
        )
        assert between.distance("linf") == pytest.approx(
            abs(between.value) / float((rows[2] - rows[0]).abs().sum())
        )


def test_boundary_in_pixels_through_the_normalisation(classes):
    """Equations 2.14 and 2.15: weights are H / std, and the sign in pixels is the margin's."""
    model, images, network = classes
    prepare = models.Normalise()
    x = images[0].sigmoid()
    between = abm.boundary(network, x, 1, 3, prepare)
    normalised = abm.boundary(network, prepare(x), 1, 3)
    mean = prepare.mean.double()
    std = prepare.std.double()
    assert_close(between.weights, normalised.weights / std)
    assert between.offset == pytest.approx(
        normalised.offset - float((normalised.weights * mean / std).sum())
    )
    step = between.step("l2")
    for factor in (0.0, 1e-4):
        pixels = x + factor * step
        out = model(prepare(pixels)[None])[0].detach()
        assert float((pixels * between.weights).sum()) + between.offset == pytest.approx(
            float(out[1] - out[3]), rel=1e-9
        )


def test_boundary_in_pixels_is_that_of_the_whole_traced_together(classes):
    """Normalisation inside the network, its constants entries of b, gives the same plane."""
    model, images, network = classes
    prepare = models.Normalise().double()
    x = images[0].sigmoid()
    whole = abm.trace(nn.Sequential(prepare, model).eval(), images)
    ours = abm.boundary(network, x, 0, 1, prepare)
    theirs = abm.boundary(whole, x, 0, 1)
    assert_close(ours.weights, theirs.weights)
    assert ours.offset == pytest.approx(theirs.offset)
    (through,) = reach(network, [ours], "linf", prepare)
    (alone,) = reach(whole, [theirs], "linf")
    assert through.in_region == alone.in_region
    assert_close(through.after.outputs, alone.after.outputs)


def test_map_that_is_not_affine_is_refused(classes):
    """A boundary in pixels through a curve would be wrong."""
    _, images, network = classes
    with pytest.raises(
        ValueError, match=r"prepare must be an affine map of the pixels. Got a margin of"
    ):
        abm.boundary(network, images[0], 0, 1, lambda x: x**3)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 4), (-1, 0)])
def test_classes_that_are_none_are_refused(classes, first, second):
    """Two different classes of the network."""
    _, images, network = classes
    with pytest.raises(
        ValueError, match=rf"Two classes must be different, from 0 to 3. Got {first} and {second}"
    ):
        abm.boundary(network, images[0], first, second)


def test_output_with_positions_has_no_classes(traced_case):
    """A map is no list of classes."""
    traced = traced_case("no-bias")
    with pytest.raises(ValueError, match=r"one number for each class. Got shape \(2, 2, 2\)"):
        abm.analyse(traced.network, traced.x[0])


def test_analysis_of_images(classes):
    """Predicted class, nearest kink, ordered boundaries; steps confirm those in the region."""
    model, images, network = classes
    inside = 0
    for x in images:
        found = abm.analyse(network, x)
        assert found.predicted == int(model(x[None])[0].argmax())
        for norm in NORMS:
            assert found.kinks[norm].ends_region
            reached = found.boundaries[norm]
            assert sorted(r.plane.second for r in reached) == [
                c for c in range(4) if c != found.predicted
            ]
            assert [r.distance for r in reached] == sorted(r.distance for r in reached)
            for r in reached:
                inside += r.in_region
                if r.distance < found.kinks[norm].distance:
                    assert r.in_region
                if r.in_region:
                    assert r.plane.margin(r.before) > 0 > r.plane.margin(r.after)
    assert inside < 4 * 3 * len(NORMS)


def test_only_the_nearest_boundaries_may_be_stepped_to(classes):
    """The first ones of all, in each norm."""
    _, images, network = classes
    few = abm.analyse(network, images[0], most=2)
    every = abm.analyse(network, images[0])
    for norm in NORMS:
        assert [r.distance for r in few.boundaries[norm]] == [
            r.distance for r in every.boundaries[norm][:2]
        ]


def test_boundary_in_the_region_changes_the_class():
    """Far from all kinks the class changes between the two points beside the boundary."""
    model, images = make(lambda: (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)))
    model[0].bias.data.copy_(torch.tensor([50.0, 50, 50, -50, -50, -50]))
    model[2].bias.data.copy_(
        -model[2](model[0](images[:1]).relu())[0] + model[2].bias + torch.tensor([0.0, 0.1, 0.2])
    )
    found = abm.analyse(abm.trace(model, images), images[0])
    assert found.predicted == 2
    for norm in NORMS:
        for reached in found.boundaries[norm]:
            assert reached.in_region
            assert not reached.ends_region
            assert reached.plane.margin(reached.before) > 0 > reached.plane.margin(reached.after)


def test_boundary_that_no_step_reaches_is_left_out():
    """Where nothing of the image is left, no class can be reached in the region."""
    model, images = make(lambda: (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)))
    model[0].bias.data.fill_(-50)
    found = abm.analyse(abm.trace(model, images), images[0])
    assert found.boundaries == {"l2": [], "linf": []}
    assert found.kinks["l2"].ends_region


def test_network_of_one_output_has_no_boundaries():
    """One number has no other class; its kinks are measured all the same."""
    model, images = make(lambda: (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)), (4,)))
    found = abm.analyse(abm.trace(model, images), images[0])
    assert (found.predicted, found.boundaries) == (0, {"l2": [], "linf": []})
    assert found.kinks["linf"].ends_region


# effective fields and sparsity


@pytest.mark.parametrize(
    "name", ["plain-conv-chain", "stride-dilation-groups", "dead-units", "conv-in-one-dimension"]
)
def test_effective_fields_by_brute_force(traced_case, name):
    """Box and share of the non-zero weights, against the dense hyperplane of each unit."""
    traced = traced_case(name)
    layer = [layer.name for layer in traced.network.layers.values() if "RM4" in layer.modes][-1]
    planes = abm.hyperplanes(traced.network, traced.x, layer, "RM2")
    fields = abm.effective_fields(planes)
    axes = traced.x.dim() - 2
    used = planes.image.ne(0).any(-1 - axes)
    declared = fields.theoretical.prod(-1)
    assert_close(fields.used, used.flatten(-axes).sum(-1) / declared.double())
    for place in product(*map(range, planes.value.shape)):
        pixels = used[place].nonzero()
        box = (
            pixels.amax(0) - pixels.amin(0) + 1
            if len(pixels)
            else torch.zeros(axes, dtype=torch.int64)
        )
        assert fields.effective[place].tolist() == box.tolist()
    assert fields.used.max() <= 1
    assert (fields.effective <= fields.theoretical).all()


def test_effective_field_of_a_class_is_held_against_the_whole_image(classes):
    """RM0 has no positions: the theoretical field is the image."""
    _, images, network = classes
    fields = abm.effective_fields(abm.hyperplanes(network, images, "5", "RM0"))
    assert fields.theoretical.tolist() == [[6, 6]] * 4
    assert fields.used.shape == (2, 4)


def test_fields_of_flat_images_are_refused(traced_case):
    """Numbers without positions have no field."""
    traced = traced_case("mlp-on-flat-inputs")
    planes = abm.hyperplanes(traced.network, traced.x, "3", "RM0")
    with pytest.raises(ValueError, match=r"images with positions. Got images of shape \(6,\)"):
        abm.effective_fields(planes)


SPARSE = (
    "plain-conv-chain no-bias stride-dilation-groups dead-units max-pool-with-ties "
    "conv-in-one-dimension reused-module"
)


@pytest.mark.parametrize("name", [*SPARSE.split(), "transposed-conv", "conv3d"])
def test_sparsity_by_brute_force(traced_case, name):
    """Counts over both images are those of all dense RM4 hyperplanes."""
    traced = traced_case(name)
    found = abm.sparsity(traced.network, traced.x)
    for layer, counts in found.items():
        planes = abm.hyperplanes(traced.network, traced.x, layer, "RM4")
        axes = traced.x.dim() - 2
        used = planes.image.ne(0).any(-1 - axes).flatten(-axes).sum(-1)
        pixels = abm.effective_fields(planes).theoretical.prod(-1).expand_as(used)
        assert counts.hyperplanes == used.numel()
        assert counts.zero == int((used == 0).sum())
        assert counts.full == int((used == pixels).sum())
        assert (counts.used, counts.pixels) == (int(used.sum()), int(pixels.sum()))
        assert counts.zero_share == counts.zero / used.numel()
    assert found


def test_sparsity_of_images_adds_up(traced_case):
    """Counts of a batch are the sums of its images' counts."""
    traced = traced_case("dead-units")
    both = abm.sparsity(traced.network, traced.x)
    total = abm.sparsity(traced.network, traced.x[0])
    for name, counts in abm.sparsity(traced.network, traced.x[1]).items():
        total[name].merge(counts)
    assert total == both
    assert 0 < both["3"].zero_share < 1


def test_progress_of_the_sweeps_is_reported(traced_case):
    """The callback hears a rising share that ends at one."""
    traced = traced_case("stride-dilation-groups")
    heard = []
    abm.sparsity(traced.network, traced.x, report=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1)
    assert len(heard) >= 4


def test_layers_without_kernels_have_no_sparsity(traced_case):
    """RM4 is a convolution's."""
    traced = traced_case("plain-conv-chain")
    with pytest.raises(ValueError, match=r"Layer '1' has the modes RM2, RM1. Got 'RM4'"):
        abm.sparsity(traced.network, traced.x, ["1"])
