"""Verification: every unit of every layer, shares, counts, and messages with figures."""

import copy

import pytest
import torch
from cases import make
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine.pattern import pattern_of
from adjointbackmap.exactness import checks as verification
from adjointbackmap.exactness import verification as runs
from adjointbackmap.exactness.layer_check import HISTOGRAM_EDGES, LayerCheck, checks_of
from adjointbackmap.exactness.verification import image_hash
from adjointbackmap.rules.kernels import Linear


@pytest.mark.parametrize("own_bias", [False, True], ids=["without-own-bias", "own-bias"])
def test_every_unit_of_every_layer_is_reproduced(traced, own_bias):
    """In float64 all units are within 1 %, counts are complete, and errors are of rounding."""
    checks = abm.verify(traced.network, traced.x, own_bias=own_bias)
    assert set(checks) == {layer.name for layer in traced.network.distinct_layers()}
    for name, check in checks.items():
        units = 2 * torch.Size(traced.network.layers[name].out_shape).numel()
        assert check.layer == name
        assert check.units == sum(check.histogram) == units
        assert check.share == 1
        assert check.within == check.within_signed == units
        assert check.scaled <= 1e-12
        assert len(check.histogram) == len(HISTOGRAM_EDGES) + 1


def test_every_kernel_is_among_the_layers(traced):
    """Of two layers with equal values one is verified; every convolution and linear call is."""
    checks = abm.verify(traced.network, traced.x[:1])
    assert {layer.name for layer in traced.network.layers.values() if layer.kernel} <= set(checks)


def test_scale_of_the_study_is_the_default(traced_case, monkeypatch):
    """The pattern is taken at k = 1/8 unless asked otherwise."""
    traced = traced_case("plain-conv-chain")
    module = verification
    seen = []

    def spy(network, x, scale, *rest):
        seen.append(scale)
        return pattern_of(network, x, scale, *rest)

    monkeypatch.setattr(module, "pattern_of", spy)
    abm.verify(traced.network, traced.x[:1])
    abm.verify(traced.network, traced.x[:1], scale=0.5)
    assert seen == [1 / 8, 0.5]


def test_zero_units_are_counted(traced_case):
    """Units that are exactly zero: the dead channels after ReLU, with an error of zero."""
    traced = traced_case("dead-units")
    check = abm.verify(traced.network, traced.x, ["1"])["1"]
    assert check.zero == int((traced.model[:2](traced.x) == 0).sum())
    assert check.zero >= 2 * 2 * 16
    assert check.share == 1


def test_layers_may_be_chosen(traced_case):
    """Only the layers that are named, in their order."""
    traced = traced_case("plain-conv-chain")
    assert list(abm.verify(traced.network, traced.x, ["4", "0"])) == ["4", "0"]
    with pytest.raises(ValueError, match=r"A layer must be one of .* Got 'conv9'"):
        abm.verify(traced.network, traced.x, ["conv9"])


def test_progress_is_reported(traced_case):
    """The callback hears a rising share that ends at one."""
    traced = traced_case("plain-conv-chain")
    heard = []
    abm.verify(traced.network, traced.x, report=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1)
    assert len(heard) >= 4


def test_images_add_up(traced_case):
    """Counts of a batch are the sums of its images' counts."""
    traced = traced_case("plain-conv-chain")
    both = abm.verify(traced.network, traced.x)["2"]
    alone = [abm.verify(traced.network, x)["2"] for x in traced.x]
    assert both.units == sum(c.units for c in alone)
    assert both.largest == max(c.largest for c in alone)
    assert both.worst == max(alone, key=lambda check: check.largest).worst
    assert both.worst[0] in {image_hash(x) for x in traced.x}
    assert both.histogram == [a + b for a, b in zip(*(c.histogram for c in alone), strict=True)]


def test_float64_is_more_exact_than_float32():
    """A float32 network in float64 has errors of float64's size; the model stays float32."""
    model, x = make("plain-conv-chain")
    model = model.float()
    x = x.float()
    network = abm.trace(model, x)
    single = abm.verify(network, x)["2"]
    double = abm.verify(network, x, dtype=torch.float64)["2"]
    assert 1e-10 < single.scaled <= 1e-6
    assert double.scaled <= 1e-13
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_altered_model_is_found(monkeypatch):
    """A wrong model shows in the share, the largest error, and the worst unit."""
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    convolve = torch.nn.functional.conv2d
    shape = model[2].weight.shape

    def altered(c, w, *rest):
        out = convolve(c, w, *rest)
        return out.index_fill(1, torch.tensor(3), 1e3) if w.shape == shape else out

    monkeypatch.setattr(torch.nn.functional, "conv2d", altered)
    check = abm.verify(network, x, ["2"], own_bias=True)["2"]
    assert check.share == 0.75
    assert check.scaled > 1e-3
    assert check.worst[1][0] == 3


def test_images_may_be_computed_at_once(traced, monkeypatch):
    """What one batch of images gives is what each image alone gives."""
    alone = abm.verify(traced.network, traced.x)
    monkeypatch.setattr(runs, "images_per_sweep", lambda *given: len(traced.x))
    for name, check in abm.verify(traced.network, traced.x).items():
        assert (check.units, check.within, check.zero) == (
            alone[name].units,
            alone[name].within,
            alone[name].zero,
        )
        assert check.scaled <= 1e-12


# counting


def add(check, *arguments):
    """Merge the errors of some units into a check."""
    for one in checks_of(check.layer, *arguments):
        check.merge(one)


def counted(value, reconstructed, magnitude=None):
    """The counts of a layer with planted values."""
    check = LayerCheck("planted")
    value = torch.tensor([value])
    reconstructed = torch.tensor([reconstructed])
    add(
        check,
        value,
        reconstructed,
        value.abs() if magnitude is None else torch.tensor([magnitude]),
        ["image"],
    )
    return check


def test_signed_share_forgives_negative_errors_and_the_absolute_does_not():
    """Errors of -50 %, -2 %, 0.5 %, 2 %: the signed share counts three, the absolute one."""
    check = counted([1.0, 1.0, 1.0, 1.0], [0.5, 0.98, 1.005, 1.02])
    assert (check.within_signed, check.within, check.units) == (3, 1, 4)
    assert check.share == 0.25


def test_sign_is_that_of_the_relative_error():
    """For a negative value, an overshoot in magnitude is a positive relative error."""
    check = counted([-1.0, -1.0], [-1.5, -0.5])
    assert (check.within_signed, check.within) == (1, 0)


def test_worst_unit_is_found_with_its_image():
    """The place of the largest absolute relative error, over all images added."""
    check = LayerCheck("planted")
    value = torch.ones(2, 3, 2, 2)
    first = value.clone()
    second = value.clone()
    first[1, 2, 0, 1] = 1.1
    second[0, 1, 1, 0] = 0.7
    add(check, value, first, value, ["a", "b"])
    assert check.worst == ("b", (2, 0, 1))
    add(check, value, second, value, ["c", "d"])
    assert check.worst == ("c", (1, 1, 0))
    assert check.largest == pytest.approx(0.3)
    add(check, value, value, value, ["e", "f"])
    assert check.worst == ("c", (1, 1, 0))


def test_scaled_error_is_held_against_the_magnitude():
    """The largest |error| / magnitude, whatever the value itself is."""
    check = counted([1e-9, 1.0], [2e-9, 1.0], [1.0, 1.0])
    assert check.scaled == pytest.approx(1e-9)
    assert check.largest == pytest.approx(1.0)


def test_histogram_counts_between_powers_of_ten():
    """An error falls between the powers of ten around it; zero and NaN are in the outermost."""
    check = counted([1.0] * 3, [1.0, 1.05, 5001.0])
    edges = HISTOGRAM_EDGES
    assert check.histogram[0] == 1
    assert check.histogram[next(i for i, e in enumerate(edges) if e > 0.05)] == 1
    assert check.histogram[-1] == 1
    assert sum(check.histogram) == 3


def test_signed_histogram_is_mirrored_at_zero():
    """Errors of -5 %, 5 %, 2 %, -1e-17, -1e3: one below, two above, one middle, one first."""
    check = counted([1.0, 1.0, 1.0, 1e17, 1.0], [0.95, 1.05, 1.02, 1e17 - 1.0, -1e3])
    middle = len(HISTOGRAM_EDGES)
    step = HISTOGRAM_EDGES.index(1e-2) + 1
    assert (
        check.signed[middle - step],
        check.signed[middle + step],
        check.signed[middle],
        check.signed[0],
    ) == (1, 2, 1, 1)
    assert len(check.signed) == 2 * middle + 1
    assert check.histogram[step] == 3
    assert sum(check.signed) == sum(check.histogram) == 5


def test_units_outside_one_percent_are_explained_by_rounding_or_not():
    """Four units are off by over 1 %: two by the rounding of a cancellation, two are wrong."""
    epsilon = torch.finfo(torch.float32).eps
    value = [1e-6, 1e-6, 0.5, 1e-6, 1.0]
    off = [1e-6 + epsilon, 1e-6 - 15 * epsilon, 0.6, 2e-5, 1.0]
    check = counted(value, off, [1.0] * 5)
    assert (check.units - check.within, check.rounded) == (4, 2)
    assert check.outside == 0.5
    assert counted(value[:2], off[:2], [1.0] * 2).outside == pytest.approx(1e-6)
    assert counted([1.0], [1.0]).outside == 0


def test_sums_in_float64_are_held_against_the_values_as_they_are():
    """A reconstruction in float64 is not rounded to the value's float32 first."""
    check = LayerCheck("planted")
    value = torch.ones(1, 1)
    add(check, value, value.double() + 1e-9, value.double(), ["image"])
    assert check.largest == pytest.approx(1e-9)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_equal_errors_are_placed_by_name_and_unit(order):
    """Whichever comes first; NaN is worse than any number, and of NaNs the same rule holds."""
    for worst in (1.5, float("nan")):
        checks = [LayerCheck("planted") for _ in range(3)]
        for check, name, error in zip(checks, "bac", (worst, worst, 1.1), strict=True):
            add(
                check,
                torch.ones(1, 3),
                torch.tensor([[1.0, error, error]]),
                torch.ones(1, 3),
                [name],
            )
        total = LayerCheck("planted")
        for n in order:
            total.merge(checks[n])
        assert total.worst == ("a", (1,))


def test_nan_is_never_taken_for_small():
    """A NaN among the reconstructed values is outside every share and the worst of all."""
    check = LayerCheck("planted")
    value = torch.ones(1, 3)
    add(check, value, torch.tensor([[1.0, 2.0, 1.0]]), value, ["a"])
    add(check, value, torch.tensor([[1.0, float("nan"), 1.0]]), value, ["b"])
    assert check.scaled != check.scaled
    assert check.largest != check.largest
    assert (check.histogram[-1], check.signed[-1], check.rounded) == (1, 1, 0)
    assert check.worst == ("b", (1,))
    assert (check.within, check.within_signed) == (4, 4)
    add(check, value, value, value, ["c"])
    assert check.scaled != check.scaled


def test_both_zero_is_no_error():
    """A unit that is zero on both sides counts as within, and as zero."""
    check = counted([0.0, 0.0], [0.0, 1e-30])
    assert (check.zero, check.within, check.units) == (2, 1, 2)


# messages


@pytest.fixture
def altered_chain(monkeypatch):
    """A network whose second convolution gives twice what it gave at the trace, and images.

    torch's function is replaced, as a change of the model would be refused at once.
    """
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    convolve = torch.nn.functional.conv2d
    shape = model[2].weight.shape
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda c, w, *rest: convolve(c, w, *rest) * (1 + (w.shape == shape)),
    )
    return network, x


def test_failing_reconstruction_names_the_unit_and_the_figures(altered_chain):
    """The message names the worst unit, its value, every figure and the tolerance."""
    network, x = altered_chain
    planes = abm.hyperplanes(network, x, "2", "RM2")
    expected = (
        r"The reconstruction of unit \[\d, \d, \d, \d\] of 2 \(RM2\), value [-\d.e+]+, "
        r"must have an error of at most 1e-12\. "
        r"Got error [\d.e-]+, relative 0\.5, share 0\."
    )
    with pytest.raises(RuntimeError, match=expected):
        abm.reconstruction_test(planes)
    assert abm.reconstruction_test(planes, tolerance=1.1)["relative"] == pytest.approx(0.5)


def test_failing_dense_test_tells_both_parts(altered_chain):
    """The message tells the image's and the biases' differences."""
    network, x = altered_chain
    with pytest.raises(
        RuntimeError,
        match=r"The dense test must have an error of at most 1e-12\. Got image 0\.5.*, bias 0\.5",
    ):
        abm.dense_test(abm.operator(network, x, "2"), x)


def test_failing_dot_test_tells_both_products(monkeypatch):
    """The message tells <J u | v>, <u | J* v> and their difference."""
    model, x = make("average-pool-with-ceil")
    network = abm.trace(model, x)
    right = Linear.adjoint
    monkeypatch.setattr(Linear, "adjoint", lambda *args: tuple(2 * part for part in right(*args)))
    with pytest.raises(
        RuntimeError, match=r"The dot test must have an error .* Got forward .*, adjoint .*, error "
    ):
        abm.dot_test(abm.operator(network, x, "output"))


def test_figures_are_given_back(traced_case):
    """A passing test returns what it measured."""
    traced = traced_case("plain-conv-chain")
    operator = abm.operator(traced.network, traced.x, "2")
    dot = abm.dot_test(operator, seed=3)
    assert dot.keys() == {"forward", "adjoint", "error"}
    assert dot["forward"] == pytest.approx(dot["adjoint"], rel=1e-12)
    assert dot["forward"] != pytest.approx(abm.dot_test(operator, seed=4)["forward"])
    assert abm.dense_test(operator, traced.x).keys() == {"image", "bias", "error"}
    figures = abm.reconstruction_test(abm.hyperplanes(traced.network, traced.x, "2", "RM4"))
    assert figures.keys() == {"error", "relative", "share"}
    assert figures["share"] == 1


def test_dense_test_takes_the_images_of_its_operator(traced_case):
    """Other images have another Jacobian: the test finds that too."""
    traced = traced_case("plain-conv-chain")
    with pytest.raises(RuntimeError, match="dense test"):
        abm.dense_test(abm.operator(traced.network, traced.x, "4"), -traced.x)


def test_float64_hyperplanes_of_float32_values():
    """The errors are those of the untouched float32 model's values against exact hyperplanes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.25), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    network = abm.trace(model, x)
    found = abm.verify(network, x, dtype=torch.float64, values=torch.float32)
    with torch.no_grad():
        value = model(x).double()
        exact = copy.deepcopy(model).double()(x.double())
    check = found["3"]
    error = ((exact - value) / value)[value != 0].abs().max().item()
    # PyTorch may compute the same float32 value in another order of the sums
    assert error / 10 < check.largest < 10 * error
    assert 1e-9 < check.scaled < 1e-6
    assert check.flipped == 0
    assert abm.verify(network, x, dtype=torch.float64)["3"].scaled < 1e-15


def test_gates_of_the_values_are_kept_and_counted():
    """1e8 + 1 - 1e8 is 0 in float32 and 1 in float64: the gate after it is closed and open."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).eval()
    with torch.no_grad():
        for layer, weight, bias in ((0, 1e8, 1), (1, 1, -1e8), (3, 1, 0.5)):
            model[layer].weight.fill_(weight)
            model[layer].bias.fill_(bias)
    x = torch.ones(1, 1)
    found = abm.verify(
        abm.trace(model, x), x, own_bias=True, dtype=torch.float64, values=torch.float32
    )
    assert [found[name].flipped for name in ("0", "2", "3")] == [0, 1, 1]
    assert found["3"].largest == 0.0
    assert found["1"].within == 0
