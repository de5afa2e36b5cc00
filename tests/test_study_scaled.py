"""Experiment 3: patterns, hyperplanes and ratios against plain twins; the page."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from adjointbackmap import data, models, plots
from adjointbackmap.report.sections import Claim, Picture, Table
from adjointbackmap.sources import Subject
from adjointbackmap.study import setup as setups
from adjointbackmap.study.adversarial import noise_patterns, scaled
from adjointbackmap.study.adversarial.noise_patterns import make_patterns
from adjointbackmap.study.results import kept
from adjointbackmap.study.setup import Setup, Trained, read_json, write_json

NETWORKS = ("vgg7-nobias-cifar10", "vgg7-cifar10")
FEW = 11


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Both networks on the images that ship, computed once with few patterns."""
    made = Setup(tmp_path_factory.mktemp("study"), NETWORKS, sample=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "PATTERNS", FEW)
        scaled.compute_scaled(made, lambda what, share: None)
    return made


@pytest.fixture
def results(setup):
    return {name: (found, arrays) for name, found, arrays in kept(setup.folder / scaled.KEY)}


@pytest.fixture
def changed(setup, tmp_path, monkeypatch):
    """The page of results of the network with biases that were changed, without pictures."""
    monkeypatch.setattr(plots, "save", lambda drawing, path, formats: path)

    def page(change):
        (tmp_path / scaled.KEY).mkdir(exist_ok=True)
        for end in ("json", "npz"):
            file = setup.folder / scaled.KEY / f"vgg7-cifar10.{end}"
            (tmp_path / scaled.KEY / file.name).write_bytes(file.read_bytes())
        path = tmp_path / scaled.KEY / "vgg7-cifar10.json"
        found = read_json(path)
        change(found)
        write_json(path, found)
        return scaled.scaled_section(tmp_path)

    return page


def one(setup, name):
    image = setup.one(name)
    return setup.trained(name), image.unit_interval(), int(image.labels)


def classified(trained, pixels):
    with torch.no_grad():
        return trained.subject.module(trained.input(pixels)).argmax(1)


def untrained(module):
    """A network of ten classes that was never trained."""

    @dataclass(frozen=True)
    class Untrained(Trained):
        @property
        def subject(self):
            return Subject(
                module.eval(), torch.nn.Identity(), data.CIFAR10_CLASSES, "untrained", (3, 32, 32)
            )

    return Untrained("untrained", None, True)


@pytest.mark.parametrize("name", NETWORKS)
def test_adversarial_patterns_deceive_and_gaussian_ones_do_not(setup, name):
    trained, pixels, label = one(setup, name)
    made = make_patterns(trained, pixels, label, 0, 40)
    assert made.missing is None
    assert (classified(trained, made.images["adversarial"]) != label).all()
    assert all(
        (classified(trained, made.images[kind]) == label).all() for kind in ("Gaussian", "control")
    )
    assert torch.bincount(made.target)[made.targets].tolist() == [5] * 4 + [4] * 5
    assert ((made.beta > 0) & (made.beta < 1)).all()
    for kind, noise in made.noise.items():
        assert len(noise) == 40
        assert made.images[kind].equal((pixels + noise).clamp(0, 1))
    adversarial, gaussian, control = made.noise.values()
    assert len({tuple(n.flatten().tolist()) for n in gaussian}) == 40
    sure = 5 * float(adversarial.std()) / gaussian.numel() ** 0.5
    assert abs(float(gaussian.mean() - adversarial.mean())) < sure
    assert float(gaussian.std()) == pytest.approx(float(adversarial.std()), rel=0.02)
    assert float(control.var(0).mean()) == pytest.approx(float(adversarial.var(0).mean()), rel=0.02)
    by_pixel = torch.corrcoef(
        torch.stack([control.var(0).flatten(), adversarial.var(0).flatten()])
    )[0, 1]
    assert by_pixel > 0.7
    noises = {
        t: adversarial[made.target == t] / made.beta[made.target == t].view(-1, 1, 1, 1)
        for t in made.targets.tolist()
    }
    assert all((n - n[0]).abs().max() < 1e-5 for n in noises.values())


def plain_ratio(trained, images, label, part, measure, other):
    """Slow twin of a ratio: gradients by the input and the biases, spreads over pairs."""
    spreads = []
    for kind in ("adversarial", other):
        points = []
        for x in trained.input(images[kind]).split(1):
            x = x.detach().requires_grad_()
            biases = [b for n, b in trained.subject.module.named_parameters() if n.endswith("bias")]
            score = trained.subject.module(x)[0, label]
            slopes = torch.autograd.grad(score, [x] if part == "image" else biases)
            points.append(torch.cat([s.flatten() for s in slopes]).double())
        points = torch.stack(points)
        spreads.append(
            float(torch.pdist(points).mean() if measure == "distances" else points.var(0).sum())
        )
    return spreads[0] / spreads[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_spread_of_is_that_of_plain_gradients(setup, name):
    trained, pixels, label = one(setup, name)
    found = scaled.spread_of(trained, pixels, label, 0, FEW)
    made = make_patterns(trained, pixels, label, 0, FEW)
    ratios = [
        f"{b}{m} {p}"
        for b in ("", "control ")
        for p in ("image", "bias")
        for m in ("distances", "variances")
    ]
    assert list(found) == [*ratios, "redrawn", "targets", "missing"]
    assert json.loads(json.dumps(found)) == found
    assert (found["targets"], found["missing"]) == (9, None)
    assert found["redrawn"] == sum(made.redrawn.values()) > 0
    for key in ratios:
        *before, measure, part = key.split()
        if part == "bias" and "nobias" in name:
            assert found[key] is None
        else:
            other = "control" if before else "Gaussian"
            assert found[key] == pytest.approx(
                plain_ratio(trained, made.images, label, part, measure, other), rel=1e-3
            )


def test_kept_ratios_are_those_of_spread_of(setup, results):
    for name, (found, arrays) in results.items():
        trained, pixels, label = one(setup, name)
        same = scaled.spread_of(trained, pixels, label, setup.seed, FEW)
        for part, both in found["ratios"]["control"].items():
            for measure, ratio in both.items():
                assert ratio["low"] <= ratio["value"] <= ratio["high"]
                if part != "noise":
                    assert ratio["value"] == pytest.approx(same[f"control {measure} {part}"])
        assert {part: scores.shape for part, scores in arrays.items()} == dict.fromkeys(
            found["factors"], (2 * FEW, 2)
        )
        red, black = (torch.from_numpy(half) for half in np.split(arrays["image"], 2))
        value = float(torch.pdist(red).mean() / torch.pdist(black).mean())
        assert found["factors"]["image"]["distances"]["value"] == pytest.approx(value)
        assert sum(found["of"]) == FEW


def test_a_target_that_gives_too_few_leaves_the_rest_to_others(monkeypatch):
    """The first noise never deceives, the second does from 0.5 on, the third always."""
    monkeypatch.setattr(noise_patterns, "TRIES", 60)
    noises = torch.tensor([0.0, 1.0, 5.0]).view(3, 1, 1, 1)
    found = noise_patterns.scaled_down(
        noises, lambda n: n.flatten() < 0.5, 7, torch.Generator().manual_seed(0)
    )
    of, beta, redrawn = found
    assert of.tolist() in ([1] * 4 + [2] * 3, [1] * 3 + [2] * 4)
    assert (beta[of == 1] >= 0.5).all()
    assert redrawn >= 60 * 3


def test_a_network_that_nothing_deceives_has_no_ratios():
    """All scores but the label's are zero."""
    linear = torch.nn.Linear(3072, 10)
    linear.weight.data.zero_()
    linear.bias.data.copy_(torch.eye(10)[3])
    trained = untrained(torch.nn.Sequential(torch.nn.Flatten(), linear))
    pixels = torch.rand(1, 3, 32, 32)
    found = scaled.spread_of(trained, pixels, 3, 0, 4)
    assert found["missing"] == "only 0 of 4 adversarial patterns could be made"
    assert found["targets"] == found["redrawn"] == 0
    assert {value for key, value in found.items() if key.split()[-1] in ("image", "bias")} == {None}


def test_gaussian_noise_that_always_deceives_is_told(setup, monkeypatch):
    """A network that knows the image at its own pixels alone."""
    trained, pixels, label = one(setup, NETWORKS[0])
    scores = noise_patterns.scores_of

    def only(module, images, prepare):
        found = scores(module, images, prepare)
        found[:, (label + 1) % 10] += 1000 * (images != pixels).flatten(1).any(1)
        return found

    monkeypatch.setattr(noise_patterns, "scores_of", only)
    monkeypatch.setattr(noise_patterns, "TRIES", 2)
    made = make_patterns(trained, pixels, label, 0, 4)
    assert made.missing == "only 0 of 4 Gaussian patterns, 0 of 4 control patterns could be made"
    assert made.redrawn == {"adversarial": 0, "Gaussian": 8, "control": 8}


def test_patterns_are_at_least_two():
    with pytest.raises(ValueError, match=r"patterns must be at least 2, for a spread. Got 1\."):
        make_patterns(untrained(torch.nn.Identity()), torch.rand(1, 3, 32, 32), 0, 0, 1)


def test_results_stay_and_other_settings_are_refused(setup, results, monkeypatch):
    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(scaled, "measure_scaled", refuse)
    monkeypatch.setattr(scaled, "PATTERNS", FEW)
    heard = []
    scaled.compute_scaled(setup, lambda what, share: heard.append(share))
    assert heard == [0.0, 0.5, 1.0]
    monkeypatch.setattr(scaled, "PATTERNS", FEW + 1)
    with pytest.raises(
        ValueError, match=rf"Got others \(patterns {FEW}, not {FEW + 1}\): name another"
    ):
        scaled.compute_scaled(setup, lambda what, share: None)


def test_page_is_made_from_the_files_alone(setup, results, monkeypatch):
    for place, name in ((models, "load"), (data, "load"), (data, "sample")):
        monkeypatch.setattr(place, name, None)
    monkeypatch.setattr(setups.Trained, "subject", None)
    monkeypatch.setattr(setups.Trained, "network", None)
    section = scaled.scaled_section(setup.folder)
    assert section.key == scaled.KEY
    assert len(section.ran) == 3
    pictures = [block.path for block in section.blocks if isinstance(block, Picture)]
    assert [path.stem for path in pictures] == [
        "ratios-image",
        "ratios-bias",
        f"{NETWORKS[0]}-image",
        f"{NETWORKS[1]}-image",
        f"{NETWORKS[1]}-bias",
    ]
    assert all(
        (setup.folder / path).with_suffix(s).is_file()
        for path in pictures
        for s in (".png", ".svg", ".npz")
    )
    sheets = [block.sheet for block in section.blocks if isinstance(block, Table)]
    assert [len(sheet.rows) for sheet in sheets] == [4, 6]
    assert all(len(row) == len(sheet.head) for sheet in sheets for row in sheet.rows)
    assert sheets[0].rows[0][7:] == [""] * 3  # no bias part
    chart = np.load(setup.folder / scaled.KEY / "ratios-bias.npz")
    assert chart["rows_1"].tolist() == [NETWORKS[1]]
    control = results[NETWORKS[1]][0]["ratios"]["control"]["bias"]["distances"]
    assert chart["series_1"].tolist() == [[control[key] for key in ("value", "low", "high")]]


def test_claims_follow_the_intervals(changed):
    def narrow(found):
        found["ratios"]["Gaussian"]["image"]["distances"] = {"value": 1.1, "low": 0.99, "high": 1.2}
        found["ratios"]["Gaussian"]["bias"]["distances"] = {"value": 1.1, "low": 1.01, "high": 1.2}

    claims = [block for block in changed(narrow).blocks if isinstance(block, Claim)]
    assert [claim.holds for claim in claims[::2]] == [False, True]
    assert "1.10 (0.99 to 1.20)" in claims[0].measured


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    """No try, no pattern: the page says so and tests nothing."""
    monkeypatch.setattr(scaled, "PATTERNS", FEW)
    monkeypatch.setattr(noise_patterns, "TRIES", 0)
    scaled.compute_scaled(Setup(tmp_path, NETWORKS[1:], sample=True), lambda what, share: None)
    section = scaled.scaled_section(tmp_path)
    claim = next(block for block in section.blocks if isinstance(block, Claim))
    assert (claim.holds, claim.measured) == (
        None,
        "only 0 of 11 adversarial patterns could be made",
    )
    sheets = [block.sheet for block in section.blocks if isinstance(block, Table)]
    assert sheets[0].rows[0][2] == claim.measured
    assert all(len(row) == len(sheet.head) for sheet in sheets for row in sheet.rows)
    assert len(section.blocks) == 3


def test_there_is_no_page_without_results(tmp_path):
    assert scaled.scaled_section(tmp_path) is None
