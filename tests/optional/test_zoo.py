"""The networks of torchvision and timm, each skipped without its library; see docs/zoo.md."""

import json
from pathlib import Path

import pytest
import torch
import zoo

DOCS = Path(__file__).parents[2] / "docs"
CHECKED = [name for name, member in zoo.ZOO.items() if not member.refused]
REFUSED = [name for name, member in zoo.ZOO.items() if member.refused]


@pytest.fixture
def installed():
    """Skip a network whose library is not there."""

    def need(name: str) -> str:
        zoo.mend_torchvision()
        pytest.importorskip(name.partition("/")[0])
        return name

    return need


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_every_layer_is_reproduced(name, installed):
    found = zoo.check(installed(name))
    assert found["error"] <= zoo.LIMIT, (
        f"{found['worst']} of {name} has a scale-aware error of {found['error']:.2e}"
    )
    assert found["layers"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_every_cause(name, installed):
    found = zoo.refusal(installed(name))  # raises if a module that is not affine is not named
    assert set(zoo.ZOO[name].refused) <= set(found["refused"])


def test_causes_are_read_from_the_message():
    message = (
        "Every operation must be. Got gelu at stem.1, gelu at 2, mul at se (its factor "
        "depends on the image): replace them"
    )
    assert zoo.causes_of(message) == {"gelu": ["stem.1", "2"], "mul": ["se"]}


def test_an_error_is_seen():
    x = torch.rand(1, 3, 4, 4).double()
    b = torch.rand(5).double()
    image = torch.ones(1, 3, 4, 4).double()
    bias = torch.ones(1, 5).double()
    value = x.sum() + b.sum()
    assert zoo.errors_of(value, x, b, image, bias)[0] < 1e-15
    assert zoo.errors_of(value + 1, x, b, image, bias)[0] > 1e-3


def test_the_page_shows_the_results():
    found = json.loads((DOCS / "results" / "zoo.json").read_text())
    written = f"{zoo.PLACE.begin}\n\n{zoo.markdown(found)}\n\n{zoo.PLACE.end}"
    assert written in (DOCS / "zoo.md").read_text()


def test_the_results_are_within_the_limit():
    networks = json.loads((DOCS / "results" / "zoo.json").read_text())["networks"]
    assert set(networks) == set(zoo.ZOO)
    assert max(found.get("error", 0) for found in networks.values()) <= zoo.LIMIT
