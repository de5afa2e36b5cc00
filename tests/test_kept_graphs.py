"""The graphs that are kept of the shipped networks are those that torch.export captures."""

import copy
import json

import pytest
import torch

import adjointbackmap as abm
from adjointbackmap import models
from adjointbackmap.capture import kept
from adjointbackmap.capture.graph import capture
from adjointbackmap.sources import NetworkOptions, load_subject
from adjointbackmap.tracing import trace_captured

EXAMPLE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("name", ["vgg7-cifar10", "fixup-resnet20-cifar10", "resnet20-cifar100"])
def test_a_kept_graph_is_the_captured_one(name):
    """Operations, arguments, shapes, names of layers and of parameters."""
    captured = kept.described(capture(models.load(name), EXAMPLE))
    found = kept.kept_graph(name)
    assert kept.described(found) == captured


@pytest.mark.parametrize("name", [name for name in models.names() if "cifar" in name])
def test_each_shipped_network_has_a_graph_that_computes_it(name):
    """The audit of the trace passes, and the value of an output is the model's."""
    assert kept.kept_graph(name) is not None
    subject = load_subject(NetworkOptions(name))
    network = subject.trace_shipped()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = subject.prepare(image)
    found = abm.hyperplanes(network, x, "output", units=3)
    assert float(found.value) == pytest.approx(float(subject.module(x)[0, 3].detach()), abs=1e-5)
    total = (found.image[0].double() * x[0]).sum() + found.bias[
        0
    ].double() @ network.biases.vector.double()
    assert float(total) == pytest.approx(float(found.value), abs=1e-4)


def test_a_wrong_graph_is_found():
    """A graph with another slope than the module's fails the audit."""
    name = "resnet20-cifar10"
    wrong = kept.described(kept.kept_graph(name))
    changed = copy.deepcopy(wrong)
    leaky = next(each for each in changed["nodes"] if "leaky_relu" in each["target"])
    leaky["args"][1] = 0.3
    model = models.load(name)
    trace_captured(model, kept.capture_from(wrong), EXAMPLE)
    with pytest.raises(RuntimeError, match="must"):
        trace_captured(model, kept.capture_from(changed), EXAMPLE)


def test_a_graph_that_cannot_be_kept_is_refused():
    """A tensor that the forward makes, and a shape that depends on the batch."""

    class Own(torch.nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0, 3.0])

    with pytest.raises(ValueError, match="must read parameters alone"):
        kept.described(capture(Own().eval(), torch.zeros(1, 3)))
    joined = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 3)), torch.nn.Flatten(1)).eval()
    with pytest.raises(ValueError, match="must be a tensor with a batch of any size"):
        kept.described(capture(joined, torch.zeros(1, 3)))


def test_an_operation_that_pytorch_lacks_leads_to_a_capture(monkeypatch):
    """The graph is then captured as that of any module."""
    name = "vgg7-nobias-cifar10"
    text = json.dumps(kept.described(kept.kept_graph(name))).replace(
        "aten.relu", "aten.relu_of_now"
    )
    monkeypatch.setattr(kept.json, "loads", lambda _: json.JSONDecoder().decode(text))
    assert kept.kept_graph(name) is None
