"""The benchmark: equal hyperplanes from ours and every peer, resuming, tables from the file."""

import json
import re
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_cli import run as run  # the fixture
from torch import nn

import adjointbackmap as abm
from adjointbackmap.benchmark import (
    entries,
    figures,
    fresh,
    networks,
    peers,
    runs,
    table,
    timing,
    ways,
)
from adjointbackmap.benchmark.aims import aims
from adjointbackmap.files.checked import read_sealed
from adjointbackmap.planes.planner import METHODS

TINY = ways.Settings(
    quick=True,
    repeats=1,
    few=2,
    some=2,
    images=2,
    networks=("vgg7",),
    sides=(8, 16),
    depths=(1,),
    most=1e9,
)
LAYER = "2.conv2"  # of depth/1
UNITS = (slice(14, 18), 16, slice(3))  # in the middle, so that receptive fields are whole


@pytest.fixture(scope="module")
def subject():
    """A residual block at 32 x 32."""
    return networks.benchmark_network("depth/1")


@pytest.fixture(scope="module")
def ours(subject):
    """Image and bias parts of the units, ``(units, pixels)`` and ``(units, biases)``."""
    numbers = ways.numbers_of(subject.network.layer(LAYER), UNITS)
    return ways.planes_at(subject, LAYER, UNITS, numbers)


def all_units(subject):
    numbers = ways.numbers_of(subject.network.layer(LAYER), UNITS)
    return peers.Work(subject.model, (LAYER,), subject.x[:1], numbers)


def skip_missing(peer):
    if peer.is_missing:
        pytest.skip(f"{peer.needs} is not installed: see docs/peers.md")


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("memory_format", peers.MEMORY_FORMATS)
@pytest.mark.parametrize("title", [t for t, p in peers.PEERS.items() if p.of == "units"])
@pytest.mark.filterwarnings("ignore")
def test_a_peers_hyperplanes_are_ours(subject, ours, title, memory_format):
    """Of every unit, in batches that do not come out even; bias parts where it has them."""
    peer = peers.PEERS[title]
    skip_missing(peer)
    image, bias = peer.call(replace(all_units(subject), memory_format=memory_format), 12, 5)
    assert_close(image, ours[0])
    assert (bias is not None) == (peer.gives == peers.IMAGE_AND_BIAS)
    if bias is not None:
        assert_close(bias, ours[1])


@pytest.mark.parametrize("memory_format", peers.MEMORY_FORMATS)
def test_columns_of_jacfwd_are_ours(subject, ours, memory_format):
    """Every column of the image and of the biases."""
    at = all_units(subject)
    found = peers.by_jacfwd(replace(at, memory_format=memory_format), len(at.vector), 512)
    assert_close(found[at.units], torch.cat(ours, 1))


@pytest.mark.parametrize("method", METHODS)
def test_our_methods_are_held_against_the_same_units(subject, ours, method):
    """The tuple that a method of ours is asked for names the units that the peers take."""
    assert method in ways.able(subject.network, LAYER, UNITS)
    planes = abm.hyperplanes(subject.network, subject.x[:1], LAYER, "RM2", UNITS, method=method)
    by_number = (
        planes.image[0].movedim(1, 0).flatten(0, 1).flatten(1)
    )  # units (row, channel) to the order of (channel, row)
    assert_close(by_number, ours[0])


@pytest.mark.parametrize("title", peers.CLASS_PEERS)
@pytest.mark.filterwarnings("ignore")
def test_classes_of_a_peer_are_ours(title):
    """Of a batch of images, each class; Captum's are multiplied by the image."""
    peer = peers.CLASS_PEERS[title]
    skip_missing(peer)
    vgg7 = networks.benchmark_network("vgg7")
    planes = abm.hyperplanes(vgg7.network, vgg7.x[:3], "fc", "RM0")
    expected = planes.image.flatten(2) * (planes.x.flatten(1)[:, None] if peer.times_image else 1)
    image, bias = peer.call(peers.Work(vgg7.model, ("fc",), vgg7.x[:3]), 3, 2)
    assert_close(image, expected)
    assert (bias is not None) == (peer.gives == peers.IMAGE_AND_BIAS)
    if bias is not None:
        assert_close(bias, planes.bias_part)


def test_a_peer_with_other_hyperplanes_is_left_out(subject):
    """It is named with the difference, and is no one's best peer."""
    wrong = peers.Peer(lambda *given: (2 * peers.by_jacrev(*given)[0], None))
    broken = peers.Peer(lambda *given: [].pop())
    with pytest.raises(IndexError):  # a mistake in our own code is not hidden as a refusal
        ways.peer_ways(subject, LAYER, UNITS, {"broken": broken}, TINY)
    measured = ways.peer_ways(
        subject, LAYER, UNITS, {"wrong": wrong, "missing": replace(wrong, needs="nowhere")}, TINY
    )
    assert measured["wrong"] == {"left_out": "its hyperplanes differ by 1 of the largest entry"}
    assert measured["missing"] == {"left_out": "nowhere is not installed"}


def test_a_method_by_units_is_extrapolated_and_one_that_is_too_much_left_out(subject):
    """As the plan's multiply-adds tell; no method is known by its name."""
    measured = {
        m: ways.ours(subject, LAYER, ways.ALL, m, TINY) for m in ways.able(subject.network, LAYER)
    }
    assert measured["adjoint"]["measured"] == "2 of 16,384 units"
    assert "the most is 1 G" in measured["basis"]["left_out"]
    assert "measured" not in measured["windowed"]


def test_every_layer_of_an_image_and_the_sweep():
    """Ours, jacfwd with every layer as its output, and the multiplications of the sweep."""
    layers, sweep = (of("side/8", TINY) for of in (entries.layers_entry, entries.sweep_entry))
    assert layers["units"] == 2 * 16 * 64 + 2 * 16 * 16
    assert layers["ways"]["jacfwd, every layer at once"]["difference"] < 1e-5
    assert layers["ways"]["all layers"]["seconds"] > 0
    assert 0 < sweep["gflops"]["touching"] <= sweep["gflops"]["products"]


def test_classes_of_a_batch():
    """Of two images; bias parts where a peer has them."""
    entry = entries.classes_entry("vgg7", TINY)
    assert entry["units"] == 20
    assert entry["ways"][entry["plan"]]["seconds"] > 0
    assert entry["ways"]["FullGrad"]["difference"] < 1e-5


def test_resnet18_has_the_standard_layout():
    """The parameters that torchvision's has."""
    names = dict(networks.built("resnet18")[0].named_parameters())
    assert sum(p.numel() for p in names.values()) == 11_689_512
    assert names["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)


def test_random_weights_are_the_same_on_every_call():
    """And leave the global generator as it was."""
    build = partial(nn.Linear, 3, 2)
    before = torch.random.get_rng_state()
    first = networks.with_random_weights(build)
    second = networks.with_random_weights(build)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_multiply_adds_are_counted():
    """All, and those that read what is there and not the padding."""
    x = torch.rand(2, 3, 4, 4)
    w = torch.rand(5, 3, 3, 3)
    with timing.Counter() as counted, torch.no_grad():
        nn.functional.conv2d(x, w, padding=2)
        torch.rand(2, 3) @ torch.rand(3, 4)
    assert counted.products == 2 * 5 * 6 * 6 * 27 + 24
    assert counted.touching == 2 * 4 * 4 * 5 * 27 + 24


def test_memory_of_a_run_is_told_and_bounded():
    """What a run takes at its peak; one that wants more than there is fails with an error."""
    mib = timing.growth(lambda: torch.ones(2**24).sum())
    assert mib is None or 60 < mib < 70
    if mib is not None:
        with pytest.raises(RuntimeError, match="memory"), timing.within_memory():
            torch.empty(2**45)


def test_what_is_needed_once_is_counted_once():
    """Ten units took 3 s of which 1 s is the pass forward: a hundred take 21 s."""
    found = timing.extrapolated({"seconds": 3.0, "fastest": 2.0}, 1.0, 10, 100, "units")
    assert found == {"seconds": 21.0, "fastest": 11.0, "measured": "10 of 100 units"}


def test_exponent_is_the_power():
    """Of exact powers, and none from one size."""
    assert table.exponent([32, 64, 128], [3 * 32**2, 3 * 64**2, 3 * 128**2]) == "2.00"
    assert table.exponent([32], [1]) == "-"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A finished run of the networks that grow, without its warm-up."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "QUICK", TINY)
        patch.setattr(runs, "warm_up", lambda settings: None)
        runs.run_benchmark(out, "side", quick=True)
    return out


def test_a_stopped_run_goes_on(file, tmp_path, monkeypatch):
    """An entry that is missing is measured, the others are kept."""
    found = read_sealed(file)
    assert list(found["entries"]) == ["side/8", "side/16"]
    removed = found["entries"].pop("side/8")
    copy = tmp_path / "bench.json"
    copy.write_text(json.dumps(found))
    monkeypatch.setattr(runs, "QUICK", TINY)
    monkeypatch.setattr(runs, "warm_up", lambda settings: None)
    names = []
    again = runs.run_benchmark(
        copy, "side", quick=True, report=lambda name, share: names.append(name)
    )
    assert names == ["side/8"]
    assert list(again["entries"]) == ["side/8", "side/16"]
    assert again["entries"]["side/16"] == found["entries"]["side/16"]
    assert again["entries"]["side/8"]["units"] == removed["units"]
    assert read_sealed(copy) == again


def way(seconds, **facts):
    return {"seconds": seconds, "fastest": seconds, "runs": 1, "mib": 1.0, **facts}


def test_tables_are_made_from_the_file(file, tmp_path):
    """A changed figure in the file changes the page, which keeps the text around the marks."""
    found = json.loads(file.read_text())
    entry = found["entries"]["side/8"]
    entry["ways"][entry["plan"]] = way(123.0) | {"mib": 4567.0}
    page = tmp_path / "page.md"
    page.write_text(f"above\n{runs.SPEED_PLACE.begin}\nold\n{runs.SPEED_PLACE.end}\nbelow\n")
    runs.SPEED_PLACE.check(page)
    runs.SPEED_PLACE.fill(page, table.speed_markdown(found))
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| 8 |"))
    assert "| 123 s | 4,567 MiB |" in row
    assert "| power of the size |" in text


def test_the_best_peer_has_image_and_bias_parts():
    """A faster one without bias parts is not it; a plan's choice that is too slow is a defect."""
    ways = {
        "first": way(1.0, multiply_adds=10**9, cost=1),
        "second": way(0.5),
        "whole": way(8.0, peer=True, gives=peers.IMAGE_AND_BIAS),
        "image": way(4.0, peer=True, gives=peers.ONLY_IMAGE),
        "none": {"left_out": "refused"},
    }
    entry = {"units": 2, "which": "2", "mode": "RM2", "full": True, "plan": "first", "ways": ways}
    assert table.best_of(entry, peer=True)[0] == "whole"
    assert table.best_of(entry, peer=True, whole=False)[0] == "image"
    assert figures.defects({"entries": {"vgg7/conv1": entry}}) == ["vgg7/conv1 (2.00)"]
    assert figures.defects({"entries": {"vgg7/conv1": {**entry, "plan": "none"}}}) == [
        "vgg7/conv1 (inf)"
    ]
    (row,) = aims({"vgg7/conv1": entry}).rows
    worst = "the plan's choice, worst in vgg7/conv1"
    assert row == [worst, "the best method", "at most 1.2 x", "2 x", "no"]
    (row,) = table.plan_and_peers({"vgg7/conv1": entry}).rows
    assert row[-4:] == ["2.00 (defect)", "-", "whole, 8 s", "8 x"]


def test_aims_are_at_least_or_at_most():
    """Ratios to the commit before and to a peer are reached from above, the others from below."""
    known = {
        "before/vgg7/conv3": {"ways": {"old": way(3.2), "now": way(2.0)}, "pair": ["old", "now"]},
        "before/vgg7/conv5": {"ways": {"old": way(3.2), "now": way(2.0)}, "pair": ["old", "now"]},
        "float64/vgg7": {"ways": {"f64": way(2.1), "f32": way(1.0)}, "pair": ["f64", "f32"]},
        "busy/vgg7": {"ways": {"2": way(1.1), "1": way(1.0)}, "pair": ["2", "1"]},
        "held/vgg7": {"ways": {"without": way(0.009), "held": way(0.004)}},
        "vgg7/classes": {"ways": {"adjoint": way(1.0), "FullGrad": way(1.5)}, "plan": "adjoint"},
    }
    known["held/vgg7"]["pair"] = ["without", "held"]
    known["vgg7/classes"]["which"] = "640"
    rows = {(row[0], row[1]): row[2:] for row in aims(known).rows}
    before = "the commit before"
    assert rows["vgg7/conv3, all units", before] == ["1.6 x", "1.6 x", "yes"]
    assert rows["vgg7/conv5, all units", before] == ["2.5 x", "1.6 x", "no"]
    assert rows["float64/vgg7, f64", "f32"] == ["at most 2 x", "2.1 x", "no"]
    assert rows["busy/vgg7, 2", "1"] == ["at most 1.2 x", "1.1 x", "yes"]
    assert rows["held/vgg7, one unit", "itself"] == ["at most 3 ms", "4 ms", "no"]
    assert rows["vgg7/classes, 640 units", "FullGrad"] == ["1 x", "1.5 x", "yes"]
    (first, *_) = table.in_one_run(known).rows
    assert first == ["before/vgg7/conv3", "old", "3.2 s", "now", "2 s", "1.6 x"]


def test_an_older_commit_is_measured_with_its_own_package(tmp_path, monkeypatch):
    """In a fresh process that takes the package from its folder, or not at all."""
    monkeypatch.setattr(fresh, "ROUNDS", 1)
    older = tmp_path / "older"
    (older / "src").mkdir(parents=True)
    (older / "src" / "adjointbackmap").symlink_to(fresh.NOW / "adjointbackmap")
    entry = fresh.before_entry("side/8", replace(TINY, before=str(older)))
    assert entry["pair"] == ["the commit before", "now"]
    assert all(w["seconds"] > 0 for w in entry["ways"].values())
    with pytest.raises(ValueError, match=r"--before must be a worktree .* Got .*nothing: make"):
        runs.run_benchmark(tmp_path / "out.json", quick=True, before=tmp_path / "nothing")
    with pytest.raises(RuntimeError, match=r"work conv77 must run with the package in .*\. Got"):
        fresh.fresh("conv77", fresh.NOW, 1, 1)


def test_cores_are_busy_only_while_they_are_measured(monkeypatch):
    """One process per core, and none is left behind."""
    begun = []
    start = subprocess.Popen

    def spy(*args):
        begun.append(start(*args))
        return begun[-1]

    monkeypatch.setattr(fresh.subprocess, "Popen", spy)
    monkeypatch.setattr(fresh.os, "cpu_count", lambda: 2)
    with fresh.busy_cores():
        assert [process.poll() for process in begun] == [None, None]
    assert all(process.poll() is not None for process in begun)
    found = {2: 3.0, 1: 2.0}
    monkeypatch.setattr(fresh, "fresh", lambda name, source, threads, repeats: found[threads])
    entry = fresh.busy_entry(TINY)
    assert [entry["ways"][title]["seconds"] for title in entry["pair"]] == [3.0, 2.0]


def test_held_and_float64_entries_have_two_ways():
    """They are measured on the shipped network."""
    tiny = replace(TINY, repeats=1)
    held = entries.held_entry("depth/1", tiny)
    assert held["pair"] == ["without", "held"]
    double = entries.float64_entry("depth/1", tiny)
    assert all(w["seconds"] > 0 for e in (held, double) for w in e["ways"].values())


def test_command_measures_and_prints(run, monkeypatch, tmp_path):
    """One entry into a file, a second call finds it; the tables are printed."""
    monkeypatch.setattr(runs, "QUICK", TINY)
    monkeypatch.setattr(runs, "warm_up", lambda settings: None)
    out = tmp_path / "new" / "bench.json"
    for _ in range(2):
        status, text, err = run("bench", "--quick", "--only", "side/8", "--out", str(out))
        assert status == 0, err
        assert "not figures to keep" in " ".join(text.split())
    assert list(json.loads(out.read_text())["entries"]) == ["side/8"]


BAD_INPUT = {
    "no such entry": (
        ("--only", "conv77"),
        "--only must be part of an entry's name, such as machine/rate, .* Got 'conv77'",
    ),
    "no repeats": (("--repeats", "0"), "--repeats must be at least 1. Got 0"),
    "no threads": (("--threads", "0"), "--threads must be at least 1. Got 0"),
    "no page": (("--docs", "nowhere.md"), "--docs must be a page with the lines .* Got nowhere.md"),
    "another file": (
        ("--out", "{file}"),
        "--out must be a file of this benchmark, or a new one. Got .*delete it",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, case):
    """Before anything is measured."""
    words, message = BAD_INPUT[case]
    file = tmp_path / "other.json"
    file.write_text('{"entries": {}}')
    status, _, err = run("bench", "--quick", *(word.format(file=file) for word in words))
    assert status == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("adjointbackmap: ")
    assert re.search(message, line), line


def test_a_file_from_elsewhere_is_refused(file, tmp_path):
    """Figures of two machines are not mixed, nor a quick look with figures to keep."""
    found = read_sealed(file)
    copy = tmp_path / "bench.json"
    copy.write_text(json.dumps({**found, "environment": {**found["environment"], "torch": "1.0"}}))
    with pytest.raises(
        ValueError,
        match=r"must be measured with the same environment. Got .*bench.json with another",
    ):
        runs.run_benchmark(copy, "side", quick=True)
    with pytest.raises(ValueError, match="must be measured with the same quick"):
        runs.run_benchmark(file, "side")


def test_a_quick_look_has_no_aims():
    """It measures too little to say whether they are reached."""
    entry = {"ways": {"a": {"seconds": 1.0}, "b": {"seconds": 2.0, "peer": True}}, "plan": "a"}
    entry |= {"size": 8, "full": True}
    known = {"vgg7/conv1": entry}
    found = [table.short({"entries": known, "quick": quick}) for quick in (False, True)]
    titles = [[sheet.title for sheet in sheets] for sheets in found]
    assert titles[0] == ["Aims", *titles[1]]
