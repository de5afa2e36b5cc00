"""Every network of the catalogue is exact in every mode and both ways; planted faults fail."""

import os
from contextlib import contextmanager
from math import prod

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make
from checks import assert_close, assert_modes_are_sums, assert_untouched, snapshot
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine.operators import push
from adjointbackmap.rules.kernels import Convolution, Linear
from adjointbackmap.rules.linear import Add, Multiply, PlacedEntry
from adjointbackmap.rules.piecewise import Hardtanh, LeakyReLU, ReLU
from adjointbackmap.rules.pooling import AveragePooling, MaxPooling


def all_planes(network, x, own_bias, **kwargs):
    """Hyperplanes of all units of every layer in every mode that can have the own bias or not."""
    for layer in network.layers.values():
        for mode in layer.modes:
            merged = mode in ("RM4", "RM3")
            if own_bias != merged and (own_bias or layer.kernel):
                yield (
                    layer,
                    abm.hyperplanes(network, x, layer.name, mode, own_bias=own_bias, **kwargs),
                )
            elif not own_bias and layer.kernel:
                yield layer, abm.hyperplanes(network, x, layer.name, mode, own_bias=False, **kwargs)


# the three tests on every layer of every network


def test_forward_and_adjoint_are_transposes(traced):
    """<J u | v> = <u | J* v> for every layer."""
    for name in traced.network.layers:
        assert abm.dot_test(abm.operator(traced.network, traced.x, name))["error"] <= 1e-12


def test_dense_matrix_is_the_jacobian_of_the_model(traced):
    """The dense matrix of every layer is ``jacrev``'s of the untouched model, biases too."""
    for name in traced.network.layers:
        assert (
            abm.dense_test(abm.operator(traced.network, traced.x, name), traced.x)["error"] <= 1e-12
        )


@pytest.mark.parametrize("own_bias", [True, False], ids=["own-bias", "without-own-bias"])
def test_every_unit_is_reconstructed_in_every_mode(traced, own_bias):
    """<[x; b] | H> is the model's own value for every unit of every mode of every layer."""
    for _, planes in all_planes(traced.network, traced.x, own_bias):
        assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_every_mode_of_a_kernel_was_met(traced_case):
    """The sweep above covers four modes without own bias, and the two that may have it."""
    traced = traced_case("plain-conv-chain")
    met = {
        own: [p.mode for la, p in all_planes(traced.network, traced.x, own) if la.name == "2"]
        for own in (True, False)
    }
    assert met == {True: ["RM2", "RM1"], False: ["RM4", "RM3", "RM2", "RM1"]}


def test_small_resnet_is_exact(traced_case):
    """A ResNet-18: every unit of every layer, and the three tests on some layers."""
    network = traced_case("small-resnet").network
    x = traced_case("small-resnet").x[:1]
    checks = abm.verify(network, x)
    assert {name for name in checks if "conv" in name} >= {
        "conv1",
        "layer1.0.conv2",
        "layer4.1.conv2",
    }
    assert max(check.scaled for check in checks.values()) <= 1e-12
    for name in ("maxpool", "layer2.0.downsample.0", "layer4", "fc"):
        operator = abm.operator(network, x, name)
        assert abm.dot_test(operator)["error"] <= 1e-12
        assert abm.dense_test(operator, x)["error"] <= 1e-12
    for mode in ("RM4", "RM3", "RM2", "RM1"):
        planes = abm.hyperplanes(network, x, "layer3.0.conv1", mode)
        assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_float32_reconstructs_to_its_own_rounding(traced_case):
    """In float32 the scale-aware error is of the order of float32's rounding."""
    traced = traced_case("residual-with-zero-padded-channels")
    model, x = make(traced.name)
    network = abm.trace(model.float(), x.float())
    for name, layer in network.layers.items():
        error = abm.reconstruction_test(abm.hyperplanes(network, x.float(), name, layer.modes[-1]))[
            "error"
        ]
        assert error <= 1e-6


# the factor k


def test_pattern_at_an_eighth_is_bitwise_the_one_at_one(traced):
    """A power of two multiplies every number exactly, so no gate and no winner changes."""
    eighth = abm.record_pattern(traced.network, traced.x, scale=1 / 8)
    assert eighth.equal(abm.record_pattern(traced.network, traced.x))


def test_unequal_patterns_are_told_apart(traced_case):
    """The comparison above can fail: another image has another pattern."""
    traced = traced_case("plain-conv-chain")
    assert not abm.record_pattern(traced.network, -traced.x).equal(
        abm.record_pattern(traced.network, traced.x)
    )


def test_any_scale_gives_the_same_values(traced):
    """k = 0.3 moves no gate beyond rounding: values and hyperplanes stay."""
    mode = traced.network.layers["output"].modes[0]
    one, other = (
        abm.hyperplanes(traced.network, traced.x, "output", mode, scale=k) for k in (1.0, 0.3)
    )
    assert_close(other.reconstruct(), one.value)
    if traced.name != "max-pool-with-ties":  # there H is not unique
        assert_close(other.image, one.image)
        assert_close(other.bias, one.bias)


# the modes


def conv_layers(network):
    """Layers that have all four modes of a convolution."""
    return [layer for layer in network.layers.values() if "RM4" in layer.modes]


def test_modes_are_sums_of_each_other(traced):
    """RM3 = sum_s RM4, RM2 = sum_j RM4, RM1 = sum_j RM3 = sum_s RM2: image, bias and value."""
    for layer in conv_layers(traced.network):
        assert_modes_are_sums(traced.network, traced.x, layer.name)


def test_own_bias_has_one_entry_per_position():
    """The own entry of RM2 is 1 for its channel, that of RM1 the number of positions."""
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    own = network.biases["2.bias"].slice
    rm2, rm1 = (abm.hyperplanes(network, x, "2", mode).bias[..., own] for mode in ("RM2", "RM1"))
    assert torch.equal(rm2, torch.eye(4, dtype=x.dtype).expand_as(rm2))
    assert torch.equal(rm1, 16 * torch.eye(4, dtype=x.dtype).expand_as(rm1))


def test_own_bias_changes_the_own_entry_alone(traced_case):
    """Without own bias, image part and other entries stay, and the own entry is zero."""
    traced = traced_case("plain-conv-chain")
    own = traced.network.biases["2.bias"].slice
    with_, without = (
        abm.hyperplanes(traced.network, traced.x, "2", "RM2", own_bias=o) for o in (True, False)
    )
    assert torch.equal(with_.image, without.image)
    assert not without.bias[..., own].any()
    assert torch.equal(with_.bias[..., : own.start], without.bias[..., : own.start])
    assert_close(
        with_.value - without.value, traced.network.biases["2.bias"].value.expand_as(with_.value)
    )


def test_tangents_and_cotangents_give_the_same_matrix(traced):
    """The columns of [x; b] and the rows of the units give the same matrix, for every layer."""
    n = len(traced.x)
    pixels = traced.x[0].numel()
    length = len(traced.network.biases)
    unit = torch.eye(pixels + length, dtype=traced.x.dtype).expand(n, -1, -1)
    for name in traced.network.layers:
        operator = abm.operator(traced.network, traced.x, name)
        rows = torch.cat(
            [part.reshape(n, prod(operator.out_shape), -1) for part in operator.dense()], 2
        )
        columns = operator.forward(
            unit[..., :pixels].unflatten(2, operator.in_shape), unit[..., pixels:]
        )
        assert_close(columns.flatten(2).mT, rows)


# the model is left as it was


def with_grads(name):
    """A network with a frozen parameter and grads in the others, and its images."""
    model, x = make(name)
    first = next(model.parameters())
    first.requires_grad = False
    model(x).sum().backward()
    return model, x


NETWORKS = [
    "residual-with-zero-padded-channels",
    "reused-module",
    "scalars-before-padded-convs",
    "in-place-relu",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_model_is_left_as_it_was(name):
    """Tracing, computing, verifying and folding leave tensors, grads, flags and hooks alone."""
    model, x = with_grads(name)
    before = snapshot(model)
    image = x.clone()
    network = abm.trace(model, x)
    layer = network.layers["output"]
    abm.hyperplanes(network, x, layer.name, layer.modes[0])
    abm.dense_test(abm.operator(network, x, layer.name), x)
    abm.verify(network, x)
    abm.fold(model, x)
    assert_untouched(model, before)
    assert torch.equal(x, image)


def test_results_carry_no_gradient(traced_case):
    """Results are detached, also where the image asks for a gradient."""
    traced = traced_case("plain-conv-chain")
    x = traced.x.clone().requires_grad_()
    planes = abm.hyperplanes(traced.network, x, "2", "RM2")
    assert not any(
        t.requires_grad for t in (planes.image, planes.bias, planes.value, planes.reconstruct())
    )


class Interrupted(Exception):
    """Raised inside a model's forward."""


BROKEN = "FORWARD_OF_THE_TESTS_FAILS"  # in the environment, which is no part of a model


def fails(net, x):
    """Fail after a part has run, while it is broken.

    Raises:
        Interrupted: If so.
    """
    x = net.conv(x)
    if BROKEN in os.environ:
        raise Interrupted
    return net.act(x)


@contextmanager
def broken():
    """A time in which the forward fails, though nothing of the model changes."""
    os.environ[BROKEN] = "yes"
    try:
        yield
    finally:
        del os.environ[BROKEN]


def failing_model():
    """A model that can be made to fail in the midst of its forward, and an image."""
    model = Net(fails, conv=nn.Conv2d(1, 2, 3), act=nn.ReLU()).double().eval()
    return model, torch.randn(1, 1, 5, 5, dtype=torch.float64)


def test_model_is_left_as_it_was_by_a_failing_trace():
    """An exception during the trace leaves no hook."""
    model, x = failing_model()
    before = snapshot(model)
    with broken(), pytest.raises(ValueError, match="Interrupted"):
        abm.trace(model, x)
    assert_untouched(model, before)


def test_model_is_left_as_it_was_by_a_failing_forward():
    """An exception while values are recorded leaves no hook, and the network works after it."""
    model, x = failing_model()
    network = abm.trace(model, x)
    before = snapshot(model)
    with broken(), pytest.raises(Interrupted):
        abm.hyperplanes(network, x, "conv", "RM2")
    assert_untouched(model, before)
    assert abm.reconstruction_test(abm.hyperplanes(network, x, "conv", "RM2"))["error"] <= 1e-12


# the value comes from the model itself


def test_value_follows_what_is_altered_behind_the_trace(monkeypatch):
    """Another activation after the trace shows in the value and fails the reconstruction.

    torch's function is replaced, as another ``forward`` of the model would be refused at once.
    """
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    plain = abm.hyperplanes(network, x, "4", "RM2")
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda *given, **named: 2 * relu(*given, **named))
    altered = abm.hyperplanes(network, x, "4", "RM2")
    assert torch.equal(altered.reconstruct(), plain.reconstruct())
    assert (altered.value - plain.value).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="reconstruction of unit"):
        abm.reconstruction_test(altered)
    assert abm.verify(network, x, ["4"])["4"].share < 1


def test_value_without_own_bias_is_the_kernel_on_the_recorded_input():
    """Values without own bias are the kernel's own product, bit for bit, not output minus bias."""
    model, x = make("plain-conv-chain")
    model[2].bias.data.fill_(1e12)
    network = abm.trace(model, x)
    planes = abm.hyperplanes(network, x, "2", "RM2", own_bias=False)
    plain = F.conv2d(model[:2](x), model[2].weight)
    assert_close(planes.value, plain.detach().movedim(1, -1))


# planted faults


def doubled(method):
    """A method that gives twice its result."""

    def wrong(*args, **kwargs):
        out = method(*args, **kwargs)
        return tuple(2 * o for o in out) if isinstance(out, tuple) else 2 * out

    return wrong


def without_bias_part(method):
    """An adjoint that loses what goes to the second argument, a bias."""

    def wrong(*args, **kwargs):
        first, *others = method(*args, **kwargs)
        return (first, *(torch.zeros_like(o) for o in others))

    return wrong


def leaking(self, c, scale):
    """ReLU's slope with a leak that PyTorch's has not."""
    return torch.where(c > 0, 1.0, 0.01).to(c.dtype)


def last_winner(self, scale, *inputs):
    """Winners of the smallest instead of the largest."""
    return RIGHT_WINNERS(self, scale, -inputs[0])


RIGHT_WINNERS = MaxPooling.gates
AVERAGE = "average-pool-with-ceil"
CHAIN = "plain-conv-chain"
STRIDED = "stride-dilation-groups"
FORWARD = {"dot", "verify"}
ADJOINT = {"dot", "dense", "reconstruction"}
BOTH = {"dense", "reconstruction", "verify"}
FAULTS = {
    "average-pooling-doubled": (
        AVERAGE,
        AveragePooling,
        "forward",
        doubled(AveragePooling.forward),
        FORWARD,
    ),
    "leaky-slope-doubled": (CHAIN, LeakyReLU, "slope", doubled(LeakyReLU.slope), BOTH),
    "relu-leaks": (CHAIN, ReLU, "slope", leaking, BOTH),
    "wrong-winners": (
        "max-pool-with-overlap-padding-and-ceil",
        MaxPooling,
        "gates",
        last_winner,
        BOTH,
    ),
    "convolution-doubled": (STRIDED, Convolution, "forward", doubled(Convolution.forward), FORWARD),
    "convolution-adjoint-doubled": (
        STRIDED,
        Convolution,
        "back",
        doubled(Convolution.back),
        ADJOINT,
    ),
    "linear-adjoint-doubled": (AVERAGE, Linear, "back", doubled(Linear.back), ADJOINT),
    "bias-doubled": (CHAIN, PlacedEntry, "forward", doubled(PlacedEntry.forward), FORWARD),
    "bias-lost-in-the-adjoint": (CHAIN, Add, "adjoint", without_bias_part(Add.adjoint), ADJOINT),
    "batch-norm-scale-doubled": (
        "conv-with-bias-before-batch-norm",
        Multiply,
        "forward",
        doubled(Multiply.forward),
        FORWARD,
    ),
    "bounds-lost": (
        "saturated-on-both-sides",
        Hardtanh,
        "adjoint",
        without_bias_part(Hardtanh.adjoint),
        ADJOINT - {"dense"},
    ),
}
"""Name -> network, rule, its method, the wrong one, and the tests that must fail."""


def failures(network, x):
    """Which of the public tests fail at the output of a network."""
    layer = network.layers["output"]
    operator = abm.operator(network, x, "output")
    tests = {
        "dot": lambda: abm.dot_test(operator),
        "dense": lambda: abm.dense_test(operator, x),
        "reconstruction": lambda: abm.reconstruction_test(
            abm.hyperplanes(network, x, "output", layer.modes[0])
        ),
        "verify": lambda: abm.verify(network, x, dtype=torch.float64),
    }
    failed = set()
    for name, test in tests.items():
        try:
            found = test()
        except RuntimeError:
            failed.add(name)
        else:
            if name == "verify" and max(check.scaled for check in found.values()) > 1e-12:
                failed.add(name)
    return failed


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(monkeypatch, fault):
    """A wrong rule fails the tests of its direction: forward, adjoint, or the gates of both."""
    name, rule, method, wrong, expected = FAULTS[fault]
    model, x = make(name)
    network = abm.trace(model, x)
    assert failures(network, x) == set()
    monkeypatch.setattr(rule, method, wrong)
    assert failures(network, x) >= expected


def test_lost_entry_of_the_bias_vector_is_found():
    """A bias entry with a wrong value fails the reconstruction and the verification."""
    model, x = make(CHAIN)
    network = abm.trace(model, x)
    entry = network.program().entries[0]
    object.__setattr__(entry, "value", torch.zeros_like(entry.value))
    assert failures(network, x) >= {"reconstruction", "verify"}


def test_target_that_nothing_reaches_has_no_tangent(traced_case):
    """A push without tangents gives nothing rather than zeros of some shape."""
    traced = traced_case(CHAIN)
    target = traced.network.layers["output"].value
    assert push(abm.record_pattern(traced.network, traced.x), {}, [target]) == {target.slot: None}
