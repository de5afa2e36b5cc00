"""PGD and APGD: they stay in their ball, climb to the top of it, and are those of their papers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adjointbackmap.attacks import Ball, apgd, pgd
from adjointbackmap.examples import scores_of

ATTACKS = {"pgd": pgd, "apgd": apgd}
NORMS = ("linf", "l2")


def small_network(seed=0):
    """Two layers in float64, in eval mode, with random weights."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 6, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5)).double().eval()


def images(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def losses(model, pixels, labels):
    return F.cross_entropy(scores_of(model, pixels, None), labels, reduction="none")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_in_ball_and_box(name, norm):
    """Up to rounding; and the radius is used, as more noise gives more loss."""
    model, pixels = small_network(), images()
    radius = {"linf": 0.03, "l2": 0.4}[norm]
    labels = model(pixels).argmax(1)
    found = ATTACKS[name](model, pixels, labels, Ball(radius, norm), steps=12)
    size = getattr(found, norm)
    assert found.inside.all()
    assert (size <= radius * (1 + 1e-9)).all()
    assert (size >= 0.9 * radius).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_top_of_a_linear_model_is_found(name, norm):
    """With two classes of a linear model the largest loss in the ball has a closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().eval()
    pixels = 0.4 + 0.2 * torch.rand(4, 3, 2, 2, dtype=torch.float64)
    labels = model(pixels).argmax(1)
    weight = model[1].weight.detach()
    away = (weight[1 - labels] - weight[labels]).view_as(pixels)  # the other class's gain
    ball = Ball(0.01, norm)
    best = pixels + 0.01 * ball.steepest(away)
    found = ATTACKS[name](model, pixels, labels, ball, steps=40)
    at = {"clean": pixels, "found": found.adversarial, "best": best}
    loss = {key: losses(model, x, labels) for key, x in at.items()}
    gained = (loss["found"] - loss["clean"]) / (loss["best"] - loss["clean"])
    assert (gained >= 0.95).all()
    assert (gained <= 1 + 1e-9).all()


def test_pgd_is_the_papers():
    """Without a random start, where the last place is also the best, step by step."""
    model, pixels = small_network(), images()
    labels = model(pixels).argmax(1)
    x = pixels.clone()
    for _ in range(7):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
        noise = (x + 0.004 * slope.sign() - pixels).clamp(-0.02, 0.02)
        x = (pixels + noise).clamp(0, 1)
    found = pgd(model, pixels, labels, Ball(0.02), steps=7, step=0.004, seed=None)
    last = losses(model, x, labels)
    best = losses(model, found.adversarial, labels)
    assert (best >= last).all()
    same = (found.adversarial == x).flatten(1).all(1)
    assert same.any()
    assert (same | (best > last) | (found.after != labels)).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_targets_are_reached(name):
    """And a small ball, in which no attack succeeds, still lowers the target's loss."""
    model, pixels = small_network(), images()
    labels = model(pixels).argmax(1)
    targets = (labels + 1) % 5
    attack = ATTACKS[name]
    found = attack(model, pixels, labels, Ball(0.3), targets=targets, steps=30)
    assert torch.equal(found.after, targets)
    near = attack(model, pixels, labels, Ball(1e-3), targets=targets, steps=10)
    assert (losses(model, near.adversarial, targets) < losses(model, pixels, targets)).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_more_starts_never_lose(name):
    """Four starts find at least the loss of the first, from one seed; another seed differs."""
    model, pixels = small_network(), images()
    labels = model(pixels).argmax(1)
    attack = ATTACKS[name]
    one, four, other = (
        attack(model, pixels, labels, Ball(0.05, "l2"), steps=3, starts=starts, seed=seed)
        for starts, seed in ((1, 0), (4, 0), (1, 1))
    )
    assert (losses(model, four.adversarial, labels) >= losses(model, one.adversarial, labels)).all()
    assert not torch.equal(one.adversarial, other.adversarial)
    assert (four.steps >= one.steps).all()


REFUSED = {
    "radius": (lambda: Ball(0.0), "radius of a ball must be positive. Got 0"),
    "norm": (lambda: Ball(0.1, "l1"), "norm must be one of linf, l2. Got 'l1'"),
    "box": (lambda: Ball(0.1, box=(1.0, 0.0)), "box must be the smallest and the largest value"),
    "steps": (lambda: on_one(steps=0), "steps must be positive. Got 0"),
    "starts": (lambda: on_one(starts=0), "starts must be positive. Got 0"),
    "target": (
        lambda: on_one(targets=torch.tensor([1])),
        "targets must be other classes than labels. Got the same for image 0",
    ),
}


def on_one(**options):
    return apgd(small_network(), images(1), torch.tensor([1]), Ball(0.1), **options)


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused(why):
    call, words = REFUSED[why]
    with pytest.raises(ValueError, match=words):
        call()
