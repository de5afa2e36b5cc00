"""The pictures of the study: numbers against slow twins, resuming, the section."""

import json
import statistics

import pytest
import torch

import adjointbackmap as abm
from adjointbackmap import data, models, plots
from adjointbackmap.analysis import boundaries, crossings
from adjointbackmap.analysis.fields import Sparsity, sparsity
from adjointbackmap.report.sections import Claim, Picture, Table
from adjointbackmap.spectra import high_share
from adjointbackmap.study.pictures import panels, surroundings
from adjointbackmap.study.pictures import run as pictures
from adjointbackmap.study.pictures.tables import (
    picture_claims,
    region_table,
    sparsity_table,
    white_noise,
)
from adjointbackmap.study.setup import Setup, read_json

BIASED = "vgg7-cifar10"
PLAIN = "vgg7-nobias-cifar10"


@pytest.fixture(scope="module")
def fast():
    """Small parts in place of minutes: no kinks, one layer beside made-up counts, few panels."""
    patch = pytest.MonkeyPatch()
    counted = []

    def few(network, x):
        counted.append("sparsity")
        return {**sparsity(network, x, ["conv0"]), "conv1": Sparsity("conv1", 10, 2, 1, 100, 40)}

    def near(network, image, most):
        counted.append("regions")
        planes = boundaries.boundaries(network, image, 0, [1, 2])
        reached = {norm: crossings.reach(network, planes, norm) for norm in ("l2", "linf")}
        return boundaries.Analysis(0, {}, reached, ())

    patch.setattr(surroundings, "sparsity", few)
    patch.setattr(surroundings, "analyse", near)
    patch.setattr(pictures, "sparse_images", lambda trained: 1)
    patch.setattr(panels, "MOST_IN_ROW", 2)
    patch.setattr(plots.units, "MOST_PANELS", 2)
    yield counted
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory, fast):
    """Both networks and three images."""
    setup = Setup(tmp_path_factory.mktemp("study"), (BIASED, PLAIN), images=3, sample=True)
    heard = []
    pictures.compute_pictures(setup, lambda what, share: heard.append((what, share)))
    return setup, heard


def kept(run, name):
    return read_json(run[0].folder / "pictures" / f"{name}.json")


def test_images_are_the_first_that_every_network_knows(run):
    """Two ships and a frog, the same for both networks."""
    setup, _ = run
    sample = data.sample().by_hash()
    known = setup.trained(BIASED).known & setup.trained(PLAIN).known
    ships, frogs = (
        (known & (sample.labels == label)).nonzero().flatten().tolist() for label in (8, 6)
    )
    expected = [sample.hashes[i] for i in (*ships[:2], frogs[0])]
    assert (
        kept(run, BIASED)["settings"]["images"]
        == kept(run, PLAIN)["settings"]["images"]
        == expected
    )


def test_too_few_images_are_refused(run, monkeypatch):
    monkeypatch.setitem(pictures.SHOWN_CLASSES, "cifar10", ("ship",) * 30)
    with pytest.raises(
        ValueError,
        match=r"There must be 30 test images of a ship that every shipped network knows. Got \d+: ",
    ):
        pictures.shown_images(run[0], BIASED)


def test_two_ships_differ_as_a_slow_twin_says(run):
    """By autograd on the trained network."""
    sample = data.sample()
    model = models.load(BIASED)
    slopes = []
    for hashed in kept(run, BIASED)["settings"]["images"][:2]:
        x = sample[[sample.hashes.index(hashed)]].unit_interval().requires_grad_()
        slopes.append(torch.autograd.grad(model(x)[0, 8], x)[0].flatten().double())
    cosine = slopes[0] @ slopes[1] / (slopes[0].norm() * slopes[1].norm())
    change = 2 * (slopes[0] - slopes[1]).norm() / (slopes[0].norm() + slopes[1].norm())
    found = kept(run, BIASED)["same class"]
    assert found["class"] == "ship"
    assert found["image"]["angle"] == pytest.approx(float(cosine.acos().rad2deg()), rel=1e-3)
    assert found["image"]["change"] == pytest.approx(float(change), rel=1e-3)
    assert "bias" in found
    assert "bias" not in kept(run, PLAIN)["same class"]


def test_spectra_over_many_are_those_of_each_image(run):
    """Slow twin: each image alone, and its energy by a loop over the frequencies of one channel."""
    setup, _ = run
    many = setup.many(BIASED)
    found = kept(run, BIASED)["many"]
    for n in range(len(many)):
        shares = []
        for channel in many[n].unit_interval()[0]:
            energy = torch.fft.fft2(channel).abs().square()
            energy[0, 0] = 0
            rows = torch.fft.fftfreq(32)
            high = [
                (i, j)
                for i in range(32)
                for j in range(32)
                if float(rows[i]) ** 2 + float(rows[j]) ** 2 > 1 / 16
            ]
            shares.append(float(sum(energy[i, j] for i, j in high) / energy.sum()))
        assert found["high"]["images"][n] == pytest.approx(sum(shares) / 3, rel=1e-3)
    x = setup.trained(BIASED).input(many.unit_interval()).requires_grad_()
    scores = models.load(BIASED)(x)
    slopes = (
        torch.autograd.grad(scores.gather(1, many.labels[:, None]).sum(), x)[0].flatten(1).double()
    )
    between = {"one class": [], "two classes": []}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        cosine = slopes[i] @ slopes[j] / (slopes[i].norm() * slopes[j].norm())
        between["one class" if many.labels[i] == many.labels[j] else "two classes"].append(
            float(cosine.acos().rad2deg())
        )
    assert found["angles"]["two classes"]["median"] == pytest.approx(
        statistics.median(between["two classes"]), rel=1e-3
    )


def test_white_noise_has_the_same_energy_at_every_frequency():
    """Its share above 0.25 is the share of such frequencies, counted one by one, without DC."""
    squares = [min(k, 32 - k) ** 2 / 32**2 for k in range(32)]
    high = sum(a + b > 1 / 16 for a in squares for b in squares)
    assert white_noise() == pytest.approx(high / (32**2 - 1), rel=1e-6)
    noise = torch.randn(200, 32, 32, generator=torch.Generator().manual_seed(0))
    assert high_share(noise).mean() == pytest.approx(white_noise(), abs=2e-3)


def test_positions_are_pairs_of_whole_fields(run):
    """Conv1 sees 5 x 5 pixels: 28 x 28 positions at most, each pair once."""
    found, deeper = kept(run, BIASED)["positions"]
    assert (found["layer"], deeper["layer"]) == ("conv1", "conv3")
    assert 2 <= found["positions"] <= 28**2
    assert (
        0 <= found["angles"]["low"] <= found["angles"]["median"] <= found["angles"]["high"] <= 180
    )


def test_positions_are_spread_evenly(monkeypatch):
    """Every third of twenty from the second on; all of six."""
    monkeypatch.setattr(panels, "MOST_IN_ROW", 8)
    network = abm.trace(
        torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1)).eval(), torch.zeros(1, 1, 20, 6)
    )
    rows, columns = panels.positions(network.layers["0"])
    assert list(range(20)[rows]) == [1, 4, 7, 10, 13, 16, 19]
    assert list(range(6)[columns]) == [0, 1, 2, 3, 4, 5]


def test_region_of_an_image_is_told_by_norm(traced_case):
    """What the analysis says of the nearest kink and boundary."""
    traced = traced_case("mlp-on-flat-inputs")
    found = abm.analyse(traced.network, traced.x[0])
    told = surroundings.beside(found)
    for norm in ("l2", "linf"):
        nearest = found.boundaries[norm][0]
        assert (
            told[norm]["boundary"]
            == min(b.distance for b in found.boundaries[norm])
            == nearest.distance
        )
        assert told[norm]["kink"] == found.kinks[norm].distance
        assert told[norm]["in region"] == nearest.in_region
    json.dumps(told)


def test_finished_work_is_not_done_again(run, fast, monkeypatch):
    """Neither pictures nor images; other images of the spectra are refused."""
    setup, heard = run
    assert heard[-1] == ("pictures", 1.0)
    assert all(0 <= share <= 1 for _, share in heard)
    assert fast.count("sparsity") == 2
    assert fast.count("regions") == 6
    monkeypatch.setattr(
        pictures, "measure_pictures", lambda *arguments: pytest.fail("computed again")
    )
    before = kept(run, BIASED)
    pictures.compute_pictures(setup, lambda what, share: None)
    assert len(fast) == 8
    assert kept(run, BIASED) == before
    with pytest.raises(ValueError, match=r"Got others \(many .*\): name another folder"):
        pictures.compute_pictures(
            Setup(setup.folder, (PLAIN,), images=4, sample=True), lambda what, share: None
        )


def test_section_needs_the_files_alone(run, monkeypatch):
    """The section needs no network and no data; without biases there is no picture of them."""
    setup, _ = run
    for module, name in ((models, "load"), (data, "sample"), (data, "load")):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("loaded"))
    section = pictures.pictures_section(setup.folder)
    assert sum(isinstance(block, Claim) for block in section.blocks) == 14
    tables = [block.sheet for block in section.blocks if isinstance(block, Table)]
    assert [len(sheet.rows) for sheet in tables] == [2, 2, 4, 2, 2]
    assert tables[0].rows[0][4] == ""
    assert tables[0].rows[1][4] != ""
    shown = [block for block in section.blocks if isinstance(block, Picture)]
    names = [picture.path.name for picture in shown]
    assert f"{BIASED}-bias-parts.png" in names
    assert f"{PLAIN}-bias-parts.png" not in names
    assert len(names) == len(set(names)) == 8 + 20 + 19
    assert {
        f"{BIASED}-RM{mode}-conv{layer}.png" for mode in (1, 2, 3, 4) for layer in (1, 4)
    } < set(names)
    assert all(
        (setup.folder / picture.path).with_suffix(s).is_file()
        for picture in shown
        for s in (".png", ".svg", ".npz")
    )
    assert [picture.published for picture in shown[:3]] == ["Fig. 2.8", "Fig. 2.9", "Fig. 2.10"]


def test_claims_that_numbers_do_not_bear_out_do_not_hold(run):
    """Reversed claims: alike hyperplanes, low frequencies, whole fields, a near boundary."""
    found = kept(run, BIASED)
    found["same class"]["image"] = {"angle": 5.0, "change": 0.1}
    found["many"]["high"] = {"images": [0.5] * 3, "hyperplanes": [0.1, 0.1, 0.9]}
    found["high by layer"] = {"conv0": [0.5], "conv1": [0.1]}
    found["positions"][1]["positions"] = 1
    found["positions"][0]["angles"] = {"low": 1.0, "median": 3.0, "high": 4.0}
    for image in found["sparsity"].values():
        image["found"]["conv1"] |= {"zero": 0, "full": image["found"]["conv1"]["hyperplanes"]}
    for image in found["regions"].values():
        image["found"]["l2"] |= {"kink": 1.0, "boundary": 20.0, "in region": True}
    told = list(picture_claims(BIASED, found))
    assert [claim.holds for claim in told] == [False] * 7
    assert "larger for 33.3 % of 3 images" in told[1].measured
    assert "all-zero RM4 hyperplanes in 0 of 1 layers" in told[5].measured
    assert (
        "20 (20 to 20) times as far in l2; it is in the region for 3 of 3 images"
        in told[6].measured
    )


def test_tables_count_images_once():
    """Two images of made-up counts and distances."""
    counts = {"layer": "conv1", "hyperplanes": 10, "zero": 2, "full": 1, "pixels": 100, "used": 40}
    image = {"found": {"conv1": counts}, "seconds": 1.0}
    sheet = sparsity_table(
        "net",
        {"sparsity": {"a": image, "b": {"found": {"conv1": counts | {"zero": 4}}, "seconds": 1.0}}},
    ).sheet
    assert sheet.rows == [["conv1", "20", "30.00", "40.00", "10.00"]]
    near = {"kink": 0.5, "ends region": True, "boundary": 2.0, "in region": False, "changes": True}
    far = near | {"kink": None, "ends region": False, "boundary": None, "changes": False}
    table = region_table(
        {"net": {"regions": {"a": {"found": {"l2": near}}, "b": {"found": {"l2": far}}}}}
    )
    assert table.sheet.rows == [
        ["net", "l2", "2", "0.5 (0.5 to 0.5)", "50.0", "2 (2 to 2)", "0.0", "50.0"]
    ]


def test_no_results_are_no_section(tmp_path):
    assert pictures.pictures_section(tmp_path) is None
