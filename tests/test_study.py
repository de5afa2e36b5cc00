"""The study's verification: published figures, intervals, resuming, the page."""

import json
import math
import sys
from functools import cache

import pytest
import torch
from cases import enliven
from torch import nn

import adjointbackmap as abm
from adjointbackmap import cli, data, models
from adjointbackmap.engine.folding import fold
from adjointbackmap.exactness import verification as runs
from adjointbackmap.exactness.layer_check import LayerCheck
from adjointbackmap.sources import NetworkOptions, Subject
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.verification import outputs, page, results_file
from adjointbackmap.study.verification import run as verification
from adjointbackmap.study.verification.run import Counts
from adjointbackmap.study.verification.summation import orders, outside_alone
from adjointbackmap.study.verification.tally import Tally, design_effect, interval

NETWORK = "vgg7-cifar10"
FEW = Counts(2, 1, 3, 1)
EXAMPLE = torch.zeros(1, 3, 32, 32)


class Small(nn.Module):
    """A network in place of the shipped one, with layers of the same names."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6, 10, bias=False)

    def forward(self, x):
        maps = self.conv1(torch.relu(self.bn0(self.conv0(x))))
        return self.fc(torch.relu(maps).mean((2, 3)))


class SmallSubject(Subject):
    """It is traced once for all tests."""

    def trace(self, device="cpu"):
        return traced(self.module)


traced = cache(lambda module: abm.trace(module, EXAMPLE))


@cache
def small(source):
    """The small network as the options ask for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small().eval()
        enliven(model)
    module = fold(model, EXAMPLE).model if source.fold else model
    return SmallSubject(module, nn.Identity(), (), source.name, (3, 32, 32))


@pytest.fixture(scope="module")
def network():
    """The small network, folded."""
    return small(NetworkOptions(NETWORK, fold=True)).trace()


@pytest.fixture(scope="module")
def shipped():
    """The shipped network, folded."""
    return abm.trace(fold(models.load(NETWORK), EXAMPLE).model, EXAMPLE)


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Run the study on ten images and a small network; return which images were computed."""
    monkeypatch.setattr(data, "load", lambda *arguments: data.sample()[:10])
    right = runs.verify_images
    seen = []

    def spy(network, batch, names, *rest):
        seen.extend(names)
        return right(network, batch, names, *rest)

    monkeypatch.setattr(runs, "verify_images", spy)
    monkeypatch.setattr(verification, "load_subject", small)

    def run(counts=FEW, **arguments):
        seen.clear()
        return verification.verify_networks(tmp_path, [NETWORK], counts, **arguments)["networks"][
            NETWORK
        ], list(seen)

    return run


@pytest.fixture(scope="module")
def layers():
    """Tallies of made-up units, three outside."""
    good = LayerCheck("conv1", 100, 100, 100)
    bad = LayerCheck("conv1", 100, 97, 98, rounded=3, outside=1e-7)
    tally = Tally(LayerCheck("conv1"))
    for check in (good, bad):
        check.signed[19] = 100
        tally.add(check)
    return {"conv1": tally.to_dict()}


def results(layers):
    """Results of made-up units of a network without bias."""
    part = {"images": 2, "seconds": 7200.0, "layers": layers, "environments": [0, 1]}
    entry = {"runs": {"float32": {"convolutions": part}, "float64": {"convolutions": part}}}
    environment = {"cpu": "a processor", "threads": 1, "torch": "2", "python": "3"}
    machines = [environment, {**environment, "gpu": "a card"}]
    return {
        "format": 2,
        "environments": machines,
        "networks": {"fixup-resnet20-nobias-cifar10": entry},
    }


def test_every_column_names_a_network_and_its_layers():
    """Layers of the untrained network, but the first; shares as printed."""
    for name, column in PUBLISHED_COLUMNS.items():
        kernels = [
            n.removesuffix(".weight")
            for n, p in models.build(name).named_parameters()
            if p.dim() > 1
        ]
        assert list(column.shares) == kernels[1:]
        assert all(99.97 <= share < 100 for share in column.shares.values())
    assert (
        PUBLISHED_COLUMNS["resnet20-cifar100"].shares["conv17"]
        == PUBLISHED_COLUMNS["resnet20-cifar100"].shares["conv18"]
        == 99.9705
    )
    assert PUBLISHED_COLUMNS["vgg7-cifar10"].shares["fc"] == 99.991


def test_interval_of_independent_units_is_that_of_wilson():
    """Against the equation whose roots its ends are: |share - p| = z sqrt(p (1 - p) / n)."""
    low, high = interval(10_000, 30, 30, 30)
    for end in (low, high):
        assert abs(0.997 - end) == pytest.approx(
            1.959964 * math.sqrt(end * (1 - end) / 10_000), rel=1e-9
        )


def test_design_effect_is_the_variance_over_that_of_independent_units():
    """Slow twin: of the counts themselves."""
    counts = torch.tensor([0.0, 3, 9, 0, 1, 0, 0, 2], dtype=torch.float64)
    share = float(counts.sum()) / 800
    effect = design_effect(800, int(counts.sum()), 8, int((counts**2).sum()))
    assert effect == pytest.approx(float(counts.var()) / (100 * share * (1 - share)))
    assert design_effect(800, 8, 8, 8) == 1


def test_interval_holds_the_share_of_all_in_most_of_many_draws():
    """Where wrong units crowd in images, nineteen of twenty intervals have the true share."""
    generator = torch.Generator().manual_seed(0)
    crowded = torch.tensor([0.0, 0.0, 0.0, 0.04])
    held = 0
    for _ in range(400):
        shares = crowded[torch.randint(4, (100,), generator=generator)]
        counts = torch.binomial(torch.full((100,), 1000.0), shares, generator)
        low, high = interval(100_000, int(counts.sum()), 100, int((counts**2).sum()))
        held += low <= 0.99 <= high
    assert 0.91 <= held / 400 <= 0.98


def test_study_verifies_every_arithmetic(study, tmp_path, network):
    """Counts, the library's own figures, exact float64, the folded network, progress."""
    heard = []
    entry, seen = study(report=lambda what, share: heard.append((what, share)))
    assert {(f"{NETWORK}, convolutions, float64", 1.0), (f"{NETWORK}, fc, float32", 0.0)} < set(
        heard
    )
    assert all(0 <= share <= 1 for _, share in heard)
    images = data.sample()[:10].by_hash()
    assert seen == [
        images.hashes[0],
        images.hashes[1],
        images.hashes[0],
        images.hashes[0],
        images.hashes[0],
    ]  # float32, float64, sums in float64, float64 hyperplanes
    ran = {
        name: {part: found["images"] for part, found in run.items()}
        for name, run in entry["runs"].items()
    }
    assert ran["float32"] == {"fc": 3, "convolutions": 2}
    assert ran.pop(verification.WIDENED) == {"convolutions": 1}
    assert ran.pop(verification.BESIDE) == {"fc": 1, "convolutions": 1}
    assert set(map(str, (ran[name] for name in ran if name != "float32"))) == {
        "{'fc': 3, 'convolutions': 1}"
    }
    widened = abm.verify(
        network,
        images[:1].unit_interval(),
        ["conv1", "fc"],
        dtype=torch.float64,
        values=torch.float32,
        names=images.hashes[:1],
    )
    found = page.layers_of(entry, verification.WIDENED)
    assert {name: layer["check"] for name, layer in found.items()} == json.loads(
        json.dumps({name: check.to_dict() for name, check in widened.items()})
    )
    rows = page.widened_rows(entry, PUBLISHED_COLUMNS[NETWORK]).rows
    assert [row[0] for row in rows] == ["conv1", "fc"]
    assert all(row[5] and row[8] for row in rows)
    ours = abm.verify(network, images[:2].unit_interval(), ["conv1"], names=images.hashes[:2])[
        "conv1"
    ]
    layer = entry["runs"]["float32"]["convolutions"]["layers"]["conv1"]
    assert layer["check"] == json.loads(json.dumps(ours.to_dict()))
    assert layer["squares"] >= ours.units - ours.within
    for found in page.layers_of(entry, "float64").values():
        assert found["check"]["within"] == found["check"]["units"]
    assert entry["accuracy"]["images"] == 10
    assert set(entry["outside alone"]) == {"conv1", "fc"}
    assert [row[0] for row in page.sums_rows(entry).rows] == ["conv1", "fc"]
    assert entry["accuracy"]["trained"] == entry["accuracy"]["folded"]
    assert (
        json.loads((tmp_path / results_file.RESULTS).read_text())["networks"][NETWORK]["orders"][
            "conv1"
        ]["place"][0]
        in seen
    )


def test_layer_fc_by_rm0_is_as_by_tangents(study, network):
    """The same units and shares as every unit by tangents; errors within rounding."""
    entry, _ = study(Counts(1, 1, 1, 1))
    images = data.sample()[:10].by_hash()[:1]
    theirs = abm.verify(network, images.unit_interval(), ["fc"], names=images.hashes)["fc"]
    ours = LayerCheck.from_dict(page.layers_of(entry, "float32")["fc"]["check"])
    assert (
        (ours.units, ours.within, ours.zero)
        == (theirs.units, theirs.within, theirs.zero)
        == (10, 10, 0)
    )
    assert 0 < ours.scaled < 1e-6


def test_image_that_is_there_twice_counts_twice(network, tmp_path):
    """In the run that computes it and in the next one."""
    images = data.sample()[[0, 1, 0]]
    terms = runs.terms_of(network, ["fc"])
    arguments = (
        network,
        images.unit_interval(),
        terms,
        images.hashes,
        lambda share: None,
        tmp_path / "kept.jsonl",
    )
    for _ in range(2):
        assert sorted(name for name, _ in outputs.outputs_verified(*arguments)) == sorted(
            images.hashes
        )


def test_later_run_only_adds(study):
    """More images: the new ones are computed. Fewer: none, and what is there stays."""
    study()
    entry, seen = study(Counts(3, 1, 4, 1))
    assert seen == [data.sample()[:10].by_hash().hashes[2]]
    assert entry["runs"]["float32"]["fc"]["images"] == 4
    again, seen = study(Counts(1, 1, 1, 1))
    assert seen == []
    assert {part: run["images"] for part, run in again["runs"]["float32"].items()} == {
        "fc": 4,
        "convolutions": 3,
    }
    assert page.layers_of(again, "float32") == page.layers_of(entry, "float32")


def test_results_alone_are_enough_to_go_on(study, tmp_path):
    """Without the files of finished images, only what the results lack is computed again."""
    whole, _ = study(Counts(3, 1, 4, 1))
    for name in (results_file.RESULTS, *(path.name for path in tmp_path.glob("*.jsonl"))):
        (tmp_path / name).unlink()
    study()
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    entry, seen = study(Counts(3, 1, 4, 1))
    assert seen == [data.sample()[:10].by_hash().hashes[2]]
    ours, theirs = (found["runs"]["float32"] for found in (entry, whole))
    assert ours["convolutions"]["layers"] == theirs["convolutions"]["layers"]
    assert ours["fc"]["images"] == theirs["fc"]["images"] == 4


def test_machines_are_told_for_each_run(study, monkeypatch):
    """A second machine adds images of the convolutions alone: these were computed on both."""
    study()
    monkeypatch.setattr(
        results_file, "environment", lambda device: {"cpu": "another", "gpu": device}
    )
    entry, _ = study(Counts(3, 1, 3, 1))
    ran = {part: run["environments"] for part, run in entry["runs"]["float32"].items()}
    assert ran == {"fc": [0], "convolutions": [0, 1]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_study_on_cuda_is_computed_there(tmp_path, monkeypatch):
    """Float64 exact, the card in the results, the orders of summation of its own worst units."""
    monkeypatch.setattr(data, "load", lambda *arguments: data.sample()[:2])
    found = verification.verify_networks(tmp_path, [NETWORK], Counts(1, 1, 2, 1), device="cuda")
    entry = found["networks"][NETWORK]
    assert found["environments"][0]["gpu"] == torch.cuda.get_device_name()
    assert all(
        layer["check"]["scaled"] < 1e-13 for layer in page.layers_of(entry, "float64").values()
    )
    assert set(entry["orders"]) == {f"conv{n}" for n in range(1, 6)}
    assert sum(entry["outside alone"].values()) < 20  # a thousand of an image's would be, in TF32


def test_interrupt_keeps_finished_images(study, monkeypatch, tmp_path):
    """Ctrl-C in the second image: the first is kept, the next run computes the others alone."""
    right = runs.verify_images
    second = data.sample()[:10].by_hash().hashes[1]

    def stopped(network, batch, names, *rest):
        if second in names:
            raise KeyboardInterrupt
        return right(network, batch, names, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "verify_images", stopped)
        with pytest.raises(KeyboardInterrupt):
            study()
    kept = json.loads((tmp_path / results_file.RESULTS).read_text())["networks"][NETWORK]["runs"][
        "float32"
    ]["convolutions"]
    assert kept["images"] == 1
    entry, seen = study()
    assert seen[0] == second
    assert len(seen) == 4
    assert "first" not in entry["runs"]["float32"]["convolutions"]


@pytest.mark.parametrize("count", [0, -3, 11])
def test_other_numbers_of_images_are_refused(study, count):
    """Zero is not the default; the message tells how many there are."""
    with pytest.raises(ValueError, match=rf"must be from 1 to 10\. Got {count}: leave it out"):
        study(Counts(1, count, None, 1))


def test_unknown_network_is_refused():
    """The message lists the shipped ones."""
    with pytest.raises(
        ValueError, match=f"--network must be one of .*{NETWORK}.* Got nothing: leave it out"
    ):
        verification.check_networks(["nothing"])
    assert verification.check_networks([NETWORK]) == [NETWORK]
    assert NETWORK in verification.check_networks(None)


def test_other_files_are_no_results(tmp_path):
    """Neither text nor another JSON."""
    for text in ("no JSON", "[]", '{"format": 0}'):
        (tmp_path / results_file.RESULTS).write_text(text)
        with pytest.raises(
            ValueError,
            match=(
                r"must be a file that study verification wrote. "
                r"Got .*: delete it or name another"
            ),
        ):
            verification.verify_networks(tmp_path, [])


def test_orders_of_summation(shipped):
    """One unit: every sum is near the value, in float64 far nearer."""
    image = data.sample()[:1].unit_interval()[0]
    found = orders(shipped, image, ("here", (8, 2, 4)), "conv3", 1 / 8)
    value = float(abm.hyperplanes(shipped, image, "conv3", "RM2", (2, 4, 8), own_bias=False).value)
    assert found["value"] == pytest.approx(value)
    assert found["magnitude"] > abs(value)
    assert abs(found["errors"]["float64"]) < 1e-11
    assert all(abs(error) < 1e-2 for error in found["errors"].values())


def test_units_that_the_network_alone_takes_outside(shipped):
    """Units whose float64 value is far from float32's: no class, few of a convolution."""
    x = data.sample()[:2].unit_interval()
    assert outside_alone(shipped, x, ["fc"]) == {"fc": 0}
    assert 0 <= outside_alone(shipped, x, ["conv1"])["conv1"] < 10


def test_page_has_tables_and_figures(tmp_path, layers):
    """A short row is marked; the rest of the page stays; results and figures lie beside it."""
    there = tmp_path / "there.md"
    found = results(layers)
    place = page.VERIFICATION_PLACE
    there.write_text(f"Before.\n\n{place.begin}\n\nearlier tables\n\n{place.end}\n\nAfter.\n")
    file = tmp_path / "run" / results_file.RESULTS
    file.parent.mkdir()
    file.write_text(json.dumps(found))
    written = page.write_page(found, file, there)
    text = there.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "earlier tables" not in text
    assert "| conv1 | >= 99.997 | 99.00000 | **short** | 98.50000 |" in text
    assert (
        "| caption of Fig. 2.5 |  |  | 2 | 0 | 1, 2 "
        "| 1 of 1 | 1 of 1 | 98.50000 | 2 | 0 | 1, 2 | 4.0 |"
    ) in text
    assert (
        "Measured on 1: a processor, 1 threads, torch 2, Python 3; "
        "2: a card beside a processor, 1 threads"
    ) in text
    assert "| **short** |" in text
    assert (tmp_path / "results" / results_file.RESULTS).read_text() == file.read_text()
    pictures = [path for path in written if path.suffix == ".png"]
    assert [path.name.rsplit("-", 1)[1] for path in pictures] == ["signed.png", "absolute.png"]
    assert all(path.name in text and path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    page.write_page(found, file, there)
    assert there.read_text() == text
    assert page.off_in_float64(found) == ["fixup-resnet20-nobias-cifar10"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line and return its exit status, output and errors."""

    def run(*words):
        monkeypatch.setattr(
            sys, "argv", ["adjointbackmap", "study", "verification", *map(str, words)]
        )
        monkeypatch.setattr(cli.console, "width", 200, raising=False)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.usefixtures("study")
def test_command_writes_results_and_page(run, tmp_path):
    """From nothing to the page; then the page again from the results alone."""
    there = tmp_path / "docs" / "verified-networks.md"
    out = tmp_path / "out"
    there.parent.mkdir()
    there.write_text(f"{page.VERIFICATION_PLACE.begin}\n{page.VERIFICATION_PLACE.end}\n")
    names = ("--network", NETWORK, "--network", "fixup-resnet20-nobias-cifar10")
    counts = ("--images", 1, "--images-float64", 1, "--images-fc", 2, "--images-widened", 1)
    status, text, err = run(*names, *counts, "--out", out, "--docs", there)
    assert status == 0, err
    assert "vgg7-cifar10, Table 3.3" in text
    assert "verification-vgg7-cifar10-signed.png" in text.replace("\n", "")
    before = there.read_text()
    there.write_text(f"{page.VERIFICATION_PLACE.begin}\n{page.VERIFICATION_PLACE.end}\n")
    status, _, err = run(
        "--results", there.parent / "results" / results_file.RESULTS, "--docs", there
    )
    assert status == 0, err
    assert there.read_text() == before


@pytest.mark.usefixtures("study")
def test_command_stopped_still_writes_the_tables(run, tmp_path, monkeypatch):
    """Ctrl-C: status 130, and the tables of what is there."""

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "verify_images", stopped)
    status, text, err = run(
        "--images",
        1,
        "--images-float64",
        1,
        "--images-fc",
        2,
        "--images-widened",
        1,
        "--out",
        tmp_path / "out",
    )
    assert status == 130
    assert "finished work is kept" in err
    assert "│ fc " in text


def test_command_ends_with_status_2_if_float64_is_off(run, tmp_path, layers):
    """The page is written all the same."""
    file = tmp_path / "results" / results_file.RESULTS
    there = tmp_path / "there.md"
    file.parent.mkdir()
    file.write_text(json.dumps(results(layers)))
    there.write_text(f"{page.VERIFICATION_PLACE.begin}\n{page.VERIFICATION_PLACE.end}\n")
    status, _, err = run("--results", file, "--docs", there)
    assert status == 2
    assert "in float64. Got some that are not, in fixup-resnet20-nobias-cifar10" in err
    assert "conv1" in there.read_text()


def test_bad_options_are_one_line(run, tmp_path):
    """Before anything is computed."""
    (tmp_path / "bare.md").write_text("no marks")
    (tmp_path / "marked.md").write_text(
        f"{page.VERIFICATION_PLACE.begin}\n{page.VERIFICATION_PLACE.end}\n"
    )
    for words, message in (
        (("--docs", tmp_path / "bare.md"), "--docs must be a page with the lines"),
        (("--results", tmp_path / "none.json"), "add --docs PAGE"),
        (
            ("--results", tmp_path / "none.json", "--docs", tmp_path / "marked.md"),
            "must be a file that study verification wrote",
        ),
        (("--network", "resnet21"), "--network must be one of"),
    ):
        status, _, err = run(*words, "--out", tmp_path / "out")
        assert status == 2
        assert message in err
    assert not (tmp_path / "out").exists()
