"""Nearest interpolation by factors for which PyTorch's own derivative is not the transpose."""

import pytest
import torch.nn.functional as F
from cases import Net, make
from torch import nn

import adjointbackmap as abm

CASES = {
    "one-axis": (nn.Conv1d, (3, 5)),
    "two-axes": (nn.Conv2d, (3, 5, 4)),
    "three-axes": (nn.Conv3d, (2, 3, 4, 3)),
}


@pytest.mark.parametrize("factor", [1.3, 2.1])
@pytest.mark.parametrize("name", CASES)
def test_the_adjoint_is_the_transpose_of_what_was_read(name, factor):
    """Every hyperplane of a unit reads the positions that the forward pass does."""
    kind, shape = CASES[name]

    def forward(net, x):
        return net.after(F.relu(F.interpolate(net.before(x), scale_factor=factor)))

    parts = {"before": kind(shape[0], 2, 1), "after": kind(2, 2, 2)}
    model, x = make(lambda: (Net(forward, **parts), shape))
    network = abm.trace(model, x)
    abm.dot_test(abm.operator(network, x, "after"))
    planes = abm.hyperplanes(network, x, "after", "RM2", method="adjoint")
    assert abm.reconstruction_test(planes)["error"] <= 1e-12
    abm.dense_test(abm.operator(network, x, "after"), x)
