"""study all and report: the commands from one end to the other, and what they refuse."""

from dataclasses import replace

import pytest
from test_cli import run as run  # the fixture

from adjointbackmap import models
from adjointbackmap.study import everything
from adjointbackmap.study.adversarial import noise
from adjointbackmap.study.everything import EXPERIMENTS
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.setup import Setup

NETWORK = "vgg7-nobias-cifar10"
OTHER = "vgg7-cifar10"


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """An experiment that takes no time and draws nothing: the images that it was run on."""
    seen = []

    def measure(trained, image):
        seen.append(image.hashes[0])
        return {}, {}

    monkeypatch.setattr(noise, "measure_noise", measure)
    monkeypatch.setitem(
        EXPERIMENTS, "noise", replace(EXPERIMENTS["noise"], section=lambda folder: None)
    )
    return seen


def test_command_runs_the_experiments_and_tells_what_was_run(run, tmp_path, measured):
    """Each network with its own settings; nothing twice; the page is made again from the folder."""
    asked = ("study", "all", "--sample", "--only", "noise", "--out", str(tmp_path))
    for images, name in (("3", NETWORK), ("3", NETWORK), ("2", OTHER)):
        assert run(*asked, "--images", images, "--network", name)[0] == 0
    assert len(measured) == 2
    told = everything.about(tmp_path)
    assert {name: settings.split(", ")[1] for name, settings in told["settings"].items()} == {
        NETWORK: "3 images",
        OTHER: "2 images",
    }
    assert set(told["seconds"]) == {"noise"}
    trained = Setup(tmp_path, (NETWORK,), sample=True).trained(NETWORK)
    place = trained.images.hashes.index(measured[0])
    assert trained.known[place]
    assert trained.images.classes[int(trained.images.labels[place])] == "horse"
    page = tmp_path / "report.html"
    before = page.read_text()
    page.unlink()
    assert run("report", str(tmp_path))[0] == 0
    assert page.read_text() == before
    assert NETWORK in before
    assert "3 images" in before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "nothing"), "--only must be some of verification, pictures"),
        (("--network", "nothing"), "--network must be some of vgg7-nobias-cifar10"),
        (
            ("--network", "vgg7-cifar100"),
            "Got vgg7-cifar100: leave it out",
        ),  # the sample has none of its images
        (("--images", "0"), "--images must be at least 1. Got 0"),
        (("--only", "noise", "--image", "zzz"), "--image must be a class, or the first digits"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, words, message):
    """With what was expected and what came."""
    status, _, err = run(
        "study", "all", "--sample", "--network", NETWORK, "--out", str(tmp_path), *words
    )
    assert status == 2
    assert message in err


def test_folder_without_results_is_refused(run, tmp_path):
    """By name."""
    status, _, err = run("report", str(tmp_path))
    assert status == 2
    assert "must hold the results of adjointbackmap study all" in err


def test_all_networks_with_images_are_taken(monkeypatch):
    """In the order of the study; with the sample those of CIFAR-10 alone."""
    from adjointbackmap.study.setup import check_setup

    assert check_setup(None, 1, sample=False) == tuple(
        sorted(models.names(), key=list(PUBLISHED_COLUMNS).index)
    )
    assert all(name.endswith("cifar10") for name in check_setup(None, 1, sample=True))
