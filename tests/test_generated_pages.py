"""Each page that a command writes shows the results that are committed, and names the command."""

import json
import re
from pathlib import Path

import curved_costs
import curved_zoo
import exactness
import pytest
import torch
import zoo
from torch import nn

import adjointbackmap as abm
from adjointbackmap import models
from adjointbackmap.benchmark import runs, table
from adjointbackmap.files.checked import read_sealed
from adjointbackmap.report import document
from adjointbackmap.report.sections import Claim, Table
from adjointbackmap.study import pages
from adjointbackmap.study.verification import page

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"


def study_contents():
    """What the pages of the study show."""
    return document.contents(document.read_summary(RESULTS / "study.json"), pages.PAGES)


def study(found):
    """The table of the study's pages; ``found`` is read again as sections."""
    return document.index_markdown(study_contents())


PAGES = {  # results -> page, its marks, what writes the text between them, the command
    "curved-costs": (
        "curved",
        curved_costs.PLACE,
        curved_costs.markdown,
        "benchmarks/curved_costs.py",
    ),
    "curved-zoo": ("zoo", curved_zoo.PLACE, curved_zoo.markdown, "benchmarks/curved_zoo.py"),
    "exactness": ("exactness", exactness.PLACE, exactness.markdown, "make exactness"),
    "speed": ("speed", runs.SPEED_PLACE, table.speed_markdown, "make bench"),
    "study": ("study/index", document.STUDY_PLACE, study, "adjointbackmap study all"),
    "verification": (
        "verified-networks",
        page.VERIFICATION_PLACE,
        page.verification_markdown,
        "adjointbackmap study verification",
    ),
    "zoo": ("zoo", zoo.PLACE, zoo.markdown, "benchmarks/zoo.py"),
}  # test_networks_of_others.py has the sixth


@pytest.mark.parametrize("results", PAGES)
def test_page_shows_its_results(results):
    """The text between the marks is what the command writes; the page names the command."""
    (name, place, markdown, command) = PAGES[results]
    text = (DOCS / f"{name}.md").read_text()
    found = read_sealed(RESULTS / f"{results}.json")
    assert f"{place.begin}\n\n{markdown(found)}\n\n{place.end}" in text
    assert command in text.partition(place.begin)[0]


def test_pages_of_the_study_show_their_results():
    """Each page is what the command writes; index.md lists it for the reader."""
    found = study_contents()
    texts = {f"{one.page.name}.md": document.page_markdown(one) for one in found}
    texts["claims.md"] = document.claims_markdown(found)
    for name, text in texts.items():
        assert (DOCS / "study" / name).read_text() == text
    index = (DOCS / "study" / "index.md").read_text()
    listed = index.partition(":hidden:")[2].split("```")[0].split()
    assert listed == [Path(name).stem for name in texts]


def test_every_claim_of_the_study_is_on_one_page():
    """And so is every table; a page has pictures, and at most 1,500 words outside tables."""
    sections = document.read_summary(RESULTS / "study.json")
    found = study_contents()
    for kind, key in ((Claim, "claims"), (Table, "tables")):
        blocks = [block for s in sections for block in s.blocks if isinstance(block, kind)]
        shown = [block for content in found for block in getattr(content, key)]
        assert sorted(map(repr, shown)) == sorted(map(repr, blocks))
    for path in (DOCS / "study").glob("*.md"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("|")]
        assert len(re.findall(r"[^\W\d_]{2,}", " ".join(lines))) <= 1500
    for content in found:
        assert len(content.pictures) == len(content.page.pictures) > 1


def test_figures_of_the_study_are_small_and_all_used():
    """They are beside the pages, no other is, and together they have at most 3.3 MB."""
    used = {document.figure_name(p.path) for one in study_contents() for p in one.pictures}
    figures = list((DOCS / document.FIGURES).iterdir())
    assert {path.name for path in figures} == used
    assert sum(path.stat().st_size for path in figures) < 3.3e6


def test_every_file_of_results_is_described():
    """The list in docs/results/README.md has each file, and no other."""
    rows = [
        line for line in (RESULTS / "README.md").read_text().splitlines() if line.startswith("| `")
    ]
    described = {row.split("`")[1] for row in rows}
    assert described == {path.name for path in RESULTS.iterdir()} - {"README.md"}


def test_curved_networks_are_exact_and_cost_little():
    """Every network that is not refused passes; a hyperplane costs at most three passes."""
    networks = json.loads((RESULTS / "curved-zoo.json").read_text())["networks"]
    checked = [found for found in networks.values() if "refused" not in found]
    assert all(map(curved_zoo.counts, checked))
    rows = json.loads((RESULTS / "curved-costs.json").read_text())["rows"]
    assert max(row["ratio"] for row in rows) <= 3


# exactness


@pytest.fixture
def found():
    """The committed results of the exactness of the shipped networks."""
    return json.loads((RESULTS / "exactness.json").read_text())


def test_every_shipped_network_is_exact(found):
    """All layers and both images of each network, within the limit."""
    assert tuple(found["networks"]) == models.names()
    assert not exactness.failures(found)
    for network in found["networks"].values():
        assert network["images"] == exactness.IMAGES
        assert {"RM4", "RM3", "RM2", "RM1", "RM0"} == {
            mode for layer in network["layers"].values() for mode in layer["modes"]
        }


def test_an_error_above_the_limit_is_named(found):
    """With its network, test and layer; NaN too."""
    layer = found["networks"]["vgg7-cifar10"]["layers"]["conv3"]
    layer["dot"] = 1e-9
    layer["modes"]["RM3"] = float("nan")
    assert exactness.failures(found) == [
        "vgg7-cifar10 (modes of conv3)",
        "vgg7-cifar10 (dot of conv3)",
    ]


def test_images_are_added_up():
    """Counts are summed; errors go through a maximum."""
    first = {"units": 2, "within": 2, "every unit": 1e-16, "dot": 3e-16, "dense": 0.0}
    second = {"units": 2, "within": 1, "every unit": 2e-16, "dot": 1e-16, "dense": 1e-17}
    both = exactness.merged([{**first, "modes": {"RM2": 4e-16}}, {**second, "modes": {"RM2": 0.0}}])
    assert (both["units"], both["within"], both["every unit"]) == (4, 3, 2e-16)
    assert (both["dot"], both["dense"], both["modes"]) == (3e-16, 1e-17, {"RM2": 4e-16})


def test_small_network_passes_the_four_tests():
    """Every layer has each test; a model that was changed since is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.rand(1, 1, 6, 6).double()
    network = abm.trace(model.double().eval(), x)
    found = exactness.check_image(network, x)
    assert set(found) == {"0", "1", "2", "3"}
    assert set(found["0"]["modes"]) == {"RM4", "RM3", "RM2", "RM1"}
    for errors in found.values():
        assert max(exactness.error_of(errors, test) for test in exactness.TESTS) < 1e-14

    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(RuntimeError, match=r"hanged since"):
        exactness.check_image(network, x)
