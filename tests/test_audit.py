"""The audit passes on every network; a wrong trace fails it, with the layer and the operation."""

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make, small_resnet
from torch import nn

import adjointbackmap as abm
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.rules.linear import BatchNorm
from adjointbackmap.rules.piecewise import Clamp, LeakyReLU
from adjointbackmap.rules.pooling import AveragePooling, MaxPooling

LIMITS = {torch.float64: 1e-13, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_audit_passes_on_every_network(traced, dtype):
    """Every layer once, in the order of the network, equal to rounding."""
    errors = abm.audit(traced.network, traced.x, dtype=dtype)
    assert list(errors) == [layer.name for layer in traced.network.distinct_layers()]
    assert max(errors.values()) <= LIMITS[dtype]


def test_audit_passes_on_every_operation(operation):
    """The same for one network around each operation."""
    assert max(abm.audit(operation.network, operation.x).values()) <= LIMITS[torch.float64]


# rules that are wrong


def without_bias(monkeypatch):
    """A convolution that forgets its bias."""
    build = Kernel.build.__func__

    def wrong(cls, builder, x, weight, bias=None, *rest, **kwargs):
        return build(cls, builder, x, weight, None, *rest, **kwargs)

    monkeypatch.setattr(Kernel, "build", classmethod(wrong))


def without_mean(monkeypatch):
    """A batch norm whose shift forgets the mean."""
    build = BatchNorm.build.__func__

    def wrong(cls, builder, x, gamma, beta, mean, *rest):
        return build(cls, builder, x, gamma, beta, replace(mean, tensor=0 * mean.tensor), *rest)

    monkeypatch.setattr(BatchNorm, "build", classmethod(wrong))


def other_slope(monkeypatch):
    """A leaky ReLU with a slope of its own."""
    monkeypatch.setattr(
        LeakyReLU, "slope", lambda self, c, scale: torch.where(c > 0, 1.0, 0.25).to(c.dtype)
    )


def padding_counted(monkeypatch):
    """An average that counts the padding."""

    def wrong(self, gates, *tangents):
        return self.op(tangents[0], *(True if i == 4 else a for i, a in enumerate(self.args)))

    monkeypatch.setattr(AveragePooling, "forward", wrong)


def without_bounds(monkeypatch):
    """A clamp that is zero where it is saturated."""
    monkeypatch.setattr(Clamp, "entries", lambda self: [])


def first_place_wins(monkeypatch):
    """A max pooling whose winner is always the first position of the map."""
    gates = MaxPooling.gates
    monkeypatch.setattr(
        MaxPooling, "gates", lambda self, scale, x: tuple(0 * g for g in gates(self, scale, x))
    )


PLANTED = {
    without_bias: ("plain-conv-chain", r"'0' \(Conv2d\), made by conv2d:"),
    without_mean: (
        "conv-with-bias-before-batch-norm",
        r"'1' \(BatchNorm2d\), made by _native_batch_norm_legit_no_training:",
    ),
    other_slope: ("plain-conv-chain", r"'3' \(LeakyReLU\), made by leaky_relu:"),
    padding_counted: ("average-pool-with-ceil", r"'3' \(AvgPool2d\), made by avg_pool2d:"),
    without_bounds: ("saturated-on-both-sides", r"'conv2' \(Conv2d\), made by hardtanh, conv2d:"),
    first_place_wins: ("max-pool-with-ties", r"'2' \(MaxPool2d\), made by max_pool2d:"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_wrong_rule_makes_the_trace_fail(monkeypatch, plant):
    """A trace is audited by default: the message names the first wrong layer and the operation."""
    name, match = PLANTED[plant]
    plant(monkeypatch)
    with pytest.raises(
        RuntimeError,
        match=r"must repeat the model at every layer to 1e-10\. Got .* first at " + match,
    ):
        abm.trace(*make(name))


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_wrong_rule_is_found_by_a_later_audit(monkeypatch, plant):
    """With ``audit=False`` the trace succeeds; then the audit finds it, in float32 as well."""
    name, match = PLANTED[plant]
    plant(monkeypatch)
    model, x = make(name)
    network = abm.trace(model, x, audit=False)
    for dtype in LIMITS:
        with pytest.raises(RuntimeError, match=match):
            abm.audit(network, x, dtype=dtype)


# a model that was changed behind the trace


def hooked(model):
    """A hook that alters what a layer gives."""
    model[2].register_forward_hook(lambda module, inputs, output: 1.01 * output)


def other_forward(model):
    """Another function under the same name."""
    model[2].forward = lambda x: F.conv2d(x, model[2].weight)


@pytest.mark.parametrize(
    ("change", "what"), [(hooked, "hooks of 2"), (other_forward, r"2\.forward")]
)
def test_change_behind_the_trace_is_named(change, what):
    """A change that no parameter shows is found first, and a new trace passes the audit."""
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    change(model)
    with pytest.raises(RuntimeError, match=f"Changed since: {what}: trace it again"):
        abm.audit(network, x)
    assert max(abm.audit(abm.trace(model, x), x).values()) <= LIMITS[torch.float64]


def test_change_outside_of_the_model_is_found(monkeypatch):
    """What nothing of the model shows: the audit names the first layer that is another now."""
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    convolve = F.conv2d
    shape = model[2].weight.shape
    monkeypatch.setattr(
        F, "conv2d", lambda c, w, *rest: convolve(c, w, *rest) * (1 + 0.01 * (w.shape == shape))
    )
    with pytest.raises(
        RuntimeError, match=r"first at '2' \(Conv2d\), made by conv2d: trace it again, or report"
    ):
        abm.audit(network, x)


def test_random_numbers_in_a_model_are_found():
    """A forward pass that draws numbers is another at every call."""
    model = Net(lambda net, x: net.conv(x) + torch.randn(3, 1, 1), conv=nn.Conv2d(2, 3, 3)).eval()
    with pytest.raises(RuntimeError, match=r"first at 'output' \(output\), made by add"):
        abm.trace(model, torch.rand(1, 2, 5, 5))


# options


def test_tolerance_may_be_set(traced_case):
    """A limit below the rounding is passed by no network, one above everything by all."""
    traced = traced_case("plain-conv-chain")
    with pytest.raises(RuntimeError, match=r"to 0e\+00\. Got"):
        abm.audit(traced.network, traced.x, tolerance=0.0)
    assert abm.audit(traced.network, traced.x, tolerance=1.0) == abm.audit(traced.network, traced.x)


def test_nan_is_an_error(monkeypatch):
    """A difference that is no number does not pass."""
    monkeypatch.setattr(LeakyReLU, "slope", lambda self, c, scale: torch.full_like(c, torch.nan))
    with pytest.raises(RuntimeError, match=r"Got nan first at '3'"):
        abm.trace(*make("plain-conv-chain"))


def test_image_is_checked(traced_case):
    """An image of another shape is refused before anything is computed."""
    with pytest.raises(ValueError, match="x must have shape"):
        abm.audit(traced_case("plain-conv-chain").network, torch.rand(1, 2, 7, 7).double())


def test_time_of_the_audit_is_small():
    """A small part of the trace's own."""
    model, x = make(small_resnet)
    start = time.perf_counter()
    network = abm.trace(model, x, audit=False)
    traced = time.perf_counter() - start
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        abm.audit(network, x[:1])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < traced / 4
