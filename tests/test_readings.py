"""Models whose forward reads numbers from their constants, as converted ONNX models do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Net
from torch import Tensor, nn

import adjointbackmap as abm

MAPS = (2, 5, 5)


def net(function, **parts) -> nn.Module:
    """A convolution to three channels, and constants of every kind that a forward may read."""
    constants = {
        "a": torch.tensor(0.3),
        "shape": torch.tensor([0, -1]),
        "kept": torch.tensor([True, False, True]),
        "chosen": torch.tensor([[True, False, True, True, False]] * 3),
        "n": torch.tensor(2),
        "scales": torch.tensor([0.5, 0.3, 0.125]),
        "flag": torch.tensor(True),
    }
    parts = {
        "conv": nn.Conv2d(2, 3, 3, padding=1),
        "p": nn.Parameter(torch.tensor(0.7)),
        **constants,
        **parts,
    }
    return Net(function, **parts).eval()


def reshaped(net: nn.Module, x: Tensor) -> Tensor:
    """As onnx2torch reshapes: 0 keeps a dimension."""
    y = net.conv(x)
    shape = net.shape
    if torch.any(shape == 0):
        shape = [y.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return torch.reshape(y, torch.Size(shape))


def shape_in_a_tensor(net: nn.Module, x: Tensor) -> Tensor:
    """As a shape goes through an ONNX graph."""
    y = net.conv(x)
    shape = torch.cat([torch.tensor(y.shape)[:1], torch.tensor([-1])])
    return y.reshape(shape.tolist())


def loop(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv(x)
    for i in range(int(net.n)):
        y = F.relu(y) - 0.1 * (i + 1)
    return y


def loop_over_numbers(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv(x)
    for scale in net.scales:
        y = F.relu(y) - scale
    return y


def written(net: nn.Module, x: Tensor) -> Tensor:
    """A constant that is read, changed and read again."""
    scales = net.scales.clone()
    first = float(scales[0])
    scales[0] = 7
    return net.conv(x) * first + scales[0].item()


def after_a_mask(net: nn.Module, x: Tensor) -> Tensor:
    """A constant that is read after an assignment through a mask of the data."""
    y = net.conv(x)
    y[y < 0] = 0
    return y * net.a.item()


READ = {
    "item": lambda net, x: net.conv(x) * net.a.item() + float(net.a),
    "item of a parameter": lambda net, x: net.conv(x) * net.p.item() + float(net.p),
    "item of a view": lambda net, x: net.conv(x) * net.scales[1:].max().item(),
    "any": reshaped,
    "shape in a tensor": shape_in_a_tensor,
    "numpy": lambda net, x: net.conv(x)[:, : int(net.shape.detach().cpu().numpy()[0]) + 2],
    "tolist": lambda net, x: torch.cat(
        torch.split(net.conv(x), (net.n + torch.tensor([0, -1])).tolist(), 1)[::-1], 1
    ),
    "branch": lambda net, x: net.conv(x) if net.flag else x,
    "boolean index": lambda net, x: net.conv(x)[:, net.kept],
    "boolean index of two dimensions": lambda net, x: net.conv(x)[:, :, 1][:, net.chosen],
    "boolean index of a constant": lambda net, x: (
        net.conv(x)[:, :2] * net.scales[net.kept][:, None, None]
    ),
    "index": lambda net, x: net.conv(x)[:, net.n],
    "slice": lambda net, x: net.conv(x)[:, : net.n],
    "view": lambda net, x: net.conv(x).view(-1, net.n + 1, 25),
    "nonzero": lambda net, x: net.conv(x)[:, net.kept.nonzero()[:, 0]],
    "loop": loop,
    "loop over numbers": loop_over_numbers,
    "written": written,
    "after a mask": after_a_mask,
}


@pytest.mark.parametrize("kind", READ)
def test_a_number_read_from_a_constant_is_that_number_for_any_batch_size(kind):
    model = net(READ[kind])
    before = copy.deepcopy(model.state_dict())
    network = abm.trace(model, torch.rand(1, *MAPS))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = torch.randn(3, *MAPS, dtype=torch.float64)
    assert max(abm.audit(network, x, dtype=torch.float64).values()) < 1e-12


def changed(net: nn.Module, x: Tensor) -> Tensor:
    """A constant that data is written into."""
    scales = net.scales.clone()
    scales[0] = x[0, 0, 0, 0]
    return net.conv(x) * float(scales[0])


def copied(net: nn.Module, x: Tensor) -> Tensor:
    """A constant's method that copies the data."""
    return net.conv(x) * float(net.a.new_tensor(x).max())


def by_a_number(net: nn.Module, x: Tensor) -> Tensor:
    """A tensor that is made of a number of the data."""
    return net.conv(x) * float(torch.tensor(x.abs().max().item()) + net.a * 0)


def filled_with_data(net: nn.Module, x: Tensor) -> Tensor:
    """A tensor of the image's shape that is filled with a number of the image."""
    return net.conv(x) * torch.zeros_like(x)[:, :1].fill_(x.abs().amax())


DATA = {
    "copied": copied,
    "in a tensor": by_a_number,
    "made of data": lambda net, x: net.conv(x) * torch.full_like(x, x.max()).sum().item(),
    "filled with data": filled_with_data,
    "sum": lambda net, x: net.conv(x) * float(x.sum() > 0),
    "written into a constant": changed,
    "whole batch": lambda net, x: net.conv(x) if torch.equal(x, net.conv(x)) else x,
}


AT_ITS_LINE = r"Got a branch or a shape that depends on the data at .*test_readings\.py"
REFUSED = {
    "made of data": "must be piecewise affine",
    "filled with data": "must be piecewise affine",
}


@pytest.mark.parametrize("kind", DATA)
def test_a_number_read_from_data_is_refused_with_the_line(kind):
    with pytest.raises(ValueError, match=REFUSED.get(kind, AT_ITS_LINE)):
        abm.trace(net(DATA[kind]), torch.rand(2, *MAPS))


OUTSIDE = torch.tensor(0.5)


def test_a_number_of_a_tensor_that_no_module_holds_is_refused_with_what_to_do():
    model = net(lambda net, x: net.conv(x) * float(OUTSIDE))
    message = r"no parameter, buffer or attribute .*test_readings\.py.*: register it as a buffer\."
    with pytest.raises(ValueError, match=message):
        abm.trace(model, torch.rand(2, *MAPS))


def test_the_number_of_images_as_an_integer_is_refused_with_what_to_write():
    model = net(lambda net, x: net.conv(x).reshape(int(torch.tensor(x.shape[0])), -1))
    with pytest.raises(
        ValueError, match=r"Got a model that fixes the batch at .*write x\.shape\[0\]"
    ):
        abm.trace(model, torch.rand(2, *MAPS))
