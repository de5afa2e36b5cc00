"""The command line: each command at work, and one line with exit status 2 for each bad input."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from torch import nn

from adjointbackmap import cli, data

SHIPPED = "vgg7-cifar10"


def tiny_network() -> nn.Module:
    """What --model names in these tests."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def no_network() -> str:
    """A function that builds no module."""
    return "none"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line and return its exit status, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["adjointbackmap", *words])
        monkeypatch.setattr(cli.console, "width", 200, raising=False)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


TINY = ("--model", f"{__name__}:tiny_network", "--shape", "3", "8", "8")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The functions of this file can be named by --model, however pytest imported it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def test_layers_lists_each_layer_with_its_modes(run):
    """A shipped network's layers, receptive fields, numbers of hyperplanes and biases."""
    status, out, _ = run("layers", SHIPPED)
    assert status == 0
    row = next(line for line in out.splitlines() if "conv3" in line)
    for cell in ("Conv3x3", "64x16x16", "15x15", "RM4 to RM1", "16,384 in RM2"):
        assert cell in row
    assert "384 biases in 6 parts" in out


def test_layers_of_a_users_network(run):
    """--model, --weights and --shape take the place of a shipped name."""
    status, out, _ = run("layers", *TINY)
    assert status == 0
    assert "Linear" in out
    assert "6 biases in 2 parts" in out


def test_weights_are_loaded(run, tmp_path):
    """Weights of another seed change what map writes."""
    torch.manual_seed(1)
    weights = tmp_path / "weights.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).state_dict(), weights)
    picture = tmp_path / "picture.png"
    imsave(picture, np.random.default_rng(0).random((8, 8, 3)))
    values = []
    for extra in ((), ("--weights", str(weights))):
        out = tmp_path / f"planes{len(extra)}"
        status, _, err = run("map", *TINY, *extra, "--layer", "3", "--mode", "RM0", "--image", str(picture), "--out", str(out))
        assert status == 0, err
        values.append(np.load(out.with_name(out.name + ".npz"))["value"])
    assert not np.allclose(*values)


def test_map_writes_an_archive_and_a_picture(run, tmp_path):
    """The archive holds the hyperplanes and what made them; their inner products are the values."""
    out = tmp_path / "new" / "planes"
    status, text, err = run(
        "map", SHIPPED, "--layer", "conv3", "--mode", "RM2", "--units", "8,2:4,5", "--image", "ship", "--out", str(out)
    )
    assert status == 0, err
    assert "2 hyperplanes of conv3 (RM2)" in text
    archive = np.load(out.with_name("planes.npz"), allow_pickle=False)
    assert archive["image"].shape == (1, 2, 3, 32, 32)
    assert archive["bias"].shape == (1, 2, 384)
    made_by = json.loads(str(archive["provenance"]))
    assert (made_by["layer"], made_by["mode"], made_by["k"]) == ("conv3", "RM2", 1.0)
    assert made_by["biases"]["bn1"] == [32, 64]
    assert len(made_by["weights sha256"]) == 64
    assert out.with_name("planes.png").read_bytes().startswith(b"\x89PNG")


def test_verify_counts_every_unit_of_the_layers_that_are_named(run):
    """Two layers, folded, on one image."""
    status, out, err = run("verify", SHIPPED, "--fold", "--layer", "conv0", "fc")
    assert status == 0, err
    assert "32,778 hyperplanes" in out
    assert "100.0000" in next(line for line in out.splitlines() if " fc " in line)


def test_evaluate_on_the_sample(run):
    """The trained network is right on most of the 200 images that ship."""
    status, out, err = run("evaluate", SHIPPED, "--dataset", "sample")
    assert status == 0, err
    assert "200 images (the sample)" in out
    assert float(out.split(": ")[1].split(" %")[0]) > 80


def test_demo_tells_and_draws(run, tmp_path):
    """Prediction, the three tables and the picture."""
    status, out, err = run("demo", "--out", str(tmp_path / "demo"))
    assert status == 0, err
    assert "it says ship" in out
    for title in ("RM0: every class", "One unit of every layer", "Every unit of every layer: 110,602 hyperplanes"):
        assert title in out
    assert (tmp_path / "demo" / "hyperplanes.png").read_bytes().startswith(b"\x89PNG")


def test_train_and_start_again(run, tmp_path, monkeypatch):
    """A short training writes weights and card, and a second one begins from them."""
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: data.sample())
    first, second = tmp_path / "first", tmp_path / "second"
    status, out, err = run("train", "vgg7", "--epochs", "1", "--batch", "50", "--out", str(first))
    assert status == 0, err
    assert "test accuracy" in out
    weights = first / "vgg7-cifar10.safetensors"
    status, _, err = run("train", "vgg7", "--epochs", "1", "--batch", "50", "--start", str(weights), "--out", str(second))
    assert status == 0, err
    card = json.loads((second / "vgg7-cifar10.json").read_text())
    assert card["started from"]["recipe"]["epochs"] == 1


BAD_INPUT = {
    "no network": (("layers",), "Name a shipped network .* Got neither"),
    "two networks": (("layers", SHIPPED, "--model", "a:b"), "Got both"),
    "unknown network": (("layers", "vgg9"), "must be one of .*vgg7-cifar10.* Got 'vgg9'"),
    "no such module": (("layers", "--model", "nowhere:f"), "must be module:function, importable from here. Got 'nowhere:f'"),
    "no such function": (("layers", "--model", "math:f"), "must be module:function"),
    "no module built": (("layers", "--model", f"{__name__}:no_network"), "returns a torch.nn.Module. Got str"),
    "no weights": (("layers", *TINY, "--weights", "nowhere.pt"), "--weights must be a file. Got nowhere.pt"),
    "unknown layer": (("map", SHIPPED, "--layer", "conv9", "--mode", "RM2"), "A layer must be one of conv0, .* Got 'conv9'"),
    "mode not of the layer": (("map", SHIPPED, "--layer", "fc", "--mode", "RM2"), "has the modes RM0. Got 'RM2'"),
    "unknown mode": (("map", SHIPPED, "--layer", "fc", "--mode", "RM7"), '"RM7" for --mode'),
    "units that are none": (
        ("map", SHIPPED, "--layer", "fc", "--mode", "RM0", "--units", "x"),
        "--units must be ints and slices",
    ),
    "unit out of range": (("map", SHIPPED, "--layer", "fc", "--mode", "RM0", "--units", "10"), "out_feature of 0 to 9. Got"),
    "image out of range": (("verify", SHIPPED, "--image", "200"), "--image must be from 0 to 199.* Got 200"),
    "no such picture": (("verify", SHIPPED, "--image", "nowhere.png"), "or a picture file of 32 x 32 pixels. Got nowhere.png"),
    "too many images": (("verify", SHIPPED, "--images", "201"), "--images must be from 1 to 200. Got 201"),
    "threads": (("verify", SHIPPED, "--threads", "0"), "--threads must be at least 1. Got 0"),
    "memory": (("map", SHIPPED, "--layer", "conv1", "--mode", "RM4"), "must fit in memory=2GiB. It needs 12"),
    "unknown architecture": (("train", "vgg9"), "must be one of vgg7-nobias"),
    "no data": (("evaluate", SHIPPED, "--data", "nowhere"), "nowhere/cifar-10-batches-bin must hold the official binary files"),
    "unknown command": (("fly",), "fly"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(run, case):
    """What was expected, what came, what to do; nothing of Python's traceback."""
    words, message = BAD_INPUT[case]
    status, _, err = run(*words)
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("adjointbackmap: ")
    assert re.search(message, lines[0]), lines[0]


def test_a_picture_of_another_size_is_refused(run, tmp_path):
    """It is not resized behind the user's back."""
    picture = tmp_path / "large.png"
    imsave(picture, np.zeros((40, 32, 3)))
    status, _, err = run("verify", SHIPPED, "--image", str(picture))
    assert status == 2
    assert "must have shape (3, 32, 32). Got (3, 40, 32)" in err
