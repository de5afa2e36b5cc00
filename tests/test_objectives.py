"""The objectives of training, compared with their formulas on small networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adjointbackmap.models import Normalise
from adjointbackmap.training.objectives import (
    OBJECTIVES,
    Around,
    ball_of,
    bend,
    gradient_norm,
    noisy_step,
    objective_loss,
)
from adjointbackmap.training.recipes import Recipe, choose_recipe

RADIUS = 8 / 255
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.fixture
def x():
    return Normalise()(torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def around(x):
    return Around(ball_of(Normalise(), RADIUS, x), torch.Generator().manual_seed(1))


def network(*hidden):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *hidden, nn.LazyLinear(3))


def loss(scores):
    return F.cross_entropy(scores, LABELS)


def test_the_ball_is_in_pixels(x, around):
    pixels = x * Normalise().std + Normalise().mean
    shifted = Normalise()((pixels + RADIUS).clamp(0, 1))
    torch.testing.assert_close(around.ball.clip(x + around.ball.radius), shifted)


def test_a_noisy_step_goes_up_from_its_noise(x, around):
    """On a linear network the gradient's sign is known: it does not depend on the noise."""
    model = network()
    model(x)
    found = noisy_step(x, lambda images: loss(model(images)), around)
    again = Around(around.ball, torch.Generator().manual_seed(1))
    noisy = again.noisy(x, 2.0)
    slopes = (model(noisy).softmax(1) - F.one_hot(LABELS, 3)) @ model[1].weight
    expected = again.ball.clip(noisy + again.ball.radius * slopes.view_as(x).sign())
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_what_is_linear_has_no_bend(x, around):
    straight = network()
    bent = network(nn.Linear(75, 40), nn.ReLU())
    wide = Around(ball_of(Normalise(), 0.5, x), around.generator)  # far enough to cross kinks
    terms = [bend(x, model(x), model, wide).item() for model in (straight, bent)]
    assert terms[0] < 1e-10 < 1e-4 < terms[1]


def test_gradient_norm_is_that_of_each_image(x):
    model = network()
    x = x.requires_grad_()
    found = gradient_norm(x, loss(model(x)))
    slopes = (model(x).softmax(1) - F.one_hot(LABELS, 3)) @ model[1].weight
    torch.testing.assert_close(found, slopes.square().sum(1).mean())
    found.backward()
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_differ_from_the_plain_loss_where_they_should(x, around, objective):
    model = network(nn.Linear(75, 40), nn.ReLU())
    plain = loss(model(x))
    found = objective_loss(objective, 1.0, x, model, loss, around)
    assert (found > plain).item() == (objective != "plain")
    without = objective_loss(objective, 0.0, x, model, loss, around)
    assert (without == plain).item() == (objective != "adversarial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "calm"}, "objective must be one of plain, adversarial, .* Got 'calm'"),
        ({"radius": -1.0}, "Radius and strength .* at least 0. Got -1.0 and 1.0"),
    ],
)
def test_bad_objectives_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_a_recipe_takes_an_objective():
    recipe = choose_recipe("vgg7", "cifar10", objective="adversarial", radius=2 / 255)
    assert (recipe.objective, recipe.radius, recipe.strength) == ("adversarial", 2 / 255, 1.0)
