"""A model and a picture in one call: the receipt closes, whatever the model and the picture."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import adjointbackmap as abm
from adjointbackmap import models

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A photo of 64 x 50 pixels: a test image of CIFAR-10, enlarged."""
    pixels = abm.data.sample().pixels[0].permute(1, 2, 0).numpy()
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(pixels).resize((64, 50)).save(file)
    return file


def small(channels=3, size=10):
    """A network of the user's for pictures of any number of channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = 4 * (size - 2) ** 2
        layers = (nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(features, 3))
        return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", ["vgg7-cifar10", "fixup-resnet20-cifar10"])
def test_shipped_network_is_given_what_it_takes(path, name):
    """By name or as a module: its size, normalisation and classes; the value is the model's own."""
    found = abm.explain(name, path)
    model = models.load(name)
    plain = abm.image(path, size=32)
    expected = model(models.preprocessing(name)(plain.detach()))[0].detach()
    best = int(expected.argmax())
    torch.testing.assert_close(found.scores, expected)
    assert found.name == f"{abm.data.CIFAR10_CLASSES[best]} (output, unit {best})"
    assert found.receipt.value == pytest.approx(float(expected[best]), rel=1e-5)
    assert abs(found.receipt.error) < 1e-4
    assert torch.equal(abm.explain(model, path).image, found.image)


def test_own_network_is_explained_in_one_call(path):
    model = small()
    found = abm.explain(model, path, size=10, mean=0.5, std=0.25, classes=("a", "b", "c"))
    x = abm.image(path, size=10, mean=0.5, std=0.25)
    expected = model(x)[0]
    best = int(expected.argmax())
    assert torch.equal(found.image, x)
    assert found.receipt.value == expected[best].item()
    assert abs(found.receipt.error) < 1e-6
    slow = torch.func.jacrev(lambda x: model(x)[0, best])(x.detach())
    torch.testing.assert_close(found.planes.image, slow)
    again = abm.explain(found.network, path, unit="b", mean=0.5, std=0.25, classes="abc")
    assert again.network is found.network
    assert again.name == "b (output, unit 1)"
    assert again.receipt.value == expected[1].item()


def test_grey_networks_are_given_one_channel(path):
    found = abm.explain(small(channels=1), path, unit=2, size=10)
    assert found.image.shape == (1, 1, 10, 10)
    assert found.name == "output, unit 2"
    assert abs(found.receipt.error) < 1e-6


def test_any_unit_of_any_layer(path):
    model = small()
    found = abm.explain(model, path, (2, 3, 1), model[0], size=10, dtype="float64", by="channel")
    assert found.name == "0, row 2, column 3, channel 1"
    assert found.receipt.value == pytest.approx(model[0](found.image)[0, 1, 2, 3].item(), rel=1e-6)
    assert abs(found.receipt.error) < 1e-14
    assert [line.name for line in found.receipt.lines] == ["red", "green", "blue", "0.bias"]


def test_input_tensors_are_taken_as_they_are():
    x = torch.randn(3, 10, 10)
    model = small()
    found = abm.explain(model, x)
    assert torch.equal(found.image, x[None])
    assert torch.equal(found.scores, model(x[None])[0])
    flat = abm.explain(nn.Sequential(nn.Linear(5, 3), nn.ReLU()).eval(), torch.randn(5))
    assert abs(flat.receipt.error) < 1e-6
    assert flat._repr_html_().count("<img") == 1


def test_models_in_float64_are_given_float64(path):
    found = abm.explain(small().double(), path, size=10)
    assert found.image.dtype == torch.float64
    assert abs(found.receipt.error) < 1e-14


def test_explanation_shows_itself(path):
    found = abm.explain(small(), path, size=10, classes=("a", "b", "c"))
    lines = repr(found).splitlines()
    assert lines[0] == "Explanation of Sequential"
    assert lines[1] == f"  unit: {found.name} (RM0)"
    assert "largest outputs: " in repr(found)
    assert "tensor(" not in repr(found)
    assert found._repr_html_().count("data:image/png") == 2
    assert found.plot().figure.get_suptitle() == f"Contributions x * H of {found.name}"
    assert found.plot("spectrum", "T").figure.get_suptitle() == "T"
    with pytest.raises(ValueError, match="what must be one of hyperplane, contributions"):
        found.plot("nothing")


REFUSED = {
    "size": ({}, "size must be given for a picture of more than 512 pixels. Got 600 x 600: give"),
    "class": (
        {"unit": "cow", "classes": "abc"},
        "predicted, a number or one of a, b, c. Got 'cow'",
    ),
    "names": ({"unit": "cow"}, r"a number where classes have no names. Got 'cow': pass classes="),
    "count": ({"classes": "ab"}, "one name for each of 3 outputs. Got 2"),
    "units": (
        {"unit": (slice(2),)},
        r"unit must be one unit. Got \(slice.*which is 2: give an int",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused(why):
    options, message = REFUSED[why]
    size = {} if why == "size" else {"size": 10}
    with pytest.raises(ValueError, match=message):
        abm.explain(small(), np.zeros((600, 600), np.uint8), **size, **options)


def test_several_images_and_other_models_are_refused():
    with pytest.raises(ValueError, match=r"A tensor must be one image. Got 2: explain them one by"):
        abm.explain(small(), torch.rand(2, 3, 10, 10))
    with pytest.raises(ValueError, match=r"A shipped network must be one of"):
        abm.explain("vgg8", torch.rand(3, 10, 10))


def test_page_makes_its_pictures(tmp_path, monkeypatch):
    """The blocks of the page run, and save each picture that the page shows."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/explaining.md").read_text()
    names = {"__name__": "page"}
    for block in BLOCK.findall(text):
        exec(compile(block, "docs/explaining.md", "exec"), names)
    pictures = set(re.findall(r"\(figures/(.*?)\)", text))
    assert pictures == {file.name for file in tmp_path.glob("*.png")}
    assert all((ROOT / "docs/figures" / name).is_file() for name in pictures)


def test_a_picture_of_a_size_that_the_model_does_not_take_names_size(path):
    with pytest.raises(ValueError, match=r"size must be given for a model .* take 50 x 64 pixels"):
        abm.explain(small(), path)


def test_a_class_is_no_unit_of_a_feature_map(path):
    with pytest.raises(ValueError, match=r"unit must be a tuple .* in 0, which gives 4 x 8 x 8"):
        abm.explain(small(), path, layer="0", size=10)
