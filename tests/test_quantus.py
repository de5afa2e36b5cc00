"""The explain_func for Quantus, without Quantus; tests/optional/test_quantus.py has the metric."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import adjointbackmap as abm


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)]
    return nn.Sequential(*layers).eval()


def test_attributions_sum_to_the_change(model):
    x = torch.rand(2, 3, 8, 8)
    classes = np.array([2, 0])
    found = abm.quantus.explain(model, x.numpy(), classes, baseline=0.25)
    assert (found.shape, found.dtype) == (x.shape, np.float32)
    with torch.no_grad():
        change = (model(x) - model(torch.full_like(x, 0.25)))[[0, 1], classes]
    assert found.sum((1, 2, 3)) == pytest.approx(change.numpy(), rel=1e-5)


def test_contributions_are_pixels_times_the_gradient(model):
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    model(x)[[0, 1], [1, 1]].sum().backward()
    found = abm.quantus.explain(model, x.detach().numpy(), np.array([1, 1]), "contributions")
    assert found == pytest.approx((x * x.grad).detach().numpy(), abs=1e-6)


def test_bad_arguments(model, monkeypatch):
    with pytest.raises(ValueError, match=r"method must be integrated or contributions\. Got 'x'"):
        abm.quantus.explain(model, np.zeros((1, 3, 8, 8), np.float32), np.array([0]), "x")
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        abm.quantus.completeness(-1.0)
    monkeypatch.setitem(sys.modules, "quantus", None)
    abm.quantus._metric.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'adjointbackmap\[quantus\]'"):
        abm.quantus.completeness()
