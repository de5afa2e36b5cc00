"""Paths that cancel exactly: the error of right hyperplanes stays at rounding."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net
from torch import nn

import adjointbackmap as abm


def larger(a, b):
    """The larger of two values, built of ReLUs as `min` and `max` often are."""
    return F.relu(a - b) + F.relu(b) - F.relu(-b)


def both_ways(net, x):
    """The same maximum written in two ways: the difference is zero but for rounding."""
    a = net.a(x)
    b = net.b(x)
    return larger(a, b) - larger(b, a)


def back_and_forth(net, x):
    """A value that a scale and its inverse bring back, less itself."""
    a = net.a(x)
    return (a * 3.0 + net.b(x)) / 3.0 - net.b(x) / 3.0 - a


@pytest.fixture(params=[both_ways, back_and_forth], ids=lambda function: function.__name__)
def cancelling(request):
    """A traced network whose output cancels, and its images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(request.param, a=nn.Linear(4, 60), b=nn.Linear(4, 60)).double().eval()
        x = torch.randn(5, 4, dtype=torch.float64)
    return abm.trace(model, x), x


def test_error_of_what_cancels_is_relative_to_what_cancelled(cancelling):
    """A value of 1e-16 where the hyperplane is zero is an error of rounding, not of 1e292."""
    network, x = cancelling
    planes = abm.hyperplanes(network, x, "output", "RM0")
    assert float((planes.reconstruct() - planes.value).abs().max()) > 0
    assert abm.verify(network, x)["output"].scaled <= 1e-12
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_error_that_is_no_rounding_is_still_found(cancelling):
    """A bias that is off by 1e-9 fails, though the terms cancel."""
    network, x = cancelling
    planes = abm.hyperplanes(network, x, "output", "RM0")
    planes.value[:] += 1e-9
    with pytest.raises(RuntimeError, match="reconstruction"):
        abm.reconstruction_test(planes)


def test_dot_test_of_what_cancels_is_relative_to_what_cancelled(cancelling):
    """Forward and adjoint are each a few roundings, and not the same ones."""
    network, x = cancelling
    assert abm.dot_test(abm.operator(network, x, "output"))["error"] <= 1e-12


def test_adjoint_that_is_no_transpose_is_still_found(cancelling, monkeypatch):
    """A wrong adjoint fails the dot test, though the output cancels."""
    network, x = cancelling
    operator = abm.operator(network, x, "output")
    right = type(operator).adjoint

    def wrong(self, cotangent):
        image, bias = right(self, cotangent)
        return image + 1e-6, bias

    monkeypatch.setattr(type(operator), "adjoint", wrong)
    with pytest.raises(RuntimeError, match="dot test"):
        abm.dot_test(operator)
