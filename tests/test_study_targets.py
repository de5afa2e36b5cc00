"""Experiment 2: attacks, hyperplanes and ratios against plain twins; resuming; the page."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adjointbackmap import data, models, plots
from adjointbackmap.report.sections import Claim, Picture, Scene, Table
from adjointbackmap.sources import Subject
from adjointbackmap.study import setup as setups
from adjointbackmap.study.adversarial import targets, targets_report
from adjointbackmap.study.results import kept
from adjointbackmap.study.setup import Setup, Trained, read_json, write_json

NETWORKS = ("vgg7-nobias-cifar10", "vgg7-cifar10")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Both networks on the images that ship, computed once."""
    made = Setup(tmp_path_factory.mktemp("study"), NETWORKS, sample=True)
    targets.compute_targets(made, lambda what, share: None)
    return made


@pytest.fixture
def results(setup):
    return {name: (found, arrays) for name, found, arrays in kept(setup.folder / targets.KEY)}


@pytest.fixture
def changed(setup, tmp_path, monkeypatch):
    """The page of results that were changed, without its pictures."""
    monkeypatch.setattr(plots, "save", lambda drawing, path, formats: path)

    def page(change):
        for file in (setup.folder / targets.KEY).glob("*cifar10.*"):
            (tmp_path / targets.KEY).mkdir(exist_ok=True)
            (tmp_path / targets.KEY / file.name).write_bytes(file.read_bytes())
        path = tmp_path / targets.KEY / "vgg7-cifar10.json"
        found = read_json(path)
        change(found)
        write_json(path, found)
        return targets_report.targets_section(tmp_path)

    return page


def plain_hyperplanes(trained, pixels, label):
    """Slow twin: a network of pieces is its gradient by input and biases."""
    module = trained.subject.module
    images = []
    biases = []
    for x in trained.input(pixels).split(1):
        x = x.detach().requires_grad_()
        parts = [bias for name, bias in module.named_parameters() if name.endswith("bias")]
        found = torch.autograd.grad(module(x)[0, label], [x, *parts])
        images.append(found[0][0])
        biases.append(torch.cat([b.flatten() for b in found[1:]]) if parts else torch.zeros(0))
    return torch.stack(images), torch.stack(biases)


@pytest.mark.parametrize("name", NETWORKS)
def test_attacks_are_ten_steps_down_the_loss_of_each_class(setup, results, name):
    """Slow twin of the attack at three classes: steps of 0.008 before, 0.04 after normalising."""
    found, arrays = results[name]
    trained = setup.trained(name)
    start = setup.one(name).unit_interval()
    std = torch.tensor(models.CIFAR_STD).view(3, 1, 1)
    step = 0.04 * std if "nobias" in name else 0.008
    for target in found["shown"][:3]:
        pixels = start.clone()
        for _ in range(10 if target != found["label"] else 0):
            pixels.requires_grad_()
            loss = F.cross_entropy(
                trained.subject.module(trained.input(pixels)), torch.tensor([target])
            )
            pixels = (
                (pixels - step * torch.autograd.grad(loss, pixels)[0].sign()).clamp(0, 1).detach()
            )
        theirs = torch.from_numpy(arrays["inputs"][found["shown"].index(target)])
        assert (
            (pixels[0] - theirs).abs() > 1e-4
        ).float().mean() < 0.01  # a sign may turn where a slope is nearly zero
    for attack in found["attacks"]:
        x = torch.from_numpy(arrays["inputs"][found["shown"].index(attack["target"])])[None]
        shares = trained.subject.module(trained.input(x)).softmax(1)[0].detach()
        assert attack["given"] == int(shares.argmax())
        assert attack["confidence"] == pytest.approx(float(shares.max()), abs=1e-5)
        assert attack["reached"] == (attack["given"] == attack["target"])
        assert attack["l2"] == pytest.approx(float((x - start).norm()), rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_hyperplanes_and_ratios_are_those_of_plain_gradients(setup, results, name):
    found, arrays = results[name]
    trained = setup.trained(name)
    image, bias = plain_hyperplanes(trained, torch.from_numpy(arrays["inputs"]), found["label"])
    assert np.abs(arrays["image"] - image.numpy()).max() < 1e-4 * image.abs().max()
    assert arrays["bias"].shape == bias.shape == (20, len(trained.network.biases))
    assert set(found["ratios"]) == ({"image", "bias"} if len(trained.network.biases) else {"image"})
    for part, points in (("image", image.flatten(1)), ("bias", bias)):
        if not points.numel():
            continue
        red = points[:10].double()
        black = points[10:].double()
        distances = [torch.pdist(group).mean() for group in (red, black)]
        assert found["ratios"][part]["distances"]["value"] == pytest.approx(
            float(distances[0] / distances[1]), rel=1e-4
        )
        variances = [group.var(0).sum() for group in (red, black)]
        assert found["ratios"][part]["variances"]["value"] == pytest.approx(
            float(variances[0] / variances[1]), rel=1e-4
        )
        own = red[found["shown"].index(found["label"])]
        for attack in found["attacks"]:
            change = (red[found["shown"].index(attack["target"])] - own).norm() / own.norm()
            assert attack["changed"][part] == pytest.approx(float(change), rel=1e-3)


def test_images_of_other_classes_are_known_and_of_others(setup, results):
    for name, (found, arrays) in results.items():
        trained = setup.trained(name)
        labels = torch.tensor(found["others"])
        scores = trained.subject.module(trained.input(torch.from_numpy(arrays["inputs"][10:])))
        assert (scores.argmax(1) == labels).all()
        assert found["label"] not in labels
        assert len(set(found["settings"]["others"])) == 10


def test_results_stay_and_other_settings_are_refused(setup, results, monkeypatch):
    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(targets, "measure_targets", refuse)
    heard = []
    targets.compute_targets(setup, lambda what, share: heard.append(share))
    assert heard == [0.0, 0.5, 1.0]
    for other in (
        Setup(setup.folder, NETWORKS[:1], seed=1, sample=True),
        Setup(setup.folder, NETWORKS[:1], "ship", sample=True),
    ):
        with pytest.raises(
            ValueError,
            match=r"must hold results of this run.s settings. Got others .*: name another",
        ):
            targets.compute_targets(other, lambda what, share: None)


def test_page_is_made_from_the_files_alone(setup, results, monkeypatch):
    for place, name in ((models, "load"), (data, "load"), (data, "sample")):
        monkeypatch.setattr(place, name, None)
    monkeypatch.setattr(setups.Trained, "subject", None)
    monkeypatch.setattr(setups.Trained, "network", None)
    section = targets_report.targets_section(setup.folder)
    assert section.key == targets.KEY
    assert all(h[:8] in section.ran[2] for h in results["vgg7-cifar10"][0]["settings"]["others"])
    pictures = [block.path for block in section.blocks if isinstance(block, Picture)]
    kinds = [
        [p.stem.removeprefix(f"{name}-") for p in pictures if p.stem.startswith(name)]
        for name in NETWORKS
    ]
    assert pictures[0].stem == "ratios"
    assert kinds == [
        ["inputs", "image", "tsne-image"],
        ["inputs", "image", "bias", "tsne-image", "tsne-bias"],
    ]
    assert all(
        (setup.folder / path).with_suffix(s).is_file()
        for path in pictures
        for s in (".png", ".svg", ".npz")
    )
    scenes = [block for block in section.blocks if isinstance(block, Scene)]
    assert [[len(points) for points in scene.groups.values()] for scene in scenes] == [[10, 10]] * 3
    assert all([len(labels) for labels in scene.labels.values()] == [10, 10] for scene in scenes)
    assert scenes[0].labels["under attack, and without noise"][7] == "horse (no noise)"
    summary = next(block for block in section.blocks if isinstance(block, Table)).sheet
    assert [len(row) for row in summary.rows] == [len(summary.head)] * 2
    assert summary.rows[0][-3:] == ["none"] * 3
    shown = np.load(setup.folder / targets.KEY / "vgg7-cifar10-bias.npz")["maps_1"]
    assert np.array_equal(
        shown[0], plots.near_square(torch.from_numpy(results["vgg7-cifar10"][1]["bias"][10]))
    )


def test_claims_follow_the_numbers(changed):
    def narrow(found):
        found["ratios"]["bias"]["distances"]["value"] = 0.79
        found["attacks"][0] |= {"given": 9, "reached": False}
        found["attacks"][1]["changed"]["image"] = 0.4

    section = changed(narrow)
    claims = [block for block in section.blocks if isinstance(block, Claim)]
    assert [claim.holds for claim in claims[2:]] == [False, False]
    assert "least change of an attack: image part 0.40" in claims[3].measured
    sheets = [block.sheet for block in section.blocks if isinstance(block, Table)]
    assert sheets[0].rows[1][2] == "8 of 9"
    assert sheets[2].rows[0][:3] == ["airplane", "truck", "**no**"]


def test_there_is_no_page_without_results(tmp_path):
    assert targets_report.targets_section(tmp_path) is None


def test_of_a_hundred_classes_nine_are_drawn():
    @dataclass(frozen=True)
    class Untrained(Trained):
        @property
        def subject(self):
            return Subject(
                network, torch.nn.Identity(), data.CIFAR100_CLASSES, "untrained", (3, 32, 32)
            )

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100)).eval()
    pixels = torch.rand(1, 3, 32, 32)
    (first, found), (again, _), (other, _) = (
        targets.attack_targets(Untrained("untrained", None, True), pixels, 5, seed)
        for seed in (0, 0, 1)
    )
    assert len(found.adversarial) == len(set(first.tolist())) == 9
    assert first.equal(again)
    assert first.equal(first.sort().values)
    assert not first.equal(other)
    assert 5 not in first
