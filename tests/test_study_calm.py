"""Networks trained for calm hyperplanes: how they are read, measured, chosen and reported."""

import json
import shutil
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch

from adjointbackmap import cli, data, models
from adjointbackmap.study.calm import measure
from adjointbackmap.study.calm.candidates import Candidate
from adjointbackmap.study.calm.choice import choose, other_sheet, turn_ratio, verdict
from adjointbackmap.study.calm.page import calm_markdown

NAME = "vgg7-cifar10"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two folders as train writes them, and the sample in the place of every split."""
    monkeypatch.setattr(data, "load", lambda *arguments: data.sample()[:12])
    assets = resources.files("adjointbackmap") / "assets"
    for folder in ("plain", "other"):
        (tmp_path / folder).mkdir()
        for suffix in (".json", ".safetensors"):
            shutil.copy(str(assets / f"{NAME}{suffix}"), tmp_path / folder)
    return tmp_path


def test_a_candidate_is_its_folder(runs):
    """Its scores are those of the shipped network whose files are in it."""
    found = Candidate.of(runs / "plain", None, "test")
    pixels = found.images.unit_interval()
    module = models.load(NAME)
    with torch.no_grad():
        scores, expected = found.subject.module(found.input(pixels)), module(pixels)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.known, expected.argmax(1) == found.images.labels)
    assert found.words.startswith("plain, weight decay 0.0003")


def test_unfinished_and_damaged_runs_are_refused(runs):
    with pytest.raises(ValueError, match=r"one finished training, with weights and card\. Got"):
        Candidate.of(runs, None, "test")
    weights = runs / "plain" / f"{NAME}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"mend")
    with pytest.raises(ValueError, match="train it again"):
        assert Candidate.of(runs / "plain", None, "test").subject


def test_turn_and_share_are_those_of_autograd(runs):
    """For one image, with random signs and PGD from the same draws."""
    found = Candidate.of(runs / "plain", None, "test")
    one = found.images[found.known][[0]]
    label = int(one.labels)
    generator = torch.Generator().manual_seed(3)
    numbers = measure.at_radius(found, one, 2 / 255, generator, slow=False)
    again = torch.Generator().manual_seed(3)
    torch.randint(2**31, (), generator=again)
    signs = torch.randint(2, (1, 3, 32, 32), generator=again) * 2.0 - 1
    pixels = one.unit_interval()
    shaken = (pixels + 2 / 255 * signs).clamp(0, 1)
    x = torch.cat([pixels, shaken]).requires_grad_()
    scores = models.load(NAME)(x)[:, label]
    (slopes,) = torch.autograd.grad(scores.sum(), x)
    own, other = torch.nn.functional.normalize(slopes.flatten(1).double(), dim=1)
    turn = (own @ other).clamp(-1, 1).acos().rad2deg()
    assert numbers["random"]["turn"] == pytest.approx(float(turn), rel=1e-3)
    assert 0 < numbers["random"]["flips"] < numbers["PGD"]["flips"] < 0.2
    pixels_part = float((slopes[0] * x[0]).sum().detach() / scores[0].detach())
    assert measure.bias_share(found, one) == pytest.approx(1 - pixels_part, rel=1e-2)


def network(title, clean, turn):
    """Numbers of a network with turns around one."""
    near = {"PGD": {"turn": turn}, "random": {"turn": turn / 2}}
    images = [
        {"2": {k: {"turn": v["turn"] + 0.4 * (n - 9.5)} for k, v in near.items()}}
        for n in range(20)
    ]
    return {"title": title, "accuracies": {"clean": clean}, "images": images}


CHOICES = {
    "least-turn-near": ([(0.88, 20), (0.87, 15), (0.80, 5)], "1", "2 networks at most 4 points"),
    "within-eight": ([(0.83, 20), (0.825, 15), (0.5, 5)], "1", "2 networks at most 8 points"),
    "none": ([(0.5, 1)], "", "no network is within 8 points"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice_is_the_rule(case):
    others, expected, words = CHOICES[case]
    networks = [network(str(n), clean, turn) for n, (clean, turn) in enumerate(others)]
    found = choose(network("plain", 0.9, 40), networks)
    assert found.title == expected
    assert words in found.reason


@pytest.mark.parametrize(
    ("turn", "word"), [(10, "reached"), (30, "not reached"), (20, "cannot tell")]
)
def test_aim_is_half_of_the_twins_turn(turn, word):
    twin = network("plain", 0.9, 40)
    ratio = turn_ratio(twin, network("other", 0.9, turn))
    assert ratio.value == pytest.approx(turn / 40, abs=0.02)
    assert verdict(ratio) == word


def test_command_measures_chooses_and_writes(runs, capsys, monkeypatch):
    """The other network is the same one: the ratio of its turn is 1, and the aim is not reached."""
    monkeypatch.setattr(measure, "ATTACKED", 4)
    monkeypatch.setattr(measure, "APGD_STEPS", 3)
    page = runs / "page.md"
    shutil.copy(Path(__file__).parent.parent / "docs" / "study-calm.md", page)
    words = ["study", "calm", str(runs / "plain"), str(runs / "other"), "--images", "2"]
    words += ["--out", str(runs / "out"), "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", ["adjointbackmap", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    text = page.read_text()
    assert "Chosen: other; the least median turn on validation images of the 1" in text
    assert "is 1 (" in text
    assert "The aim of half is" in text
    found = json.loads((runs / "results" / "study-calm.json").read_text())
    assert [len(found[split]) for split in ("validation", "test")] == [2, 2]
    assert calm_markdown(found) in text
    assert len(other_sheet(found["test"]).rows) == 2
    assert "Chosen: other" in capsys.readouterr().out


def test_folders_of_one_name_are_refused(runs, capsys, monkeypatch):
    (runs / "more").mkdir()
    shutil.copytree(runs / "plain", runs / "more" / "plain")
    words = ["study", "calm", str(runs / "plain"), str(runs / "more" / "plain")]
    monkeypatch.setattr(sys, "argv", ["adjointbackmap", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code
    assert "Each training must have a folder of its own name" in capsys.readouterr().err
