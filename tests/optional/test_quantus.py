"""Quantus with exact attributions: its own completeness, and that under a tolerance."""

import numpy as np
import pytest
import torch
from torch import nn

import adjointbackmap as abm

quantus = pytest.importorskip("quantus")
pytestmark = pytest.mark.filterwarnings("ignore")  # Quantus warns of each metric's parameters


@pytest.fixture
def job():
    """A network, images and classes, as Quantus takes them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 25, 5)).eval()
    x = torch.rand(4, 3, 16, 16).numpy()
    return {"model": model, "x_batch": x, "y_batch": np.array([0, 1, 2, 4])}


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_exact_integrated_gradients_are_complete(job, baseline):
    """All images pass; a sampled twin with five gradients passes for none."""
    metric = abm.quantus.completeness(baseline=baseline)
    options = {"baseline": baseline}
    found = metric(**job, explain_func=abm.quantus.explain, explain_func_kwargs=options)
    assert found == [True] * 4
    start = torch.full_like(torch.tensor(job["x_batch"]), baseline)
    step = torch.tensor(job["x_batch"]) - start
    sampled = torch.zeros_like(step)
    for t in np.linspace(0.1, 0.9, 5):
        x = (start + float(t) * step).requires_grad_()
        scores = job["model"](x)[range(4), job["y_batch"]]
        sampled += step * torch.autograd.grad(scores.sum(), x)[0] / 5
    assert metric(**job, a_batch=sampled.numpy()) == [False] * 4


def test_contributions_leave_out_the_biases(job):
    """They are complete only for a network without biases."""
    options = {"method": "contributions"}
    metric = abm.quantus.completeness()
    arguments = {"explain_func": abm.quantus.explain, "explain_func_kwargs": options}
    assert metric(**job, **arguments) == [False] * 4
    for module in job["model"]:
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    assert metric(**job, **arguments) == [True] * 4


def test_own_completeness_fails_by_rounding(job):
    """Quantus compares floats with ==, so that exact attributions fail too."""
    metric = quantus.Completeness(normalise=False, disable_warnings=True)
    found = metric(**job, explain_func=abm.quantus.explain)
    assert not all(found)
