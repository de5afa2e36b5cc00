"""What is constant on pieces, and what is infinite: masks at k, layers that see no pixel, constants that never win."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make
from checks import assert_close
from torch import nn

import adjointbackmap as abm

INFINITY = torch.inf


def convolved(operation, **parts):
    """An operation on a convolution's output, on 2 x 6 x 6."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    return Net(lambda net, x: operation(net, net.conv(x)), conv=conv, **parts), (2, 6, 6)


# layers that do not depend on the image


def test_binarised_layer_has_an_empty_field_and_every_mode(traced_case):
    """By every method that can give it; the image part is zero, and biases alone make the value."""
    traced = traced_case("binarised")
    layer = traced.network.layers["conv2"]
    assert layer.receptive_field == (0, 0)
    columns = ("basis", "coloured", "windowed")
    for mode, methods in {"RM4": columns, "RM3": (), "RM2": columns, "RM1": ()}.items():
        for method in ("adjoint", *methods):
            planes = abm.hyperplanes(traced.network, traced.x, "conv2", mode, method=method)
            assert not planes.image.any()
            assert_close(planes.reconstruct(), planes.value)


def test_effective_field_of_a_binarised_layer_is_empty(traced_case):
    """No pixel could count, and none does."""
    traced = traced_case("binarised")
    fields = abm.effective_fields(abm.hyperplanes(traced.network, traced.x, "conv2"))
    assert not fields.theoretical.any()
    assert not fields.effective.any()
    assert not fields.used.any()


def test_module_that_gives_signs_is_a_layer(traced_case):
    """What it gives are numbers: the sign times an entry of 1."""
    traced = traced_case("binarised")
    planes = abm.hyperplanes(traced.network, traced.x, "sign", "RM2")
    assert_close(planes.value, traced.model.conv1(traced.x).sign().movedim(1, -1))
    assert_close(planes.reconstruct(), planes.value)


def test_gates_are_there_for_each_image(operation):
    """Also those of a constant mask, so that images may be computed together."""
    for gates in abm.record_pattern(operation.network, operation.x).gates.values():
        assert all(len(gate) == len(operation.x) for gate in gates)


# masks at k

MASKS = {
    "sign": lambda c: torch.where(torch.sign(c) == 1, c, 0.3),
    "mask as numbers": lambda c: torch.where((c > 0).to(c.dtype) == 1, c, 0.3),
    "mask beside data": lambda c: torch.where((c > 0).to(c.dtype) < c + 0.4, c, 0.3),
    "places": lambda c: torch.where(c.argmax(1, keepdim=True) == 2, c, 0.3),
    "places by bits": lambda c: torch.where((c.argmax(1, keepdim=True) & 2) == 2, c, 0.3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [1 / 8, 0.3])
def test_what_is_constant_on_pieces_does_not_scale(mask, scale):
    """At any k the pattern is that of the image itself."""
    model, x = make(lambda: convolved(lambda net, c: mask(c)))
    network = abm.trace(model, x)
    planes = abm.hyperplanes(network, x, "output", scale=scale)
    assert_close(planes.value, model(x).movedim(1, -1))
    assert_close(planes.reconstruct(), planes.value)


# infinite constants


def test_infinite_constant_has_no_entry(traced_case):
    """Every entry of b is finite, and layers that may hold an infinity are none."""
    network = traced_case("infinite-constants").network
    assert network.biases.vector.isfinite().all()
    assert network.biases.names == ("conv1.bias", "conv2.bias", "min", "fc.bias")
    assert "pad" not in network.layers


def test_kink_against_an_infinite_constant_is_infinitely_far():
    """No step lets a filled place win; the distances of the others are those without it."""
    kept = torch.tensor([True, False, True]).view(3, 1, 1)
    model, x = make(lambda: convolved(lambda net, c: torch.where(net.kept, c, -INFINITY).amax(1), kept=kept), images=1)
    found = abm.kink_distances(abm.trace(model, x), x).distances["output"]
    others = Net(lambda net, x: net.conv(x)[:, ::2].amax(1), conv=model.conv)
    theirs = abm.kink_distances(abm.trace(others.double().eval(), x), x).distances["output"]
    assert found[:, 1].isinf().all()
    assert_close(found[:, ::2], theirs)


REFUSED = {
    "output": (
        lambda net, c: c.masked_fill(c < 0, -INFINITY),
        r"The output must be finite\. Got infinite constants .* masked_fill",
    ),
    "convolved": (lambda net, c: net.conv(F.pad(c, (1, 1), value=INFINITY)[:, :2]), r"The output must be finite\. Got .* conv2d"),
    "window": (lambda net, c: F.max_pool2d(F.pad(c, (2, 2), value=-INFINITY), 2), r"Every value of max_pool2d must be finite"),
    "bounds": (lambda net, c: c.clamp(min=INFINITY), r"clamp \(nothing is between its bounds: leave an infinite bound out\)"),
}


@pytest.mark.parametrize(("operation", "match"), REFUSED.values(), ids=REFUSED)
def test_infinity_that_stays_is_refused(operation, match):
    """In one sentence that names the operation."""
    model, x = make(lambda: convolved(operation))
    with pytest.raises(ValueError, match=match):
        abm.trace(model, x)


def test_network_can_be_cut_before_an_infinite_output():
    """As the message says."""
    model, x = make(lambda: convolved(lambda net, c: c.masked_fill(c < 0, -INFINITY)))
    planes = abm.hyperplanes(abm.trace(model, x, until="conv"), x, "conv")
    assert_close(planes.reconstruct(), planes.value)
