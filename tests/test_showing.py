"""Objects show themselves in a few lines, or as a small page; none prints a tensor."""

import pickle
import re
from functools import cache
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap.display import MOST_ROWS, Summary, Table, by, png_of, shown_html, shown_text
from adjointbackmap.spectra import radial_energy

VOID = {"img", "br", "meta"}


@cache
def shown_objects():
    """Everything that a user holds, by its class."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    model = nn.Sequential(*layers).eval()
    x = torch.rand(2, 3, 8, 8)
    network = abm.trace(model, x)
    planes = abm.hyperplanes(network, x[:1], "0", units=(1, slice(3), 2))
    analysis = abm.analyse(network, x[0])
    found = [
        network,
        network.layers["0"],
        network.biases,
        network.biases["0.bias"],
        network.plan("0", "RM2"),
        planes,
        planes.units,
        planes.image_part,
        planes.contributions(),
        planes.single(0),
        planes.receipt(0),
        planes.plot(),
        abm.operator(network, x, "4"),
        abm.record_pattern(network, x),
        abm.fold(model, x),
        abm.verify(network, x)["0"],
        analysis,
        next(iter(analysis.kinks.values())),
        analysis.boundaries["l2"][0],
        analysis.boundaries["l2"][0].plane,
        analysis.boundaries["l2"][0].before,
        abm.kink_distances(network, x[0]),
        abm.effective_fields(planes),
        abm.sparsity(network, x)["0"],
        abm.image(x[0], size=4),
        abm.data.sample(),
        abm.examples.examine(model, x, x.flip(0)),
        radial_energy(x),
    ]
    return {type(one).__name__: one for one in found}


KINDS = """
    Network Layer Biases Bias Plan Hyperplanes Selection Patches Contributions SingleHyperplane
    Receipt Drawing LayerOperator ActivationPattern Fold LayerCheck Analysis Reached Boundary Side
    KinkDistances EffectiveFields Sparsity PreparedImage Images Attacked RadialProfile
""".split()


class Balanced(HTMLParser):
    """Counts the pictures and raises where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.pictures = 0

    def handle_starttag(self, tag, attrs):
        self.pictures += tag == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser


@pytest.mark.parametrize("kind", KINDS)
def test_no_object_prints_a_tensor(kind):
    text = repr(shown_objects()[kind])
    assert len(text) < 2500
    assert not re.search(r"tensor\(|array\(|object at 0x|\[\[", text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Drawing"])
def test_every_object_is_html_without_colours_of_its_own(kind):
    """Text has the colour of the page and backgrounds are transparent: readable on black too."""
    html = shown_objects()[kind]._repr_html_()
    parsed(html)
    colours = set(re.findall(r"(?:color|background): ([^;}]*)", html))
    assert colours == {"inherit", "transparent"}
    assert "tensor(" not in html


@pytest.mark.parametrize(
    ("kind", "pictures"), [("Hyperplanes", 3), ("PreparedImage", 1), ("Images", 8), ("Network", 0)]
)
def test_pictures_are_in_the_page(kind, pictures):
    assert parsed(shown_objects()[kind]._repr_html_()).pictures == pictures


def test_network_has_a_table_of_its_layers():
    network = shown_objects()["Network"]
    lines = repr(network).splitlines()
    assert lines[:4] == [
        "Network of Sequential",
        "  image: 3 x 8 x 8, float32 on cpu",
        "  biases: M = 11 in 3 parts",
        "  layers: 6, of them 2 with a kernel",
    ]
    rows = {line.split()[0]: line for line in lines[5:]}
    assert list(rows) == list(network.layers)
    assert rows["0"].split("  ")[-1].strip() == "4"
    assert re.search(r"Conv2d +RM4 RM3 RM2 RM1 +4 x 6 x 6 +3 x 3 +144 +4$", rows["0"])
    assert re.search(r"Linear +RM0 +3 +8 x 8 +3 +11$", rows["4"])


def test_biases_that_a_layer_depends_on_are_those_of_its_hyperplanes():
    """The last column counts the entries that a hyperplane of the layer may use."""
    network = shown_objects()["Network"]
    x = torch.rand(1, 3, 8, 8)
    rows = {line.split()[0]: line.split()[-1] for line in repr(network).splitlines()[5:]}
    for name, layer in network.layers.items():
        planes = abm.hyperplanes(network, x, name, layer.modes[-1])
        assert int(rows[name]) == len(planes.entries)


def test_hyperplanes_say_their_value_sum_and_error():
    planes = shown_objects()["Hyperplanes"]
    assert repr(planes).splitlines()[0] == "Hyperplanes of 0 in RM2"
    assert "units: 3 (out_col 3)" in repr(planes)
    assert "image part: patches of 3 x 3 pixels in images of 3 x 8 x 8" in repr(planes)
    html = planes._repr_html_()
    assert f"<dd>{float(planes.value[0, 0]):.6g}</dd>" in html
    assert "largest biases add of the first unit" in html


def test_verify_and_plans_show_their_numbers():
    check = shown_objects()["LayerCheck"]
    assert f"largest relative error: {check.largest:.2g}" in repr(check)
    plan = shown_objects()["Plan"]
    assert repr(plan).startswith(f"Plan: {plan.method}\n")
    assert str(plan).startswith(f"{plan.method}: ")


def test_layers_and_checks_are_tables_with_a_row_for_each():
    """What network.layers and verify give are dicts, and show themselves as one table."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()).eval()
    x = torch.rand(1, 1, 5, 5)
    network = abm.trace(model, x)
    checks = abm.verify(network, x)
    lines = repr(checks).splitlines()
    assert isinstance(checks, dict)
    assert lines[0] == f"Checks of layers: {len(checks)}"
    assert lines[1].split()[:2] == ["name", "units"]
    assert [line.split()[0] for line in lines[2:]] == list(checks)
    lines = repr(network.layers).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(network.layers)
    assert "2 x 3 x 3" in lines[2]
    assert "<td" in network.layers._repr_html_()
    assert pickle.loads(pickle.dumps(checks)) == checks


def test_stored_planes_show_what_is_stored(tmp_path):
    network = shown_objects()["Network"]
    stored = abm.save(tmp_path / "s", network, torch.rand(2, 3, 8, 8), "4", "RM0")
    assert "layer: 4 in RM0" in repr(stored)
    assert "hyperplanes: n 2, out_feature 3" in repr(stored)


def test_long_tables_are_cut_and_text_is_escaped():
    table = Table(("name", "n"), [(f"<{i}>", f"{i:,}") for i in range(MOST_ROWS + 3)])
    text = shown_text(Summary("T", {"a": "b & c"}, {"": table}))
    assert text.splitlines()[-1] == "  ... 3 more"
    html = shown_html(Summary("T", {"a": "b & c"}, {"": table}))
    assert "&lt;1&gt;" in html
    assert "b &amp; c" in html
    assert "<td class=n>1</td>" in html
    assert by(()) == "scalar"


def test_small_pictures_are_enlarged():
    import io

    from PIL import Image

    found = Image.open(io.BytesIO(png_of(torch.tensor([[[0.0, 1.0]]]), side=10)))
    assert found.size == (10, 5)
    assert found.getpixel((4, 4)) == (0, 0, 0)
    assert found.getpixel((5, 0)) == (255, 255, 255)
