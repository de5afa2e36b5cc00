"""Exact integrated gradients: sums, fine sampling of autograd, jumps, batches and messages."""

import pytest
import torch
from cases import CASES, OPERATIONS
from checks import assert_close

import adjointbackmap as abm

JUMPING = ("sign", "where", "hard-shrink", "unpooling", "mask-as-factor", "place-of-the-largest")


@pytest.mark.parametrize("name", [*CASES, *OPERATIONS])
def test_pixels_and_jumps_sum_to_the_change(traced_case, name):
    """To 1e-11 of the sum of absolute contributions, for every unit of the output."""
    traced = traced_case(name)
    found = abm.integrated_gradients(traced.network, traced.x[0], traced.x[1])
    own = traced.model(traced.x).detach()
    change = own[:1] - own[1:]
    planes = abm.hyperplanes(traced.network, traced.x[:1] * 0, "output")
    assert found.change.shape == planes.value.shape
    assert_close(found.change.flatten().sort()[0], change.flatten().sort()[0])
    assert float(found.error().max()) <= 1e-11
    assert not found.bias.any()
    if name in JUMPING:
        assert float(found.jumps.abs().max()) > 1e-3


def test_a_fine_sum_of_gradients_comes_near(traced_case):
    """The midpoint rule of the model's own gradient with ever more steps, as far as it gets."""
    traced = traced_case("residual-with-zero-padded-channels")
    x, start = traced.x
    exact = abm.integrated_gradients(traced.network, x, start, units=(1,)).image[0]
    errors = []
    for steps in (10, 100, 1000):
        t = (torch.arange(steps).double() + 0.5) / steps
        points = torch.lerp(start, x, t.view(-1, 1, 1, 1)).requires_grad_()
        (gradient,) = torch.autograd.grad(traced.model(points)[:, 1].sum(), points)
        errors.append(float(((x - start) * gradient.mean(0) - exact).abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize("mode", ["RM4", "RM3", "RM2", "RM1"])
@pytest.mark.parametrize("name", ["max-pool-with-ties", "sign-before-conv"])
def test_hidden_units_of_every_mode(mode, name):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3),
        Sign() if name == "sign-before-conv" else torch.nn.MaxPool2d(3, 1),
        torch.nn.Conv2d(2, 3, 2),
        torch.nn.ReLU(),
    )
    model = model.double().eval()
    x = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)).double()
    network = abm.trace(model, x)
    found = abm.integrated_gradients(network, x, 0.25, layer="2", mode=mode)
    before, after = (abm.hyperplanes(network, z, "2", mode) for z in (0 * x + 0.25, x))
    assert_close(found.change, after.value - before.value, rtol=1e-12, atol=1e-12)
    assert float(found.error().max()) <= 1e-11
    assert found.image.shape == (2, *found.units.shape, 1, 7, 7)


class Sign(torch.nn.Module):
    """A function that jumps."""

    def forward(self, x):
        return x + 0.3 * torch.sign(x - 0.1)


def test_batches_and_units_of_each_image(traced_case):
    traced = traced_case("residual-with-zero-padded-channels")
    both = abm.integrated_gradients(traced.network, traced.x, 0.1)
    for n, x in enumerate(traced.x):
        alone = abm.integrated_gradients(traced.network, x, torch.full_like(x, 0.1))
        assert_close(both.image[n], alone.image[0], rtol=0, atol=1e-13)
    predicted = abm.integrated_gradients(traced.network, traced.x, 0.1, units="predicted")
    largest = traced.model(traced.x).argmax(1)
    assert_close(predicted.image, both.image[[0, 1], largest], rtol=0, atol=1e-13)


def test_arguments_that_do_not_fit(traced_case):
    traced = traced_case("residual-with-zero-padded-channels")
    three = torch.cat([traced.x, traced.x[:1]])
    with pytest.raises(ValueError, match=r"baseline must be one image, or 2 as the images\. Got 3"):
        abm.integrated_gradients(traced.network, traced.x, three)
    with pytest.raises(ValueError, match=r"must fit in memory=1kB\. It needs .* choose fewer"):
        abm.integrated_gradients(traced.network, traced.x, memory="1kB")
