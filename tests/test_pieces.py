"""Piecewise constants and infinities: masks at k, layers without pixels, losing constants."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make
from checks import assert_close, assert_modes_are_sums, assert_reconstructed
from torch import nn

import adjointbackmap as abm

INFINITY = torch.inf


def convolved(operation, **parts):
    """An operation on a convolution's output, on 2 x 6 x 6."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    return Net(lambda net, x: operation(net, net.conv(x)), conv=conv, **parts), (2, 6, 6)


# layers that do not depend on the image


@pytest.fixture(scope="module")
def binarised():
    """A network with layers behind signs, traced, with its model and images."""

    def forward(net, x):
        x = net.conv2(net.sign(net.conv1(x)))
        return net.fc(torch.sign(net.bn(x)).flatten(1)) + net.fc(F.relu(x).flatten(1))

    convs = {
        "conv1": nn.Conv2d(2, 3, 3, padding=1),
        "conv2": nn.Conv2d(3, 2, 3, 2, 1),
        "bn": nn.BatchNorm2d(2),
    }
    sign = Net(lambda net, x: torch.sign(x))
    model, x = make(lambda: (Net(forward, **convs, sign=sign, fc=nn.Linear(18, 3)), (2, 6, 6)))
    return abm.trace(model, x), model, x


def test_binarised_layer_has_an_empty_field_and_every_mode(binarised):
    """By every method that can give it; the image part is zero, and biases alone make the value."""
    network, _, x = binarised
    assert network.layers["conv2"].receptive_field == (0, 0)
    columns = ("basis", "coloured", "windowed")
    for mode, methods in {"RM4": columns, "RM3": (), "RM2": columns, "RM1": ()}.items():
        for method in ("adjoint", *methods):
            planes = abm.hyperplanes(network, x, "conv2", mode, method=method)
            assert not planes.image.any()
            assert_close(planes.reconstruct(), planes.value)


def test_effective_field_of_a_binarised_layer_is_empty(binarised):
    """No pixel could count, and none does."""
    network, _, x = binarised
    fields = abm.effective_fields(abm.hyperplanes(network, x, "conv2"))
    assert not fields.theoretical.any()
    assert not fields.effective.any()
    assert not fields.used.any()


def test_module_that_gives_signs_is_a_layer(binarised):
    """What it gives are numbers: the sign times an entry of 1."""
    network, model, x = binarised
    planes = abm.hyperplanes(network, x, "sign", "RM2")
    assert_close(planes.value, model.conv1(x).sign().movedim(1, -1))
    assert_close(planes.reconstruct(), planes.value)


def test_binarised_network_is_exact(binarised):
    """Every unit of every layer, by sums over all images."""
    network, _, x = binarised
    assert_reconstructed(network, x)
    assert_modes_are_sums(network, x, "conv2")


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
    assert network.biases.names == ("conv1.bias", "conv2.bias", "fc.bias")


def test_module_that_pads_with_an_infinity_is_no_layer():
    """What follows its maximum is one."""
    layers = [
        nn.Conv2d(1, 2, 3),
        nn.ConstantPad2d(1, -INFINITY),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(2, 1, 2),
    ]
    model, x = make(lambda: (nn.Sequential(*layers), (1, 7, 7)))
    network = abm.trace(model, x)
    assert list(network.layers) == ["0", "2", "3", "output"]
    assert_reconstructed(network, x)


def test_kink_against_an_infinite_constant_is_infinitely_far():
    """No step lets a filled place win; the distances of the others are those without it."""
    kept = torch.tensor([True, False, True]).view(3, 1, 1)
    model, x = make(
        lambda: convolved(lambda net, c: torch.where(net.kept, c, -INFINITY).amax(1), kept=kept),
        images=1,
    )
    found = abm.kink_distances(abm.trace(model, x), x).distances["output"]
    others = Net(lambda net, x: net.conv(x)[:, ::2].amax(1), conv=model.conv)
    theirs = abm.kink_distances(abm.trace(others.double().eval(), x), x).distances["output"]
    assert found[:, 1].isinf().all()
    assert_close(found[:, ::2], theirs)


def lost(net, c):
    """A convolution's output without two of its channels, which lose every maximum."""
    return c.masked_fill(torch.tensor([True, False, False]).view(3, 1, 1), -INFINITY)


LEFT_OUT = {
    "sorted away": lambda net, c: lost(net, c).sort(1, descending=True)[0][:, :2],
    "not among the largest": lambda net, c: lost(net, c).topk(2, 1)[0],
    "replaced": lambda net, c: torch.where(torch.isinf(lost(net, c)), 0.3, lost(net, c)),
    "replaced, then convolved": lambda net, c: net.conv(
        torch.where(lost(net, c).isfinite(), lost(net, c), 0.3)[:, :2]
    ),
    "before the first": lambda net, c: F.pad(c, (1, 0), value=-INFINITY).cummax(3)[0][..., 1:],
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_infinity_that_the_data_leaves_out_is_exact(kind):
    """The output may hold it as far as the graph shows; at each image it is looked at."""
    model, x = make(lambda: convolved(LEFT_OUT[kind]))
    network = abm.trace(model, x)
    assert_reconstructed(network, x)
    assert_close(abm.hyperplanes(network, x, "output").value, model(x).movedim(1, -1))


def test_a_mask_that_hides_everything_at_noise_is_held_against_the_example():
    """What is infinite at the trace's own random input may be finite at every image of the user."""

    def forward(net, c):
        dark = c.abs().amax((1, 2, 3), keepdim=True) < 20
        return c.masked_fill(dark, -INFINITY).amax(1)

    model, x = make(lambda: convolved(forward))
    bright = x + 100
    assert_reconstructed(abm.trace(model, bright), bright)
    with pytest.raises(ValueError, match="Every value of amax must be finite"):
        abm.trace(model, x)


# piecewise constant values in the place of constants

WRITTEN = {
    "mask put into a value": lambda net, c: _put(c, [0, 2], (c[:, :2] > 0).to(c.dtype)),
    "value put into a mask": lambda net, c: _put((c > 0).to(c.dtype), [0, 2], c[:, :2]),
    "mask at places of data": lambda net, c: c + (c > 0).to(c.dtype).gather(1, _place(c)),
    "constant at places of data": lambda net, c: (
        c + net.w.expand(c.shape[0], 3, 6, 6).gather(1, _place(c))
    ),
}


def _put(c, channels, values):
    c = c.clone()
    c[:, channels] = values
    return c


def _place(c):
    return c.argmax(1, keepdim=True)


@pytest.mark.parametrize("kind", WRITTEN)
def test_masks_are_taken_as_values(kind):
    """Where an operation writes or takes them."""
    model, x = make(lambda: convolved(WRITTEN[kind], w=torch.randn(1, 3, 1, 1)))
    network = abm.trace(model, x)
    assert_reconstructed(network, x)
    for scale in (1.0, 1 / 8):
        planes = abm.hyperplanes(network, x, "output", scale=scale)
        assert_close(planes.value, model(x).movedim(1, -1))
        assert_close(planes.reconstruct(), planes.value)


REFUSED = {
    "bounds that cross": (
        lambda net, c: c.clamp(0.7, 0.2),
        r"clamp \(its lower bound 0\.7 is above its upper one 0\.2, so that it gives 0\.2 alone",
    ),
    "sorted": (
        lambda net, c: lost(net, c).sort(1)[0],
        r"Every value of sort must be finite",
    ),
    "output": (
        lambda net, c: c.masked_fill(c < 0, -INFINITY),
        r"Every value of masked_fill must be finite.* cut the network before it with until=",
    ),
    "convolved": (
        lambda net, c: net.conv(F.pad(c, (1, 1), value=INFINITY)[:, :2]),
        r"The output must be finite\. Got .* conv2d",
    ),
    "window": (
        lambda net, c: F.max_pool2d(F.pad(c, (2, 2), value=-INFINITY), 2),
        r"Every value of max_pool2d must be finite",
    ),
    "bounds": (
        lambda net, c: c.clamp(min=INFINITY),
        r"clamp \(nothing is between its bounds: leave an infinite bound out\)",
    ),
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
