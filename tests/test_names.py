"""Names of layers and entries of b: those a person knows them by, and no two the same."""

import torch
import torch.nn.functional as F
from cases import Net, make, parameter
from torch import nn

import adjointbackmap as abm


def test_every_part_of_b_has_a_name_of_its_own_and_a_parameter_keeps_its_own():
    model, x = make("names-of-operations")
    network = abm.trace(model, x)
    names = network.biases.names
    assert len(set(names)) == len(names)
    assert {"sub", "add", "max", "output.bias", "image.bias", "conv2d.bias"} <= set(names)
    assert torch.equal(network.biases["sub"].value, model.sub)
    literals = [
        part.value for name, part in network.biases.items() if name.startswith(("sub#", "add#"))
    ]
    assert [literal.numel() for literal in literals] == [2, 1, 1]
    assert torch.equal(literals[0], model.mean - 0.1)


def test_a_module_called_output_is_not_the_output():
    model, x = make("names-of-operations")
    network = abm.trace(model, x)
    assert list(network.layers) == ["conv2d", "conv2d#1", "output#1", "image", "output"]
    assert network.layers["output#1"].kind == "Conv2d"
    assert "RM4" in network.layers["output#1"].modes
    recorded = abm.hyperplanes(network, x, "output#1", "RM2")
    assert recorded.value.shape[-1] == 3
    assert abm.reconstruction_test(recorded)["error"] < 1e-13
    assert (
        abm.trace(model, x, until="output#1").layers["output"].out_shape
        == recorded.network.layers["output#1"].out_shape
    )


def test_a_last_module_called_output_is_the_output():
    model = Net(
        lambda net, x: net.output(F.relu(net.conv(x))),
        conv=nn.Conv2d(1, 2, 2),
        output=nn.Conv2d(2, 3, 2),
    ).eval()
    layers = abm.trace(model, torch.rand(1, 1, 5, 5)).layers
    assert list(layers) == ["conv", "output"]
    assert layers["output"].modes == ("RM4", "RM3", "RM2", "RM1")


def test_batch_norms_share_a_part_of_b_only_if_all_their_constants_are_the_same():
    model, x = make("functional-batch-norms")
    network = abm.trace(model, x)
    assert network.biases.names == ("conv.bias", "batch_norm", "batch_norm#1", "batch_norm#2")
    again = nn.Sequential(nn.Conv2d(1, 2, 1), *[nn.BatchNorm2d(2)] * 2).eval()
    assert abm.trace(again, torch.rand(1, 1, 3, 3)).biases.names == ("0.bias", "1")


class OddNames(nn.Module):
    """Submodules whose names look like second calls."""

    def __init__(self):
        super().__init__()
        for name in ("conv", "conv:1", "conv@1"):
            self.add_module(name, nn.Conv2d(1, 1, 2))

    def forward(self, x):
        x = F.relu(self.get_submodule("conv:1")(self.conv(F.relu(self.conv(x)))))
        return self.get_submodule("conv@1")(F.relu(self.get_submodule("conv@1")(x)))


def test_names_that_look_like_second_calls():
    x = torch.rand(2, 1, 9, 9)
    network = abm.trace(OddNames().eval(), x)
    assert list(network.layers) == ["conv", "conv:1", "conv:1:0", "conv@1", "conv@1:1", "output"]
    assert all(layer.kind == "Conv2d" for name, layer in network.layers.items() if name != "output")
    for name in network.layers:
        assert abm.reconstruction_test(abm.hyperplanes(network, x, name, "RM2"))["error"] < 1e-6


def test_a_part_of_a_parameter_in_a_batch_norm_has_no_parameter_of_its_own():
    """The derivative of a batch norm's b' is its bias's only if the bias is a whole parameter."""

    def forward(net, x):
        return F.batch_norm(net.conv(x), net.mean, net.variance, None, net.offsets[1])

    parts = {"mean": torch.rand(2), "variance": torch.rand(2) + 1, "offsets": parameter(2, 2)}
    model = Net(forward, conv=nn.Conv2d(1, 2, 1), **parts).double().eval()
    x = torch.rand(1, 1, 2, 2).double()
    network = abm.trace(model, x)
    assert network.biases["batch_norm"].parameter is None
    assert abm.dense_test(abm.operator(network, x, "output"), x)["error"] < 1e-12
