"""Units exactly at a kink: no bias and an empty image, where PyTorch's derivative decides."""

import pytest
import torch
from torch import nn

import adjointbackmap as abm

FUNCTIONS = {
    "relu": nn.ReLU(),
    "leaky-relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(init=0.3),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0.0, 1.0),
    "threshold": nn.Threshold(0.0, 0.5),
    "softshrink": nn.Softshrink(0.1),
    "hardshrink": nn.Hardshrink(0.1),
}


class Abs(nn.Module):
    """The absolute value."""

    def forward(self, x):
        return x.abs()


def with_empty_block(size=8):
    """Two images, the first half of whose rows is exactly zero."""
    x = torch.randn(2, 2, size, size, generator=torch.Generator().manual_seed(1)).double()
    x[:, :, : size // 2] = 0
    return x


def network_without_bias(function):
    """Two convolutions without bias, each before the function."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    model = nn.Sequential(first, function, second, function, nn.Flatten(), nn.Linear(192, 3))
    return model.double().eval()


@pytest.mark.parametrize("name", [*FUNCTIONS, "abs"])
def test_derivative_at_an_exact_kink_is_that_of_pytorch(name):
    """H equals autograd's Jacobian where the activation is exactly zero."""
    model = network_without_bias(FUNCTIONS.get(name, Abs()))
    x = with_empty_block()
    assert int((model[0](x) == 0).sum()) >= 48
    network = abm.trace(model, x)
    for layer in ("2", "output"):
        abm.dense_test(abm.operator(network, x, layer), x)
    assert all(check.scaled <= 1e-12 for check in abm.verify(network, x).values())


def test_fault_at_the_kink_is_found(monkeypatch):
    """A ReLU of slope 1 at zero passes every sum; the dense test finds it."""
    from adjointbackmap.rules.piecewise import ReLU

    monkeypatch.setattr(ReLU, "slope", lambda self, c, scale: (c >= 0).to(c.dtype))
    x = with_empty_block()
    network = abm.trace(network_without_bias(nn.ReLU()), x)
    assert all(check.scaled <= 1e-12 for check in abm.verify(network, x).values())
    with pytest.raises(RuntimeError, match="dense test"):
        abm.dense_test(abm.operator(network, x, "2"), x)
