"""A pattern that is held: the same results without a second recording, and no other pattern."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine import observe, pattern
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes import query

CONV = "2"


@pytest.fixture(scope="module")
def chain():
    """A network with gates, a pooling and classes, and three images."""
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.LeakyReLU(), nn.MaxPool2d(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 3)).eval()
        x = torch.randn(3, 2, 8, 8)
    return abm.trace(model, x), x


def bits(planes):
    """All numbers of hyperplanes."""
    image = planes.image_part
    image = image.values if isinstance(image, Patches) else image
    return torch.cat([t.flatten() for t in (image, planes.bias, planes.value)])


ASKED = {
    "one-unit": partial(abm.hyperplanes, layer=CONV, mode="RM2", units=(1, 2, 3)),
    "windowed": partial(abm.hyperplanes, layer=CONV, mode="RM2", method="windowed"),
    "coloured": partial(abm.hyperplanes, layer=CONV, mode="RM4", method="coloured"),
    "basis": partial(abm.hyperplanes, layer="6", method="basis"),
    "without-bias": partial(abm.hyperplanes, layer=CONV, mode="RM1", own_bias=False),
    "predicted": partial(abm.hyperplanes, layer="6", mode="RM0", units="predicted"),
}


@pytest.mark.parametrize("name", ASKED)
def test_hyperplanes_are_the_same_to_the_bit(chain, name):
    """For every method, with and without the pattern, at k = 1/8 too."""
    network, x = chain
    for given in ({}, {"scale": "1/8"}, {"dtype": torch.float64}):
        held = abm.record_pattern(network, x[0], **given)
        own = ASKED[name](network, x[0], **given)
        again = ASKED[name](network, x[0], pattern=held, **given)
        assert torch.equal(bits(again), bits(own))


def test_parts_of_a_batch_take_their_part_of_the_pattern(chain):
    """Blocks of one image each, and a batch that the memory divides."""
    network, x = chain
    held = abm.record_pattern(network, x, dtype="float64")
    given = {"dtype": "float64", "pattern": held}
    for memory in ("20kB", "2GiB"):
        blocks = abm.iter_hyperplanes(network, x, CONV, "RM2", memory=memory, **given)
        own = abm.iter_hyperplanes(network, x, CONV, "RM2", memory=memory, dtype="float64")
        for ours, theirs in zip(blocks, own, strict=True):
            torch.testing.assert_close(bits(ours), bits(theirs), rtol=1e-14, atol=1e-14)
    each = torch.tensor([[[0, 0, 1]], [[1, 2, 3]], [[3, 3, 4]]])  # a unit for each image
    ours = abm.hyperplanes(network, x, CONV, units=each, **given)
    for n, unit in enumerate(each[:, 0].tolist()):
        alone = abm.hyperplanes(network, x[n], CONV, units=tuple(unit), dtype="float64")
        torch.testing.assert_close(ours.image[n, 0], alone.image[0], rtol=1e-13, atol=1e-14)


def test_the_map_and_the_region_take_it(chain):
    """operator, boundary, kink_distances and analyse."""
    network, x = chain
    held = abm.record_pattern(network, x)
    cotangent = torch.randn(3, 5, 4, 4)
    for ours, theirs in zip(
        abm.operator(network, x, CONV, pattern=held).adjoint(cotangent),
        abm.operator(network, x, CONV).adjoint(cotangent),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    held = abm.record_pattern(network, x[0], dtype=torch.float64)
    between = abm.boundary(network, x[0], 0, 1, pattern=held)
    assert torch.equal(between.weights, abm.boundary(network, x[0], 0, 1).weights)
    ours = abm.kink_distances(network, x[0], pattern=held)
    theirs = abm.kink_distances(network, x[0])
    assert all(torch.equal(ours.distances[name], d) for name, d in theirs.distances.items())
    assert abm.analyse(network, x[0], pattern=held).predicted == int(network.model(x[:1]).argmax())


def test_the_second_unit_needs_no_forward_pass(chain, monkeypatch):
    """Neither of the model nor of the trace."""
    network, x = chain
    held = abm.record_pattern(network, x[0])
    first = abm.hyperplanes(network, x[0], CONV, units=(0, 0, 0), pattern=held)

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(observe, "record_call", fail)
    monkeypatch.setattr(query, "pattern_of", fail)
    monkeypatch.setattr(pattern, "pattern_of", fail)
    second = abm.hyperplanes(network, x[0], CONV, units=(3, 3, 4), pattern=held)
    assert first.value != second.value
    assert bool(second.relative_error().abs() < 1e-3)


def test_it_keeps_its_own_image(chain):
    """The caller may write into the image later."""
    network, x = chain
    image = x[0].clone()
    held = abm.record_pattern(network, image)
    image.zero_()
    own = abm.hyperplanes(network, x[0], "6")
    assert torch.equal(bits(abm.hyperplanes(network, x[0], "6", pattern=held)), bits(own))
    with pytest.raises(ValueError, match=r"pattern must be of the same .* Got other images"):
        abm.hyperplanes(network, image, "6", pattern=held)


def test_another_pattern_is_refused(chain):
    """By one sentence that names the difference, in every function."""
    network, x = chain
    other = abm.trace(network.model, x)
    held = abm.record_pattern(network, x[0])
    wrong = {
        "other images": (network, x[1], {}),
        "k = 1 where scale = 0.125": (network, x[0], {"scale": 1 / 8}),
        "torch.float32 where torch.float64 is computed": (network, x[0], {"dtype": "float64"}),
        "another network": (other, x[0], {}),
    }
    for got, (traced, image, given) in wrong.items():
        match = f"pattern must be of the same network, images, k and dtype. Got {got}: record"
        for function in (abm.hyperplanes, abm.operator):
            with pytest.raises(ValueError, match=match):
                function(traced, image, layer=OUTPUT, pattern=held, **given)
    for function in (abm.kink_distances, partial(abm.boundary, first=0, second=1), abm.analyse):
        with pytest.raises(ValueError, match=r"pattern must be .* Got torch\.float32 where"):
            function(network, x[0], pattern=held)
    # unwrapped: the tests check types of arguments too
    with pytest.raises(TypeError, match=r"pattern must be from adjointbackmap\.record_pattern"):
        inspect.unwrap(pattern.check_pattern)(x, network, x, 1.0)


def test_a_model_that_changed_is_refused():
    """The pattern is that of the weights at its recording."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.rand(1, 2, 2)
    network = abm.trace(model, x[None])
    held = abm.record_pattern(network, x)
    model[1].weight.data.mul_(2)
    for function in (abm.hyperplanes, abm.operator):
        with pytest.raises(RuntimeError, match=r"as it was traced.*trace it again"):
            function(network, x, layer="3", pattern=held)
