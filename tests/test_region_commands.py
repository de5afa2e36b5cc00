"""The commands line and region-map: tables, figures, numbers, and one line for bad input."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap import cli, data
from adjointbackmap.analysis.line_profile import class_change, line_profile

CLASSES = 4


def small_network() -> nn.Module:
    """What --model names in these tests."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 2, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, CLASSES))
    return nn.Sequential(*layers)


SMALL = ("--model", f"{__name__}:small_network", "--image", "horse")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command into a folder, and return its exit status, output and errors."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])  # however pytest imported it

    def run(command: str, *words: str) -> tuple[int, str, str]:
        out = ("--out", str(tmp_path / "found"))
        monkeypatch.setattr(sys, "argv", ["adjointbackmap", command, *SMALL, *words, *out])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def horse():
    """The image, in float64."""
    sample = data.sample()
    return sample.unit_interval()[sample.labels == 7][0].double()


def test_line_to_black(run, tmp_path):
    """Figures of the tables are those of the line; the numbers of the figure are exact."""
    status, out, err = run("line", "--to", "black", "--json")
    assert status == 0, err
    of_line, of_flips = json.loads(out)
    network = abm.trace(small_network().double().eval(), horse()[None])
    line = abm.region_line(network, horse(), 0 * horse())
    told = {row["what"]: row["value"] for row in of_line["rows"]}
    assert told["linear regions"] == f"{line.regions:,}"
    assert {row["operation"].rsplit(".")[-1]: int(row["flips"]) for row in of_flips["rows"]} == {
        "1": sum(line.flips_by_operation().values())
    }
    with np.load(tmp_path / "found.npz") as numbers:
        assert np.abs(numbers["t"] - line.t.numpy()).max() < 1e-12
        scores = small_network().double()(horse()[None])[0].detach().numpy()
        assert np.abs(numbers["scores"][0, 0] - scores).max() < 1e-12
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_line_stops_and_says_so(run):
    status, out, err = run("line", "--regions", "3", "--csv")
    assert status == 0, err
    assert "linear regions,3\n" in out
    assert "leave --regions out" in err


def test_region_map_has_its_files(run, tmp_path):
    """Shares of classes sum to one, and the page is written on demand."""
    status, out, err = run("region-map", "--other", "ship", "--html", "--json")
    assert status == 0, err
    (table,) = json.loads(out)
    shares = [float(row["share of the area in %"]) for row in table["rows"]]
    assert sum(shares) == pytest.approx(100, abs=1e-3)
    with np.load(tmp_path / "found.npz") as numbers:
        assert len(numbers["vertices"]) == len(numbers["cell"])
        assert numbers["coefficients"].shape[1:] == (3, CLASSES)
    assert (tmp_path / "found.png").exists()
    assert "plotly" in (tmp_path / "found.html").read_text().lower()


def test_region_map_of_a_small_budget_is_complete_in_a_smaller_window(run):
    slice_ = ("--to", "black", "--other", "ship", "--memory", "100kB", "--budget", "20")
    status, out, err = run("region-map", *slice_)
    assert status == 0, err
    assert "100 % of the" in " ".join(out.split())
    assert "-0.25 to 1.25" not in " ".join(out.split())
    status, out, err = run("region-map", *slice_, "--window", "0", "1", "0", "1", "--json")
    assert status == 0
    assert "The map stops at --budget" in err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("line", "--to", "nothing"), "The end must be adversarial, random, black, or"),
        (("line", "--planes", "0"), "planes must be at least 1. Got 0"),
        (("line", "--radius", "-1"), "must be positive"),
        (("region-map", "--window", "0", "0", "0", "1"), "limits must be"),
    ],
)
def test_bad_input_is_one_line(run, words, error):
    status, _, err = run(*words)
    assert status == 2
    assert error in " ".join(err.split())


def test_extra_is_checked_first(run, monkeypatch):
    monkeypatch.setattr("adjointbackmap.cli.frame._is_installed", lambda module: False)
    status, _, err = run("region-map", "--to", "no-such-image", "--html")
    assert status == 2
    assert "--html needs Plotly" in " ".join(err.split())


def test_profile_follows_the_model_and_its_hyperplanes(traced_case):
    """Values by the untouched model, hyperplanes by autograd in the middle of each region."""
    traced = traced_case("plain-conv-chain")
    line = abm.region_line(traced.network, traced.x[0], traced.x[1])
    profile = line_profile(line, planes=10_000)
    assert len(profile.regions) == line.regions
    unit = profile.unit
    middle = traced.model(line.at(line.middles)).detach()
    assert (profile.values.mean(1) - middle[:, *unit]).abs().max() < 1e-12
    points = line.at(line.middles).requires_grad_()
    traced.model(points)[:, *unit].sum().backward()
    slopes = points.grad.flatten(1)
    cosines = torch.cosine_similarity(slopes[:1], slopes)
    assert (profile.turned.deg2rad().cos() - cosines).abs().max() < 1e-12
    assert (profile.stretched - slopes.norm(dim=1) / slopes[0].norm()).abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"unit must be an index into .* Got 999"):
        line_profile(line, unit=999)
    with pytest.raises(ValueError, match="region must be one of those in regions"):
        profile.turned_at(line.regions)
    assert len(line.plot().axes) == 3


def test_class_change_is_where_the_model_changes():
    """Just before the point the class is the first one, just behind it the other."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    network = abm.trace(model, torch.zeros(1, 2).double())
    found = 0
    for _ in range(10):
        start, end = (4 * torch.randn(2).double() for _ in range(2))
        line = abm.region_line(network, start, end)
        change = class_change(line, line.values())
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        classes = model(line.at(t)).argmax(1)
        if change is None:
            assert (classes == classes[0]).all()
            continue
        found += 1
        beside = line.at(torch.tensor([change.t - 1e-9, change.t + 1e-9], dtype=torch.float64))
        assert model(beside).argmax(1).tolist() == [change.before, change.after]
        assert (classes[t < change.t] == change.before).all()
    assert found == 2  # of ten segments
