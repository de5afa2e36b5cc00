"""Constants of a float32 model in float64: as in ``model.double()``, with no rounding before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Net
from torch import nn
from torch.nn.utils import prune

import adjointbackmap as abm

MEAN = [0.485, 0.456]
IMAGES = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(function, **parts) -> nn.Module:
    torch.manual_seed(3)
    constants = {
        "b": torch.rand(2, 1, 1),
        "ints": torch.tensor([3, 7])[:, None, None],
        "wide": torch.rand(2, 1, 1).double(),
    }
    return Net(function, **{"conv": nn.Conv2d(2, 3, 3), **constants, **parts}).eval()


CONSTANTS = {
    "list cast like the image": lambda net, x: net.conv(
        x - torch.tensor(MEAN).to(x)[:, None, None]
    ),
    "list in the image's dtype": lambda net, x: net.conv(
        x - torch.tensor(MEAN, dtype=x.dtype, device=x.device)[:, None, None]
    ),
    "list in float32": lambda net, x: net.conv(x - torch.tensor(MEAN)[:, None, None]),
    "full": lambda net, x: net.conv(
        x - torch.full((2, 1, 1), 0.1, dtype=x.dtype) * torch.full_like(x, 0.3)
    ),
    "full in float32": lambda net, x: net.conv(x - torch.full((2, 1, 1), 0.1) * 0.3),
    "range": lambda net, x: net.conv(x * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype) * 0.3),
    "kernel": lambda net, x: F.conv2d(x, torch.full((1, 2, 2, 2), 0.3).to(x.dtype)),
    "integer divisor": lambda net, x: net.conv(x / net.ints),
    "integers divided": lambda net, x: net.conv(
        x * (net.ints / 255) * 0.1 + (net.ints / 255) * 0.1
    ),
    "integers to the image's dtype": lambda net, x: net.conv(
        x * (net.ints.to(x.dtype) / 255) + net.ints
    ),
    "buffer cast": lambda net, x: net.conv(x * net.b.to(x.dtype) * 3 / 7),
    "buffer cast by its type": lambda net, x: net.conv(
        x * net.b.type_as(x) + (-net.b.type_as(x)).exp()
    ),
    "buffer to half precision": lambda net, x: net.conv(x * net.b.half().to(x)),
    "buffer of another dtype": lambda net, x: net.conv(x * (net.wide * 0.1).to(x.dtype)),
    "buffer read": lambda net, x: net.conv(
        x * float(net.b.sum() * 0.1) + (net.b * 3).flatten().tolist()[0]
    ),
    "buffer expanded": lambda net, x: net.conv(x + net.b.expand_as(x)),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_those_of_the_model_in_float64(kind):
    model = net(CONSTANTS[kind])
    network = abm.trace(model, torch.rand(1, 2, 5, 5))
    single = abm.hyperplanes(network, IMAGES.float(), "output", "RM2")
    assert abm.reconstruction_test(single)["error"] < 1e-6
    planes = abm.hyperplanes(network, IMAGES, "output", "RM2", dtype=torch.float64)
    expected = copy.deepcopy(model).double()(IMAGES).movedim(1, -1)
    assert (planes.reconstruct() - expected).abs().max() < 1e-14
    assert torch.equal(planes.value, expected) or (planes.value - expected).abs().max() < 1e-14


def test_constants_that_are_cast_to_float32_are_cast_to_float64():
    """A cast to the model's own dtype does not round in float64, nor does the value's."""
    model = net(lambda net, x: net.conv(x * (net.ints.float() / 255)))
    network = abm.trace(model, torch.rand(1, 2, 5, 5))
    planes = abm.hyperplanes(network, IMAGES, "output", "RM2", dtype=torch.float64)
    double = copy.deepcopy(model).double()
    expected = double.conv(IMAGES * (double.ints.double() / 255)).movedim(1, -1)
    assert (planes.reconstruct() - expected).abs().max() < 1e-14
    assert (planes.value - expected).abs().max() < 1e-14


def test_pruned_models_have_float64():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.l1_unstructured(model[3], "bias", 0.5)
    network = abm.trace(model, torch.rand(1, 2, 5, 5))
    planes = abm.hyperplanes(network, IMAGES, "output", "RM0", dtype=torch.float64)
    assert (planes.reconstruct() - model.double()(IMAGES)).abs().max() < 1e-14


def test_plain_attributes_are_cast_for_a_pass_in_float64_and_put_back():
    model = net(
        lambda net, x: (
            F.conv2d(net.conv(x) * net.own, net.kernels[0] * 0.3) - net.by_name["shift"] * 0.7
        )
    )
    model.own = torch.rand(3, 1, 1)
    model.kernels = [torch.rand(2, 3, 2, 2)]
    model.by_name = {"shift": torch.rand(2, 1, 1)}
    before = (model.own, model.kernels[0], model.by_name["shift"])
    network = abm.trace(model, torch.rand(1, 2, 5, 5))
    assert network.biases.names == ("conv.bias", "mul")
    planes = abm.hyperplanes(network, IMAGES, "output", "RM2", dtype=torch.float64)
    after = (model.own, model.kernels[0], model.by_name["shift"])
    assert all(a is b for a, b in zip(after, before, strict=True))
    own, kernel, shift = (t.double() for t in before)
    expected = (
        F.conv2d(copy.deepcopy(model.conv).double()(IMAGES) * own, kernel * 0.3) - shift * 0.7
    )
    assert (planes.reconstruct() - expected.movedim(1, -1)).abs().max() < 1e-14


def test_what_model_double_cannot_do_is_refused_in_float64_alone():
    kernel_in_float32 = net(lambda net, x: F.conv2d(x, torch.full((1, 2, 2, 2), 0.3)))
    network = abm.trace(kernel_in_float32, torch.rand(1, 2, 5, 5))
    abm.audit(network, IMAGES.float())
    with pytest.raises(
        abm.UnsupportedOperation,
        match=r"must run in torch\.float64, as model\.to.*test_constants\.py.*compute in",
    ):
        abm.audit(network, IMAGES, dtype=torch.float64)
    assert not network.is_computed_in(torch.float64)


def test_operations_that_depend_on_the_dtype_are_refused_in_the_other():
    model = net(
        lambda net, x: net.conv(x) * torch.full((1,), 0.3).to(x) + (x.dtype == torch.float64)
    )
    network = abm.trace(model, IMAGES.float())
    with pytest.raises(
        abm.UnsupportedOperation,
        match=r"same operations in torch\.float64 as in torch\.float32.*compute in",
    ):
        abm.audit(network, IMAGES, dtype=torch.float64)


IMAGES_IN_A_NUMBER = {
    "divided by the number of images": lambda net, x: net.conv(x) / x.shape[0],
    "a tensor of the number of images": lambda net, x: net.conv(x) * torch.tensor(x.shape[0]),
}


@pytest.mark.parametrize("kind", IMAGES_IN_A_NUMBER)
def test_values_that_depend_on_the_number_of_images_are_refused(kind):
    with pytest.raises(
        abm.UnsupportedOperation, match=r"depend on how many images|that of the images"
    ):
        abm.trace(net(IMAGES_IN_A_NUMBER[kind]), IMAGES.float())


SEVERAL = {
    "sorted": lambda net, x: net.conv(x) * net.conv.weight.flatten().sort()[0][:3].view(3, 1, 1),
    "largest": lambda net, x: net.conv(x) + net.conv.weight.flatten(1).max(1)[0].view(3, 1, 1),
    "place of the largest": lambda net, x: net.conv(x)[
        :, net.conv.weight.flatten(1).sum(1).topk(2)[1]
    ],
    "moments": lambda net, x: (
        net.conv(x) * torch.var_mean(net.conv.weight.flatten(1), 1)[0].view(3, 1, 1)
        + torch.var_mean(net.conv.weight.flatten(1), 1)[1].view(3, 1, 1)
    ),
    "decomposed": lambda net, x: (
        net.conv(x) * torch.linalg.qr(net.conv.weight.flatten(1))[1][:, 0].view(3, 1, 1)
    ),
    "standardised as a batch": lambda net, x: F.conv2d(
        x,
        F.batch_norm(net.conv.weight.reshape(1, 3, -1), None, None, training=True).view(3, 2, 3, 3),
        net.conv.bias,
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_each_output_of_an_operation_on_constants_is_a_constant(kind):
    model = net(SEVERAL[kind]).double()
    network = abm.trace(model, IMAGES)
    planes = abm.hyperplanes(network, IMAGES, "output", "RM2")
    assert (planes.value - model(IMAGES).movedim(1, -1)).abs().max() < 1e-12
    assert abm.reconstruction_test(planes)["error"] < 1e-12


NARROW = {
    "mask times a number": ("mul", lambda net, x: net.conv(x) + 0.3 * (net.conv(x) > 0)),
    "places times a number": (
        "mul",
        lambda net, x: net.conv(x) + 0.3 * x.argmax(1)[:, None, 2:, 2:],
    ),
    "count divided": ("div", lambda net, x: net.conv(x) * ((net.conv(x) > 0).sum(1, True) / 3)),
    "one of two numbers": (
        "where",
        lambda net, x: net.conv(x) * torch.where(x[:, :1, 2:, 2:] > 0, 0.3, 1),
    ),
    "mean of a mask": (
        "mean",
        lambda net, x: net.conv(x) + (net.conv(x) > 0).float().mean(1, True),
    ),
}


@pytest.mark.parametrize("kind", NARROW)
def test_numbers_in_the_default_dtype_are_refused_where_they_round(kind):
    """By what they do, in a float64 model, and in float64 of a float32 model."""
    op, forward = NARROW[kind]
    match = rf"Got {op} \(it computes in torch.float32, and the network in torch.float64: give its"
    with pytest.raises(abm.UnsupportedOperation, match=match):
        abm.trace(net(forward).double(), IMAGES)
    network = abm.trace(net(forward), IMAGES.float())
    if kind == "mean of a mask":  # its own cast becomes one to float64
        planes = abm.hyperplanes(network, IMAGES, "output", "RM2", dtype=torch.float64)
        wide = net(lambda net, x: net.conv(x) + (net.conv(x) > 0).double().mean(1, True))
        wide.load_state_dict(network.model.state_dict())
        expected = wide.double()(IMAGES).movedim(1, -1)
        assert (planes.value - expected).abs().max() < 1e-14
        assert abm.reconstruction_test(planes)["error"] < 1e-12
        return
    with pytest.raises(abm.UnsupportedOperation, match=match):
        abm.hyperplanes(network, IMAGES, "output", dtype=torch.float64)


EXACT = {
    "opposite": lambda net, x: net.conv(x) * (1 - (net.conv(x) > 0).float()),
    "sign by hand": lambda net, x: net.conv(x) * (2 * (net.conv(x) > 0).float() - 1),
    "count divided": lambda net, x: net.conv(x) * ((net.conv(x) > 0).sum(1, True) / 4),
    "number in the image's dtype": lambda net, x: (
        net.conv(x) * (0.3 * (net.conv(x) > 0).to(x.dtype))
    ),
}


@pytest.mark.parametrize("kind", EXACT)
def test_numbers_in_the_default_dtype_are_taken_where_they_are_exact(kind):
    model = net(EXACT[kind]).double()
    planes = abm.hyperplanes(abm.trace(model, IMAGES), IMAGES, "output", scale=1 / 8)
    assert (planes.value - model(IMAGES).movedim(1, -1)).abs().max() < 1e-12
    assert abm.reconstruction_test(planes)["error"] < 1e-12
