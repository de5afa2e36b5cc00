"""What pixels and biases carry of a logit: sums, origins and verdicts."""

import numpy as np
import pytest
import torch

from adjointbackmap.study import origins
from adjointbackmap.study.results import kept
from adjointbackmap.study.setup import Setup

NETWORKS = ("vgg7-nobias-cifar10", "vgg7-cifar10")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    found = Setup(tmp_path_factory.mktemp("study"), NETWORKS, images=1, sample=True)
    origins.compute_origins(found, lambda what, share: None)
    return found


def test_parts_sum_to_the_untouched_network_and_to_autograd(setup):
    """The pixels' part is x times the gradient; the rest is the biases'."""
    for name, found, arrays in kept(setup.folder / origins.KEY):
        trained = setup.trained(name)
        x = trained.input(setup.many(name, 10).unit_interval()).requires_grad_()
        top = trained.subject.module(x).amax(1)
        (slope,) = torch.autograd.grad(top.sum(), x)
        pixels = (x * slope).flatten(1).sum(1).detach().numpy()
        np.testing.assert_allclose(arrays["pixels"][:, 0], pixels, rtol=1e-3, atol=1e-4)
        for quantity in origins.QUANTITIES:
            assert origins.shares(arrays, quantity).error < 1e-4
        assert arrays["biases"].shape == (10, 2, len(found["layers"]))


def test_origins_are_subtracted(setup):
    """From black, pixels carry <x - black | H>."""
    (_, _, arrays), _ = kept(setup.folder / origins.KEY)
    trained = setup.trained(NETWORKS[0])
    x = trained.input(setup.many(NETWORKS[0], 10).unit_interval()).requires_grad_()
    top = trained.subject.module(x).amax(1)
    (slope,) = torch.autograd.grad(top.sum(), x)
    black = trained.input(torch.zeros_like(x[:1]))
    expected = ((x - black) * slope).flatten(1).sum(1) / top
    found = origins.shares(arrays, "logit").pixels[:, 2]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_section_says_what_carries_the_logit(setup):
    section = origins.origins_section(setup.folder)
    plain, biased = (block for block in section.blocks if isinstance(block, origins.Claim))
    assert plain.holds is True
    assert "carry none" in biased.text
    assert section.blocks[2].path.name == "vgg7-cifar10-shares.png"
    assert origins.origins_section(setup.folder) == section  # pictures replace no results


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((-0.05, 0.05), True), ((0.05, 0.2), None), ((0.2, 0.3), False), ((-0.3, 0.3), None)],
)
def test_a_verdict_needs_its_whole_interval(ends, verdict):
    assert origins._inside(*ends, *origins.NONE) is verdict


def test_the_interval_of_a_median_covers_it():
    """Of 200 draws of 50 numbers, about 95 % of the intervals hold the true median, 0."""
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, _, high = origins.median_interval(draw.standard_normal(50), seed)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99
