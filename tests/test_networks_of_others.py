"""The page of the networks of others shows the committed results."""

import json
from pathlib import Path

import others
import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def found():
    """The committed results."""
    return json.loads((DOCS / "results" / "others.json").read_text())


def test_the_page_shows_the_results(found):
    """Between the marks stands what the command writes."""
    page = (DOCS / "networks-of-others.md").read_text()
    place = others.PLACE
    assert f"{place.begin}\n\n{others.markdown(found)}\n\n{place.end}" in page


def test_every_network_is_reproduced(found):
    """Sixteen networks, every layer, ten inputs each, within the limits."""
    assert list(found["networks"]) == list(others.CHECKS)
    assert not others.failures(found)
    for one in found["networks"].values():
        assert one["inputs"] == others.IMAGES
        assert len(one["layers"]) >= 5
        assert one["error"] == max(error for _, error in one["layers"].values())


def test_a_failure_is_named():
    """An error above the limit, NaN, and a conversion that gives something else."""
    fine = {"error": 1e-15, "worst": "0"}
    networks = {"a": fine, "b": {**fine, "error": 1e-9}, "c": {**fine, "error": float("nan")}}
    networks["d"] = {**fine, "conversion": 0.1}
    assert others.failures({"networks": networks}) == ["b (0)", "c (0)", "d"]


def test_a_chain_takes_its_sizes_from_the_weights():
    """Modules are numbered as in the files; all but the last layer have a ReLU."""
    shapes = {"0": (4, 3, 4, 4), "2": (2, 4, 4, 4), "5": (7, 128), "7": (10, 7)}
    weights = {f"{n}.weight": torch.zeros(shapes[n]) for n in reversed(shapes)}
    model = others.chain(weights, (2, 1), (2, 1))
    assert {n for n in model.state_dict() if n.endswith("weight")} == set(weights)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert [type(m).__name__ for m in model][-3:] == ["Linear", "ReLU", "Linear"]


def test_residual_network_has_the_names_of_its_file():
    """Two blocks in each stage, a shortcut with a kernel where the shape changes."""
    model = others.ResNet(4, 6, features=6 * 8 * 8)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    names = set(model.state_dict())
    assert {"layer1.0.shortcut.0.weight", "layer1.1.conv2.bias", "linear2.bias"} <= names
    assert "layer1.1.shortcut.0.weight" not in names


def test_a_missing_folder_is_one_sentence(monkeypatch, tmp_path):
    """Before anything is computed."""
    monkeypatch.delenv(others.FOLDER, raising=False)
    monkeypatch.setattr("sys.argv", ["others.py", "--out", str(tmp_path / "others.json")])
    with pytest.raises(SystemExit, match="--folder or ADJOINTBACKMAP_REAL must be a folder"):
        others.main()
