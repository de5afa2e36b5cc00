"""The rule of judgement: its numbers, intervals, verdicts and page."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adjointbackmap import models
from adjointbackmap.report.sections import Claim
from adjointbackmap.study.adversarial.noise_patterns import make_patterns
from adjointbackmap.study.judgement import measure, rule, run, untrained, verdict
from adjointbackmap.study.judgement.report import judgement_section
from adjointbackmap.study.setup import Setup, read_json

NAME = "vgg7-cifar10"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    found = Setup(tmp_path_factory.mktemp("study"), (NAME,), images=1, sample=True)
    run.compute_judgement(found, lambda what, share: None)
    return found


@pytest.fixture(scope="module")
def numbers(setup):
    return read_json(setup.folder / run.KEY / f"{NAME}.json")["draws"]


def slope(module, prepare, pixels, label):
    """The gradient of a score in the module's input, by autograd."""
    x = prepare(pixels).detach().requires_grad_()
    (found,) = torch.autograd.grad(module(x)[0, label], x)
    return found.flatten().double()


def test_numbers_are_those_of_autograd(setup, numbers):
    """Angle, change and spectrum of an image, with the gradient of the untouched module."""
    trained = setup.trained(NAME)
    one = setup.many(NAME)[[0]]
    found = numbers["0"][one.hashes[0]]
    pixels = one.unit_interval()
    label = int(one.labels)
    module = models.load(NAME)
    own = slope(module, trained.input, pixels, label)
    energy = torch.fft.fft2(own.view(3, 32, 32)).abs().square()
    energy[:, 0, 0] = 0
    along = torch.fft.fftfreq(32).double()
    high = (along[:, None].square() + along.square()).sqrt() > 0.25
    share = (energy[:, high].sum(1) / energy.flatten(1).sum(1)).mean()
    assert found["high"]["hyperplane"] == pytest.approx(float(share), rel=1e-3)
    pool = setup.many(NAME, len(trained.images))
    sample = sample_of(trained, pool, one)
    steady = measure.steady_of(sample)
    again = sample_of(trained, pool, one)
    signs = again.signs()
    shaken = slope(module, trained.input, (pixels + measure.STEADY * signs).clamp(0, 1), label)
    assert steady["trained"] == pytest.approx(float((shaken - own).norm() / own.norm()), rel=1e-2)


def sample_of(trained, pool, one):
    """A sample with a fresh generator."""
    generator = torch.Generator().manual_seed(1)
    beside = measure.Companions.draw(pool, one, generator)
    twin = untrained.Untrained(trained.name, trained.root, trained.sample)
    return measure.Sample(trained, twin, one, beside, torch.Generator().manual_seed(2))


def test_companions_are_of_the_classes_that_they_should_be(setup):
    trained = setup.trained(NAME)
    pool = setup.many(NAME, len(trained.images))
    one = pool[[3]]
    for seed in range(5):
        beside = measure.Companions.draw(pool, one, torch.Generator().manual_seed(seed))
        assert int(beside.same.labels) == int(one.labels)
        assert beside.same.hashes != one.hashes
        others = [*beside.other.labels.tolist(), *beside.others.labels.tolist()]
        assert len(others) == 11
        assert int(one.labels) not in others


def test_every_row_has_its_number(setup, numbers):
    """Each network of a row gives it; only an attack that fails may take it away."""
    for images in numbers.values():
        for found in images.values():
            assert found["noise"]["fooled"]
            assert "missing" not in found["patterns"]
            missing = [row.key for row in rule.ROWS if row.number(found) is None]
            assert missing == []
    plain = {"noise": {"fooled": False}, "angle": {"image": {"one class": 90.0}}}
    assert [row.key for row in rule.ROWS if row.number(plain) is not None] == ["angle-image"]


def test_nine_directions_have_the_rank_and_the_lengths_of_the_attacks(setup):
    trained = setup.trained(NAME)
    one = setup.many(NAME)[[0]]
    made = make_patterns(trained, one.unit_interval(), int(one.labels), 0, measure.PATTERNS)
    control = measure.same_rank(made, torch.Generator().manual_seed(0)).flatten(1).double()
    noise = made.noise["adversarial"].flatten(1).double()
    assert torch.linalg.matrix_rank(control, rtol=1e-4) == len(made.targets)
    torch.testing.assert_close(control.norm(dim=1), noise.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", rule.ALL)
def test_untrained_twins_are_alive(name):
    """No kernel is zero, the seed decides them, and they are not the trained ones."""
    start, again = untrained.start_of(name), untrained.start_of(name)
    trained = dict(models.load(name).named_parameters())
    for key, parameter in start.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[key])
        if parameter.dim() > 1:
            assert parameter.any()
            assert not torch.equal(parameter, trained[key])


def test_a_run_continues(setup, numbers, monkeypatch):
    """Finished images are read again, and nothing is measured."""
    monkeypatch.setattr(run.numbers, "measure", None)
    run.compute_judgement(setup, lambda what, share: None)
    assert read_json(setup.folder / run.KEY / f"{NAME}.json")["draws"] == numbers


def test_the_section_has_a_claim_for_each_row_of_the_network(setup):
    section = judgement_section(setup.folder)
    claims = [block for block in section.blocks if isinstance(block, Claim)]
    assert len(claims) == sum(NAME in row.networks for row in rule.ROWS)
    assert judgement_section(Path("nowhere")) is None


# intervals and verdicts


def test_intervals_cover_the_median():
    """At 95 %, about 95 of 100 intervals hold the true median."""
    source = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        found = verdict.interval_of(list(source.normal(size=60)), "median", 0.95)
        hits += found.low <= 0 <= found.high
    assert 88 <= hits <= 100


def made(*means):
    """Draws of images with numbers around the means, for a row with one number."""
    source = np.random.default_rng(1)
    return {
        str(seed): [{"n": mean + 0.01 * source.normal()} for _ in range(50)]
        for seed, mean in enumerate(means)
    }


def row(above=True):
    return rule.Row("key", "It is.", "1", rule.at("n"), "number", ("a", "b"), 1.0, "reason", above)


CASES = {
    "all": ({"a": made(2, 2), "b": made(2, 2)}, True),
    "one-fails": ({"a": made(2, 2), "b": made(0, 0)}, False),
    "draws-differ": ({"a": made(2, 0), "b": made(2, 2)}, None),
    "one-unclear": ({"a": made(2, 2), "b": made(1, 1)}, None),
    "one-fails-one-unclear": ({"a": made(0, 0), "b": made(1, 1)}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case):
    networks, expected = CASES[case]
    assert verdict._judged(row(), networks).holds is expected
    if case != "one-unclear" and case != "one-fails-one-unclear":
        opposite = {True: False, None: None, False: True}
        both = verdict._judged(row(above=False), {"a": networks["a"]})
        alone = verdict._judged(row(), {"a": networks["a"]})
        assert both.holds is opposite[alone.holds]


def test_the_rule_has_the_level_of_all_its_intervals():
    assert sum(len(row.networks) for row in rule.ROWS) == rule.INTERVALS
    assert pytest.approx(rule.ERROR) == rule.INTERVALS * (1 - rule.LEVEL)
    assert len({row.key for row in rule.ROWS}) == len(rule.ROWS)


def test_the_page_has_the_rule():
    """What was written before the run is what the code judges by."""
    page = Path(__file__).parent.parent / "docs" / "study-rule.md"
    assert rule.rule_page() in page.read_text()
