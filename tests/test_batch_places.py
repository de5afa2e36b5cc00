"""Networks whose forward moves the batch: every layer is exact, with the batch first."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net, enliven, parameter
from checks import assert_reconstructed
from torch import nn

import adjointbackmap as abm
from adjointbackmap.capture.batch_places import Place

SECOND = {  # functions of (T, N, D)
    "sum of dimensions": lambda x: x.sum((0, 2), keepdim=True) + x,
    "softmax-free products": lambda x: x @ torch.eye(4).to(x) - x.mean(0, keepdim=True),
    "constants": lambda x: x * torch.arange(4.0).to(x) + torch.arange(3.0).to(x)[:, None, None],
    "parts": lambda x: torch.cat([x[1:], x.select(0, 0).unsqueeze(0)]).flip(2),
    "stacked": lambda x: torch.stack(x.chunk(3, 0), 0).flatten(0, 1),
    "padded": lambda x: F.pad(x, (1, 2)),
    "largest": lambda x: x.amax(0, keepdim=True).expand(2, -1, -1),
    "masked": lambda x: torch.where(x > 0.1, x, 0.5 * x),
    "merged on both sides": lambda x: F.relu(x.reshape(-1, 4)).view(3, -1, 4),
    "heads beside the batch": lambda x: F.relu(x.reshape(3, -1, 2)).transpose(0, 1).reshape(-1, 6),
}


def last_of(function):
    """A network with a function of ``(T, N, D)``, and the batch first again."""

    def forward(net, x):
        moved = function(net.first(x).transpose(0, 1))
        if moved.dim() == 2:  # (N * heads, T * features)
            return moved.view(-1, 2, 6)
        return net.last(moved.transpose(0, 1)[..., :4])

    return Net(forward, first=nn.Linear(5, 4), last=nn.Linear(4, 2))


@pytest.mark.parametrize("name", SECOND)
def test_moved_batch_is_exact(name):
    """The map equals the Jacobian, and each layer the untouched model."""
    torch.manual_seed(0)
    model = last_of(SECOND[name]).double().eval()
    enliven(model)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    network = abm.trace(model, x)
    assert_reconstructed(network, x)
    abm.dense_test(abm.operator(network, x, "output"), x)


def test_layers_have_the_batch_first():
    """A linear layer on merged windows is a layer of windows, with the values of the module."""

    def forward(net, x):
        return net.last(F.relu(net.first(x.flatten(0, 1)))).unflatten(0, (-1, 3))

    model = Net(forward, first=nn.Linear(5, 4), last=nn.Linear(4, 2)).double().eval()
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    network = abm.trace(model, x)
    assert [layer.out_shape for layer in network.layers.values()] == [(3, 7, 4), *[(3, 7, 2)] * 2]
    planes = abm.hyperplanes(network, x, "first", units=(1, 2, 3))
    torch.testing.assert_close(planes.value, model.first(x)[:, 1, 2, 3].detach())
    assert_reconstructed(network, x)


def test_merged_rows_of_addmm():
    """``addmm`` on rows of all images, as GPT-2 writes a linear layer."""

    def forward(net, x):
        rows = torch.addmm(net.bias, x.view(-1, 5), net.weight)
        return F.relu(rows.view(*x.shape[:-1], 4))

    model = Net(forward, bias=parameter(4), weight=parameter(5, 4)).double().eval()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    network = abm.trace(model, x)
    assert [part.parameter for part in network.biases.values()] == ["bias"]
    assert_reconstructed(network, x)


def test_batch_norm_of_rows_of_all_images():
    """As in LeViT, where the rows of all images are one batch."""
    parts = {"first": nn.Linear(5, 4), "norm": nn.BatchNorm1d(4)}

    def forward(net, x):
        x = net.first(x)
        return F.relu(net.norm(x.flatten(0, 1)).reshape_as(x))

    model = Net(forward, **parts).double().eval()
    enliven(model)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    network = abm.trace(model, x)
    assert network.layers["norm"].out_shape == (3, 4)
    assert_reconstructed(network, x)


def test_batch_that_is_summed_is_refused():
    """An operation over the images of a batch has no copy."""
    model = Net(lambda net, x: x.transpose(0, 1) - x.transpose(0, 1).sum(1, keepdim=True)).eval()
    with pytest.raises(abm.UnsupportedOperation, match="moves the batch out of the first"):
        abm.trace(model, torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("place", "shape", "expected"),
    [
        (Place(), (2, 3), (2, 3)),
        (Place(1), (3, 2, 4), (2, 3, 4)),
        (Place(0, 1, 3), (6, 4), (2, 3, 4)),
        (Place(1, 5, 3), (4, 30, 7), (2, 4, 5, 3, 7)),
    ],
)
def test_batch_comes_first(place, shape, expected):
    """Each image keeps its own numbers."""
    marked = torch.arange(2)
    extents = [place.outer, 2, place.inner]
    along = (
        marked[:, None].expand(extents).flatten() if place.inner > 1 or place.outer > 1 else marked
    )
    whole = along.view(-1, *(1,) * (len(shape) - place.dim - 1)).expand(shape)
    first = place.batch_first(whole)
    assert first.shape == expected
    assert torch.equal(first, marked.view(2, *(1,) * (len(expected) - 1)).expand(expected))
