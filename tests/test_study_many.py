"""Experiments 1 and 3 on many images: numbers, resume, failures, claims."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import adjointbackmap as abm
from adjointbackmap import data, models
from adjointbackmap.report.sections import Claim, Picture, Table
from adjointbackmap.study.adversarial import many, many_report, noise
from adjointbackmap.study.adversarial.scaled import spread_of
from adjointbackmap.study.setup import SCALE, Setup

NETWORKS = ("vgg7-nobias-cifar10", "vgg7-cifar10")
PATTERNS = 3


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few patterns, and batches of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "PATTERNS", PATTERNS)
        patch.setattr(many, "BATCH", 2)
        yield


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Two images under both networks."""
    setup = Setup(tmp_path_factory.mktemp("study"), NETWORKS, images=2, sample=True)
    heard = []
    many.compute_many(setup, lambda what, share: heard.append(share))
    assert heard[-1] == 1
    assert all(0 <= share <= 1 for share in heard)
    return setup


def results(setup, name):
    """Results by image."""
    return json.loads((setup.folder / many.KEY / f"{name}.json").read_text())["images"]


def made_up(spread=2.0, **changes):
    """A result in which every claim holds."""
    ratios = {
        f"{before}{m} {part}": spread
        for before in ("", "control ")
        for m in ("distances", "variances")
        for part in many_report.PARTS
    }
    found = {
        **{
            "label": 0,
            "before": 0,
            "after": 1,
            "steps": 2,
            "l2": 0.4,
            "linf": 0.008,
            "fooled": True,
        },
        **{"pixels changed": 0.01, "inputs changed": 0.02, "changed": {"image": 0.5, "bias": 0.3}},
        **{"angle": {"image": 60.0, "bias": 9.0}, "median angle": {"image": 50.0, "bias": 8.0}},
        **{"errors": {"H_adv": 1e-6, "H_orig": 0.4}, "class with H_orig": 5, "near kinks": [1, 2]},
        **{"flipped": {"conv0": 0.1, "conv1": 0.02}, "gates flipped": 12, "gates": 200},
        "spread": {**ratios, "redrawn": 7, "targets": 9, "missing": None},
    }
    return found | changes


@pytest.mark.parametrize("name", NETWORKS)
def test_image_has_the_numbers_of_experiment_1_and_3(setup, name):
    """In a batch as alone; the angles by their cosines."""
    trained = setup.trained(name)
    for image, found in results(setup, name).items():
        one = trained.images[trained.images.hashes.index(image)]
        alone, _ = noise.measure_noise(trained, one)
        assert found["fooled"]
        assert {key: found[key] for key in ("label", "before", "after", "steps")} == {
            "label": alone["label"],
            **{key: alone["attack"][key] for key in ("before", "after", "steps")},
        }
        assert found["flipped"] == pytest.approx(alone["flipped"], abs=1e-3)
        assert found["gates"] == sum(alone["gates"].values()) == 110_592
        assert found["gates flipped"] == pytest.approx(
            sum(s * alone["gates"][n] for n, s in alone["flipped"].items()), abs=5
        )
        for part, changes in alone["changed"].items():
            assert found["changed"][part] == pytest.approx(changes[found["label"]], rel=1e-2)
        network, again, rebuilt = (
            np.array(alone["outputs"][key]) for key in ("network", "H_adv", "H_orig")
        )
        assert found["errors"]["H_orig"] == pytest.approx(
            np.abs(rebuilt - network).max() / np.abs(network).max(), rel=1e-2
        )
        assert (
            found["errors"]["H_adv"] < 1e-4 > np.abs(again - network).max() / np.abs(network).max()
        )
        assert found["class with H_orig"] == rebuilt.argmax()
        assert set(found["angle"]) == set(alone["changed"])
    assert found["spread"] == spread_of(
        trained, one.unit_interval(), found["label"], setup.seed, PATTERNS
    )  # of the last one


def test_angles_are_those_between_the_hyperplanes(setup):
    """By the cosine, from the hyperplanes before and after the attack."""
    trained = setup.trained(NETWORKS[1])
    image, found = next(iter(results(setup, NETWORKS[1]).items()))
    one = trained.images[trained.images.hashes.index(image)]
    attacked = many.attacked_pair(trained, one).found.adversarial
    planes = [
        abm.hyperplanes(trained.network, trained.input(x), "fc", "RM0", scale=SCALE)
        for x in (one.unit_interval(), attacked)
    ]
    for part in many_report.PARTS:
        before, after = (getattr(p, part)[0].double().flatten(1) for p in planes)
        degrees = torch.nn.functional.cosine_similarity(before, after).arccos().rad2deg()
        assert found["angle"][part] == pytest.approx(float(degrees[found["label"]]), rel=1e-3)
        assert found["median angle"][part] == pytest.approx(float(degrees.median()), rel=1e-3)


def test_stopped_run_goes_on(tmp_path, monkeypatch):
    """Ctrl-C in the third image; then it alone; more images add; a new seed is a new job."""
    right = {"missing": None}
    seen = []

    def spread(trained, pixels, label, seed, patterns):
        if len(seen) == 2 and seen[-1] is not None:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(seed)
        return right

    monkeypatch.setattr(many, "spread_of", spread)

    def run(images, seed=0):
        many.compute_many(
            Setup(tmp_path, NETWORKS[:1], images=images, seed=seed, sample=True),
            lambda what, share: None,
        )
        return len(results(Setup(tmp_path, NETWORKS), NETWORKS[0]))

    with pytest.raises(KeyboardInterrupt):
        run(3)
    assert len(results(Setup(tmp_path, NETWORKS), NETWORKS[0])) == 2
    assert (run(3), len(seen)) == (3, 4)
    assert (run(4), len(seen)) == (4, 5)
    assert (run(2), len(seen)) == (2, 5)
    assert (run(1, seed=1), len(seen)) == (1, 6)
    assert (run(4), len(seen)) == (4, 6)


def test_section_is_made_of_the_files_alone(setup, monkeypatch):
    """Without any network or image at hand; a network without bias leaves its cells empty."""

    def none(*arguments):
        raise AssertionError

    for module, name in ((models, "load"), (data, "load"), (data, "sample")):
        monkeypatch.setattr(module, name, none)
    section = many_report.many_section(setup.folder)
    assert "vgg7-cifar10: 2 of 2 images" in section.ran[1]
    pictures = [block.path for block in section.blocks if isinstance(block, Picture)]
    assert [path.stem for path in pictures] == ["flipped-cifar10", "angles", "spread"]
    assert all(
        (setup.folder / path.with_suffix(f".{kind}")).is_file()
        for path in pictures
        for kind in ("png", "svg", "npz")
    )
    angles = np.load(setup.folder / many.KEY / "angles.npz")
    assert sorted(angles) == [
        "vgg7-cifar10 bias",
        "vgg7-cifar10 image",
        "vgg7-nobias-cifar10 image",
    ]
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    rows = {row[0]: row[1:] for row in table.sheet.rows}
    assert rows["images"] == ["2", "2"]
    assert rows["angle of the label's bias parts, degrees"][0] == ""
    assert " to " in rows["angle of the label's bias parts, degrees"][1]
    assert sum(isinstance(block, Claim) for block in section.blocks) == 8


def test_table_counts_failures_and_leaves_them_out():
    """Medians are those of the other images."""
    nothing = {
        **made_up(None)["spread"],
        "missing": "only 0 of 3 adversarial patterns could be made",
    }
    few = {
        **made_up(None)["spread"],
        "missing": "only 1 of 3 Gaussian patterns, 2 of 3 control patterns could be made",
    }
    found = [
        made_up(),
        made_up(4.0),
        made_up(fooled=False, steps=100),
        made_up(spread=None) | {"spread": nothing},
        made_up() | {"spread": few},
    ]
    rows = dict(many_report.distribution_table({"a network": found}).sheet.rows)
    assert [rows[row] for row in many_report.COUNTS] == ["5", "1", "1", "1", "1"]
    assert rows["steps of the attack"] == "2 (2 to 2)"
    assert rows["gates flipped, %"] == "6 (6 to 6)"
    assert rows["spread ratio, distances, image part"] == "2 (2 to 3.8)"


def test_claims_weigh_most_images():
    """They hold, fail, or cannot tell; no spread ratio, no claim about it."""
    good = [made_up() for _ in range(20)]
    bad = [
        made_up(
            0.5,
            **{
                "errors": {"H_adv": 0.1, "H_orig": 0.0},
                "class with H_orig": 1,
                "inputs changed": 0.6,
                "gates flipped": 2,
            },
        )
        for _ in range(20)
    ]
    assert [claim.holds for claim in many_report.many_claims({"a": good})] == [True] * 8
    assert [claim.holds for claim in many_report.many_claims({"a": good, "b": bad})] == [False] * 8
    assert [claim.holds for claim in many_report.many_claims({"a": good + bad})] == [False] + [
        None
    ] * 7
    assert [
        claim.holds for claim in many_report.many_claims({"a": [made_up(None, fooled=False)]})
    ] == [None] * 4
    assert "a: 20 of 20 (84 to 100 %)" in list(many_report.many_claims({"a": good}))[1].measured


def test_section_of_nothing_is_none(tmp_path: Path):
    """No results, or none that is finished."""
    assert many_report.many_section(tmp_path) is None
    (tmp_path / many.KEY).mkdir()
    (tmp_path / many.KEY / f"{NETWORKS[0]}.json").write_text(
        '{"job": {}, "asked": 3, "images": {}}'
    )
    assert many_report.many_section(tmp_path) is None
