"""Recipes: the published schedules to the epoch, and what an option changes."""

import re

import pytest
import torch

from adjointbackmap import data
from adjointbackmap.training import augmentation
from adjointbackmap.training.recipes import STUDY_INTERVALS, Recipe, choose_recipe, study_recipe

# Tables 2.1, 3.1 and 3.2: rate, first and last epoch of each interval; epochs in total
PUBLISHED = {
    ("vgg7-nobias", "cifar10"): "2e-4 [0, 199] 1e-4 [200, 249] 5e-5 [250, 300] 301",
    ("fixup-resnet20-nobias", "cifar10"): "2e-3 [0, 99] 1e-3 [100, 149] 5e-4 [150, 200] 201",
    ("vgg7", "cifar10"): "0.01 [0, 299] 0.002 [300, 399] 0.0005 [400, 500] 501",
    ("resnet20", "cifar10"): "0.01 [0, 99] 0.001 [100, 149] 0.0002 [150, 200] 201",
    ("fixup-resnet20", "cifar10"): "0.002 [0, 79] 0.001 [80, 119] 0.0005 [120, 150] 151",
    ("vgg7", "cifar100"): "0.01 [0, 499] 0.002 [500, 599] 0.0005 [600, 700] 701",
    ("resnet20", "cifar100"): "0.01 [0, 99] 0.001 [100, 149] 0.0002 [150, 200] 201",
    ("fixup-resnet20", "cifar100"): "0.002 [0, 39] 0.001 [40, 79] 0.0005 [80, 120] 121",
}


@pytest.mark.parametrize("key", PUBLISHED, ids=" on ".join)
def test_the_study_rates_are_the_published_ones(key):
    recipe = study_recipe(*key)
    *intervals, total = re.findall(r"(\S+) \[(\d+), (\d+)\]|(\d+)$", PUBLISHED[key])
    assert recipe.epochs == int(total[3])
    assert recipe.peak_rate == float(intervals[0][0])
    steps = 450 * recipe.epochs
    for rate, first, last, _ in intervals:
        ends = (450 * int(first), 450 * int(last) + 449)
        assert [recipe.rate(step, steps) for step in ends] == [float(rate)] * 2
    assert STUDY_INTERVALS.keys() == PUBLISHED.keys()


def test_the_study_settings():
    """Section 2.5.1: plain gradient descent, batch 100, L1 of 1e-4, its own augmentation."""
    recipe = study_recipe("vgg7-cifar10", "cifar10")
    assert (recipe.batch, recipe.momentum, recipe.weight_decay, recipe.label_smoothing) == (
        100,
        0,
        0,
        0,
    )
    assert (recipe.l1, recipe.validate_every, recipe.augmentation) == (1e-4, 2, "study")


def test_the_default_is_our_own_recipe():
    own = Recipe(30, 128, 0.2, 0.2, 0.9, 5e-4, 0.1, 4, (), 0.0, 1, "crop")
    assert (
        Recipe()
        == choose_recipe("vgg7", "cifar10")
        == choose_recipe("vgg7", "cifar10", epochs=None)
        == own
    )


def test_options_override_the_preset():
    recipe = choose_recipe("vgg7", "cifar10", "study", epochs=3, momentum=0.9, l1=0.0)
    assert (recipe.epochs, recipe.momentum, recipe.l1, recipe.batch) == (3, 0.9, 0.0, 100)
    assert recipe.intervals == STUDY_INTERVALS["vgg7", "cifar10"]
    assert choose_recipe("vgg7", "cifar100", peak_rate=0.1) == Recipe(peak_rate=0.1)


def test_intervals_bring_their_epochs_and_the_last_rate_stays():
    recipe = choose_recipe("vgg7", "cifar10", intervals=[(0.1, 1), (0.5, 2)])
    assert recipe == Recipe(epochs=3, peak_rate=0.5, rise=0.0, intervals=((0.1, 1), (0.5, 2)))
    longer = choose_recipe("vgg7", "cifar10", intervals=[(0.1, 1), (0.5, 2)], epochs=4)
    assert [longer.rate(step, 8) for step in range(8)] == [0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_the_rate_rises_and_falls_linearly():
    recipe = Recipe(peak_rate=0.4, rise=0.25)
    rates = torch.tensor([recipe.rate(step, 100) for step in range(100)], dtype=torch.float64)
    assert rates.argmax() in (24, 25)
    assert 0.39 < rates.max() <= 0.4
    assert 0 < rates[0] < 0.01
    assert 0 < rates[-1] < 0.01
    torch.testing.assert_close(rates[:25].diff(), torch.full((24,), 0.4 / 25, dtype=torch.float64))
    torch.testing.assert_close(rates[25:].diff(), torch.full((74,), -0.4 / 75, dtype=torch.float64))


@pytest.mark.parametrize("name", ["crop", "study"])
def test_the_recipe_augments(name):
    pixels = data.sample().pixels[:4]
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    actual = Recipe(augmentation=name, crop_padding=2).augment(pixels, generators[0])
    by_hand = (
        augmentation.crop(pixels, 2, generators[1])
        if name == "crop"
        else augmentation.study(pixels, generators[1])
    )
    assert torch.equal(actual, by_hand)


WRONG = {
    "epochs": (lambda: Recipe(epochs=0), r"at least 1\. Got 0, 128, 1 and \[\]"),
    "validate_every": (lambda: Recipe(validate_every=0), "at least 1. Got 30, 128, 0"),
    "interval": (
        lambda: Recipe(intervals=((0.1, 2), (0.2, 0))),
        r"at least 1\. Got .* and \[2, 0\]",
    ),
    "augmentation": (lambda: Recipe(augmentation="blur"), "must be one of crop, study. Got 'blur'"),
    "preset": (
        lambda: choose_recipe("vgg7", "cifar10", "best"),
        "must be one of own, study. Got 'best'",
    ),
    "rate": (
        lambda: choose_recipe("vgg7", "cifar10", "study", rise=0.1),
        "no peak_rate and no rise. Got rise: leave it out",
    ),
    "both": (
        lambda: choose_recipe("vgg7", "cifar10", intervals=[(1.0, 1)], peak_rate=1.0),
        "Got peak_rate: leave it out",
    ),
    "not trained": (
        lambda: study_recipe("vgg7-nobias", "cifar100"),
        r"must be of vgg7-nobias on cifar10, .* Got vgg7-nobias on cifar100: leave the preset out",
    ),
    "no network": (lambda: study_recipe("vgg9", "cifar10"), "must be one of vgg7-nobias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes_are_refused(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()
