"""The line of experiment 1: of a small network against dense samples; its page; resuming."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap import attacks, cli, data
from adjointbackmap.files.checked import read_sealed
from adjointbackmap.sources import CIFAR_SHAPE, Subject
from adjointbackmap.study.adversarial import lines, lines_page
from adjointbackmap.study.setup import Setup, Trained

DOCS = Path(__file__).parents[1] / "docs"
NAME = "vgg7-cifar10"  # results are kept under names of shipped networks


def small_subject():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))
    return Subject(nn.Sequential(*layers).eval(), nn.Identity(), (), "small", CIFAR_SHAPE)


class SmallTrained(Trained):
    """A small network in place of a shipped one."""

    @property
    def subject(self):
        return small_subject()

    @property
    def network(self):
        return self.subject.trace()


class SmallSetup(Setup):
    """A run with it, on images of the sample; its labels are what it predicts."""

    def trained(self, name):
        return SmallTrained(name, None, True)

    def many(self, name, count=None):
        sample = data.sample().by_hash()[: self.images]
        with torch.no_grad():
            labels = small_subject().module(sample.unit_interval()).argmax(1)
        return replace(sample, labels=labels)


@pytest.fixture
def setup(tmp_path):
    setup = SmallSetup(tmp_path, (NAME,), images=3, seed=3)
    lines.compute_lines(setup, lambda what, share: None)
    return setup


def results(setup):
    return json.loads((setup.folder / lines.KEY / f"{NAME}.json").read_text())["images"]


def test_class_changes_where_the_model_says(setup):
    """Against the model in float64 at dense places; the random end is as far as the other."""
    images = setup.many(NAME)
    model = small_subject().module.double()
    found = results(setup)
    assert sum(row["fooled"] for row in found.values()) > 1
    for n, image in enumerate(images.hashes):
        row = found[image]
        pixels = images.unit_interval()[[n]]
        start = pixels[0].double()
        settings = attacks.study_attack(1, pixels)
        made = attacks.basic_iterative(
            small_subject().module, pixels, images.labels[[n]], settings
        ).adversarial[0]
        step = made.double() - start
        assert row["l2"] == pytest.approx(float(step.norm()))
        random = lines.random_step(step, image, setup.seed)
        assert float(random.norm()) == pytest.approx(row["l2"])
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        with torch.no_grad():
            classes = model(start + t.view(-1, 1, 1, 1) * step).argmax(1)
        changes = (classes != images.labels[n]).nonzero().flatten()
        at = row["adversarial"]["class changes at"]
        assert (at is None) == (not len(changes))
        if at is not None:
            assert 0 <= float(t[changes[0]]) - at <= 1e-3
            assert row["adversarial"]["to class"] == int(classes[changes[0]])
            assert row["adversarial"]["turn until there"] <= 180
        network = abm.trace(model, start[None])
        assert row["random"]["regions"] == abm.region_line(network, start, start + random).regions


def test_finished_images_are_not_measured_again(setup, monkeypatch):
    before = results(setup)

    def refuse(*_):
        msg = "measured again"
        raise AssertionError(msg)

    monkeypatch.setattr(lines, "measure_line", refuse)
    lines.compute_lines(setup, lambda what, share: None)
    assert results(setup) == before
    with pytest.raises(AssertionError, match="measured again"):
        lines.compute_lines(replace(setup, images=4), lambda what, share: None)


def test_page_has_the_medians(setup, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{lines_page.LINE_PLACE.begin}\n{lines_page.LINE_PLACE.end}\n")
    found = lines_page.summarised(setup.folder / lines.KEY)
    lines_page.write_line_page(found, page)
    rows = list(results(setup).values())
    regions = sorted(row["adversarial"]["regions"] for row in rows)
    assert found["networks"][NAME]["adversarial"]["regions"].startswith(f"{regions[1]:,} (")
    assert found["networks"][NAME]["images"] == 3
    assert f"| `{NAME}` | 3 |" in page.read_text()
    kept = read_sealed(tmp_path / "results" / lines_page.RESULTS)
    assert lines_page.line_tables(kept)[0].rows == lines_page.line_tables(found)[0].rows
    with pytest.raises(ValueError, match="must hold results of study line"):
        lines_page.summarised(tmp_path)


def test_committed_page_shows_the_committed_results():
    found = read_sealed(DOCS / "results" / lines_page.RESULTS)
    place = lines_page.LINE_PLACE
    tables = "\n\n".join(sheet.markdown() for sheet in lines_page.line_tables(found))
    text = (DOCS / "study-line.md").read_text()
    assert f"{place.begin}\n\n{tables}\n\n{place.end}" in text


def test_command_checks_the_page_first(monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no place")
    words = ["adjointbackmap", "study", "line", "--docs", str(page), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--docs must be a page with the lines" in " ".join(capsys.readouterr().err.split())


def test_random_directions_differ_by_image_and_seed():
    step = torch.ones(3, 4, 4, dtype=torch.float64)
    drawn = [lines.random_step(step, *key) for key in (("a", 0), ("b", 0), ("a", 1), ("a", 0))]
    hashes = {hashlib.sha256(d.numpy().tobytes()).hexdigest() for d in drawn}
    assert len(hashes) == 3
