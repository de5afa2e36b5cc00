"""Torchattacks and Foolbox: the same images bit for bit, and their results are accepted.

Both live in an environment of their own (docs/attacking.md); without them their tests are skipped.
Pixels, steps and radii are multiples of 1/256, so that no order of additions rounds.
"""

import pytest
import torch

from adjointbackmap import data, models
from adjointbackmap.attacks import Attack, Ball, apgd, basic_iterative, least_likely, pgd
from adjointbackmap.examples import examine, examples_of, read_examples

STEP = 2 / 256
RADIUS = 6 / 256
ITERATIONS = 5
ATTACK = Attack(STEP, iterations=ITERATIONS, until_success=False, radius=RADIUS)
NETWORKS = ("vgg7-cifar10", "vgg7-nobias-cifar10")


@pytest.fixture(params=NETWORKS)
def subject(request):
    """A shipped network on pixels, and eight images of the sample with their predicted classes."""
    model = torch.nn.Sequential(
        models.preprocessing(request.param), models.load(request.param)
    ).eval()
    pixels = (data.sample().unit_interval()[::25] * 256).round() / 256
    with torch.no_grad():
        return model, pixels, model(pixels).argmax(1)


@pytest.fixture
def torchattacks():
    return pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: docs/attacking.md"
    )


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="foolbox is not installed: docs/attacking.md")


def test_torchattacks_gives_the_same_images(subject, torchattacks):
    """``BIM``, which is called with images and labels."""
    model, pixels, labels = subject
    made = examples_of(
        torchattacks.BIM(model, eps=RADIUS, alpha=STEP, steps=ITERATIONS), pixels, labels
    )
    ours = basic_iterative(model, pixels, labels, ATTACK)
    assert torch.equal(made, ours.adversarial)
    assert torch.equal(examine(model, pixels, made).after, ours.after)


def test_torchattacks_gives_the_same_images_towards_the_least_likely_class(subject, torchattacks):
    """``BIM`` in the mode that has the least likely class as its target."""
    model, pixels, labels = subject
    attack = torchattacks.BIM(model, eps=RADIUS, alpha=STEP, steps=ITERATIONS)
    attack.set_mode_targeted_least_likely(quiet=True)
    assert torch.equal(
        examples_of(attack, pixels, labels), least_likely(model, pixels, ATTACK).adversarial
    )


def test_torchattacks_gives_the_same_images_of_pgd(subject, torchattacks):
    """``PGD`` without a random start; ours keeps the last success, theirs the last place."""
    model, pixels, labels = subject
    made = torchattacks.PGD(model, eps=RADIUS, alpha=STEP, steps=5, random_start=False)(
        pixels, labels
    )
    ours = pgd(model, pixels, labels, Ball(RADIUS), steps=5, step=STEP, seed=None)
    fooled = examine(model, pixels, made).after != labels
    assert fooled.any()
    assert torch.equal(made[fooled], ours.adversarial[fooled])


@pytest.mark.parametrize(("norm", "radius"), [("linf", 2 / 256), ("l2", 0.2)])
def test_torchattacks_gives_the_same_images_of_apgd(subject, torchattacks, norm, radius):
    """``APGD`` on the cross-entropy from the same random start, where the image is fooled."""
    model, pixels, labels = subject
    attack = torchattacks.APGD(model, norm=norm.capitalize(), eps=radius, steps=30, seed=0)
    made = attack(pixels, labels).detach()
    ours = apgd(model, pixels, labels, Ball(radius, norm), steps=30, seed=0)
    fooled = examine(model, pixels, made).after != labels
    assert fooled.any()
    assert torch.equal(fooled, ours.after != labels)
    torch.testing.assert_close(made[fooled], ours.adversarial[fooled], rtol=0, atol=1e-6)


def test_file_of_torchattacks_is_read(subject, torchattacks, tmp_path):
    """What ``Attack.save`` writes."""
    model, pixels, labels = subject
    attack = torchattacks.BIM(model, eps=RADIUS, alpha=STEP, steps=ITERATIONS)
    attack.save([(pixels, labels)], tmp_path / "saved.pt", verbose=False)
    assert torch.equal(
        read_examples(tmp_path / "saved.pt"),
        basic_iterative(model, pixels, labels, ATTACK).adversarial,
    )


@pytest.mark.parametrize("several", [False, True], ids=["epsilon", "list-of-one-epsilon"])
def test_foolbox_gives_the_same_images(subject, foolbox, several):
    """``LinfBasicIterativeAttack``; its call returns raw and clipped images and the successes."""
    model, pixels, labels = subject
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=STEP, steps=ITERATIONS)
    epsilons = [RADIUS] if several else RADIUS
    made = attack(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), pixels, labels, epsilons=epsilons
    )
    found = examine(model, pixels, examples_of(made, pixels, labels))
    ours = basic_iterative(model, pixels, labels, ATTACK)
    assert torch.equal(found.adversarial, ours.adversarial)
    assert torch.equal(found.fooled(labels), made[2].reshape(-1))


def test_foolbox_gives_the_same_images_towards_targets(subject, foolbox):
    """With ``TargetedMisclassification``, and images that are eagerpy's."""
    import eagerpy

    model, pixels, labels = subject
    targets = (labels + 3) % 10
    given = eagerpy.astensor(pixels)
    criterion = foolbox.criteria.TargetedMisclassification(eagerpy.astensor(targets))
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=STEP, steps=ITERATIONS)
    made = attack(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), given, criterion, epsilons=RADIUS
    )
    assert not isinstance(made[1], torch.Tensor)
    ours = basic_iterative(model, pixels, labels, ATTACK, targets=targets)
    assert torch.equal(examples_of(made, pixels, labels), ours.adversarial)


def test_list_of_epsilons_of_foolbox_is_refused(subject, foolbox):
    """It gives one batch of images for each."""
    model, pixels, labels = subject
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=STEP, steps=1)
    made = attack(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"),
        pixels,
        labels,
        epsilons=[RADIUS, STEP],
    )
    with pytest.raises(ValueError, match=r"those of one epsilon\. Got 2"):
        examples_of(made, pixels, labels)
