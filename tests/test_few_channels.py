"""The adjoint of a convolution with few in-channels, computed in squares of positions."""

from itertools import product

import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap.rules import few_channels, kernels

GEOMETRIES = [(k, s, p) for k, s, p in product((1, 2, 3, 7), (1, 2, 3), (0, 1, 3)) if p < k]


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
def test_squares_give_the_adjoint(kernel, stride, padding):
    """For every size of a square, also where the last positions are read by no output."""
    conv = nn.Conv2d(3, 5, kernel, stride, padding, bias=False).double()
    x = torch.rand(2, 3, 12, 11).double().requires_grad_()
    cotangent = torch.randn_like(conv(x))
    (expected,) = torch.autograd.grad(conv(x), x, cotangent)
    geometry = ([stride] * 2, [padding] * 2)
    for square in (1, 2, 3):
        weight = conv.weight.detach()
        found = few_channels.back_in_squares(weight, *geometry, cotangent, (3, 12, 11), square)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_squares_are_taken_for_few_channels_only():
    """For three channels and a stride, or one channel; not for those that fill the lanes."""
    squares = {c: few_channels.square_of(torch.rand(64, c, 7, 7), [2, 2]) for c in (1, 3, 16)}
    assert squares[1] > 1
    assert squares[3] == 1
    assert squares[16] == 0


def test_first_layer_in_squares_reconstructs(monkeypatch):
    """In float32 through a network, and the same hyperplanes as from the plain adjoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    x = torch.rand(2, 3, 16, 16)
    network = abm.trace(model.eval(), x)
    plain = abm.hyperplanes(network, x, "3", "RM0")
    called = []

    def counted(*args):
        called.append(args)
        return few_channels.back_in_squares(*args)

    monkeypatch.setattr(kernels, "SMALLEST", 1)
    monkeypatch.setattr(kernels, "back_in_squares", counted)
    found = abm.hyperplanes(network, x, "3", "RM0")
    assert called
    abm.reconstruction_test(found)
    torch.testing.assert_close(found.image, plain.image, rtol=1e-5, atol=1e-6)
