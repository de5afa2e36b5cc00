"""Growing noise: its kinds, its numbers against autograd, its page."""

import pytest
import torch

from adjointbackmap import models
from adjointbackmap.report.sections import Table
from adjointbackmap.study.adversarial import strengths
from adjointbackmap.study.adversarial.strengths_report import strengths_section
from adjointbackmap.study.setup import Setup, read_json

NAME = "vgg7-cifar10"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    found = Setup(tmp_path_factory.mktemp("study"), (NAME,), images=1, sample=True)
    strengths.compute_strengths(found, lambda what, share: None)
    return found


@pytest.fixture(scope="module")
def noises(setup):
    """The noises of the first image at four grey levels."""
    one = setup.many(NAME)[[0]]
    generator = torch.Generator().manual_seed(0)
    made = strengths.noises_of(
        setup.trained(NAME), one.unit_interval(), int(one.labels), 4 / 255, generator
    )
    return made, one


def test_noises_have_their_size_and_rank(noises):
    """PGD and random signs are in the ball; Gaussian kinds have the lengths of PGD's patterns."""
    made, _ = noises
    lengths = {kind: noise.flatten(1).norm(dim=1) for kind, noise in made.items()}
    ranks = {
        kind: int(torch.linalg.matrix_rank(noise.flatten(1).double(), rtol=1e-4))
        for kind, noise in made.items()
    }
    assert ranks == {"PGD": 9, "random signs": 9, "nine directions": 9, "Gaussian": 18}
    assert float(made["PGD"].abs().max()) <= 4 / 255 + 1e-6
    assert made["random signs"].abs().unique().tolist() == pytest.approx([2 / 255, 4 / 255])
    for kind in ("nine directions", "Gaussian"):
        torch.testing.assert_close(lengths[kind], lengths["PGD"], rtol=1e-4, atol=0)


def test_turn_is_that_of_autograd(setup):
    """The median angle between gradients of the untouched module."""
    trained = setup.trained(NAME)
    one = setup.many(NAME)[[0]]
    found = read_json(setup.folder / strengths.KEY / f"{NAME}.json")["images"][one.hashes[0]]
    again = strengths.measure_strengths(trained, one, setup.seed)
    assert again == found
    module = models.load(NAME)
    generator = torch.Generator().manual_seed(7)
    measured = strengths._at_radius(trained, one, 2 / 255, generator)
    generator = torch.Generator().manual_seed(7)
    made = strengths.noises_of(trained, one.unit_interval(), int(one.labels), 2 / 255, generator)
    shaken = (one.unit_interval() + made["PGD"]).clamp(0, 1)
    x = trained.input(torch.cat([one.unit_interval(), shaken])).requires_grad_()
    (slopes,) = torch.autograd.grad(module(x)[:, int(one.labels)].sum(), x)
    own, *others = torch.nn.functional.normalize(slopes.flatten(1).double(), dim=1)
    turn = torch.stack([(own @ other).clamp(-1, 1).acos().rad2deg() for other in others])
    assert measured["PGD"]["turn"] == pytest.approx(float(turn.median()), rel=1e-3)


def test_section_has_every_radius_and_kind(setup):
    section = strengths_section(setup.folder)
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert len(table.sheet.rows) == len(strengths.LEVELS) * len(strengths.KINDS)
    assert all(all(row) for row in table.sheet.rows)
