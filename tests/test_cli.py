"""The command line: each command at work, and one line with exit status 2 for each bad input."""

import csv
import io
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from PIL import Image
from rich.console import Console
from torch import nn

import adjointbackmap as abm
from adjointbackmap import cli, data, plots
from adjointbackmap.cli import frame, lines
from adjointbackmap.cli.output import TABLES
from adjointbackmap.cli.tables import check_table
from adjointbackmap.exactness import verification as runs
from adjointbackmap.exactness.layer_check import LayerCheck
from adjointbackmap.images import PRESETS
from adjointbackmap.sources import NetworkOptions, load_subject

SHIPPED = "vgg7-cifar10"


def tiny_network() -> nn.Module:
    """What --model names in these tests."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


class Halved(nn.Module):
    """A module of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def tiny_cifar_network() -> nn.Module:
    """What --model names where images of the data are needed."""
    torch.manual_seed(0)
    return nn.Sequential(
        Halved(), nn.Conv2d(3, 2, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 2)
    )


class Masked(nn.Module):
    """A kink that is a change of the largest element's place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.argmax(1, keepdim=True) == 0, x, 2 * x)


def masked_network() -> nn.Module:
    """What --model names for kinks that are not measured."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), Masked(), nn.ReLU(), nn.Linear(4, 2))


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
TINY_CIFAR = ("--model", f"{__name__}:tiny_cifar_network")


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
    torch.save(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
        ).state_dict(),
        weights,
    )
    picture = tmp_path / "picture.png"
    imsave(picture, np.random.default_rng(0).random((8, 8, 3)))
    values = []
    for extra in ((), ("--weights", str(weights))):
        out = tmp_path / f"planes{len(extra)}"
        status, _, err = run(
            "map",
            *TINY,
            *extra,
            "--layer",
            "3",
            "--mode",
            "RM0",
            "--image",
            str(picture),
            "--out",
            str(out),
        )
        assert status == 0, err
        values.append(abm.open(out.with_name(out.name + ".zarr")).value)
    assert not torch.allclose(*values)


def test_map_writes_a_store_and_a_picture(run, tmp_path):
    """The store holds the hyperplanes and what made them; their inner products are the values."""
    out = tmp_path / "new" / "planes"
    status, text, err = run(
        "map",
        SHIPPED,
        "--layer",
        "conv3",
        "--units",
        "8,2:4,5",
        "--image",
        "ship",
        "--out",
        str(out),
    )
    assert status == 0, err
    assert "2 hyperplanes in 1 block, adjoint, at most " in text
    assert "share <= 1 %: 100.0000 %" in text
    stored = abm.open(out.with_name("planes.zarr"))
    assert stored.to_xarray()["image"].shape == (1, 2, 3, 15, 15)
    assert (stored.attributes["layer"], stored.attributes["mode"], stored.attributes["k"]) == (
        "conv3",
        "RM2",
        1.0,
    )
    assert stored.attributes["biases"]["bn1"] == [32, 64]
    assert float(stored.relative_error().abs().max()) < 1e-3
    assert out.with_name("planes.png").read_bytes().startswith(b"\x89PNG")


def test_map_draws_the_first_of_many_units(run, tmp_path, monkeypatch):
    """A picture has room for 64, and says so."""
    titles = []
    monkeypatch.setattr(
        plots,
        "unit_hyperplanes",
        lambda planes, title: titles.append((title, planes.value.shape)) or Figure(),
    )
    status, _, err = run(
        "map",
        SHIPPED,
        "--layer",
        "conv1",
        "--mode",
        "RM2",
        "--units",
        "0",
        "--out",
        str(tmp_path / "planes"),
    )
    assert status == 0, err
    (title, shape) = titles[0]
    count = abm.open(tmp_path / "planes.zarr").value.numel()
    assert title.endswith(f"(first 64 of {count:,} units)")
    assert shape.numel() == 64


def test_map_continues(run, tmp_path):
    """The same command again computes only what is missing."""
    words = (
        "map",
        SHIPPED,
        "--layer",
        "conv1",
        "--mode",
        "RM2",
        "--units",
        ":,0",
        "--memory",
        "300kB",
        "--out",
        str(tmp_path / "planes"),
    )
    assert run(*words)[0] == 0
    folder = tmp_path / "planes.zarr"
    missing, *kept = sorted(folder.glob("progress/0*.json"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    content = missing.read_bytes()
    missing.unlink()
    status, text, err = run(*words)
    assert status == 0, err
    assert f"in {len(kept) + 1} block" in text
    assert missing.read_bytes() == content
    assert before == {path: path.stat().st_mtime_ns for path in kept}
    status, _, err = run(*words, "--scale", "0.5")
    assert status == 2
    assert "of other k: choose another --out" in err


def test_verify_counts_every_unit_of_the_layers_that_are_named(run):
    """Two layers, folded, on one image."""
    status, out, err = run("verify", SHIPPED, "--fold", "--layer", "conv0", "fc")
    assert status == 0, err
    assert "32,778 hyperplanes" in out
    assert "100.0000" in next(line for line in out.splitlines() if " fc " in line)


VERIFY = ("verify", *TINY_CIFAR, "--threads", "1", "--images", "3")


def units_in(out: str) -> int:
    """The number of hyperplanes in the title of the table."""
    return int(re.search(r"layer: ([\d,]+) hyperplanes", out)[1].replace(",", ""))


def test_verify_goes_on_after_ctrl_c(run, tmp_path, monkeypatch):
    """Status 130 and a table of the finished part; the same command computes the rest alone."""
    keep = tmp_path / "kept.jsonl"
    seen = []
    right = runs.verify_images

    def stopped(network, batch, names, *rest):
        seen.extend(names)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return right(network, batch, names, *rest)

    monkeypatch.setattr(runs, "verify_images", stopped)
    status, out, err = run(*VERIFY, "--keep", str(keep))
    assert (status, err.strip()) == (130, "stopped; finished work is kept")
    two = units_in(out)
    status, out, err = run(*VERIFY, "--keep", str(keep))
    assert status == 0, err
    assert units_in(out) == two // 2 * 3
    assert tuple(seen) == (*data.sample().hashes[:3], data.sample().hashes[2])
    assert run(*VERIFY, "--keep", str(keep))[1] == out
    assert len(seen) == 4


def test_verify_without_keep_tells_how_to_go_on(run, monkeypatch):
    """Where nothing is kept, the message does not say so."""

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "verify_images", stopped)
    status, _, err = run(*VERIFY)
    assert (status, err.strip()) == (
        130,
        "stopped; add --keep FILE to continue where a run was stopped",
    )


def test_verify_by_two_workers_is_the_same_command(run, tmp_path):
    """The network of --model is found by the workers, and the table is the same."""
    pytest.importorskip("distributed", reason="several workers need the extra cluster")
    keep = tmp_path / "kept.jsonl"
    status, out, err = run(*VERIFY, "--workers", "2", "--keep", str(keep))
    assert status == 0, err
    assert run(*VERIFY)[1] == out
    assert keep.read_bytes().count(b"\n") == 4


def test_verify_on_test_images_in_the_order_of_hashes(run, tmp_path, monkeypatch):
    """The first images by hash, so that a later run with more images only adds some."""
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: data.sample())
    keep = tmp_path / "kept.jsonl"
    for count, options in (("1", ()), ("2", ("--accumulate", "float32"))):
        status, _, err = run(
            *VERIFY[:-1], count, "--dataset", "cifar10", "--keep", str(keep), *options
        )
        assert status == 0, err
    names = [json.loads(line)["name"] for line in keep.read_text().splitlines()[1:]]
    assert names == sorted(data.sample().hashes)[:2]


def test_verify_refuses_the_file_of_another_job(run, tmp_path):
    """In one line that names the difference."""
    keep = tmp_path / "kept.jsonl"
    assert run(*VERIFY[:-1], "1", "--keep", str(keep))[0] == 0
    status, _, err = run(*VERIFY[:-1], "1", "--keep", str(keep), "--accumulate", "float64")
    assert status == 2
    assert "Got those of another (accumulate float32, not float64): name another file." in err


def test_analyse_tells_distances_and_sparsity(run):
    """Both tables; every nearest kink is confirmed by the steps beside it."""
    status, out, err = run("analyse", *TINY_CIFAR, "--images", "3")
    assert status == 0, err
    assert "The linear regions of 3 images" in out
    assert [line.split("│")[5].strip() for line in out.splitlines() if "nearest kink" in line] == [
        "100.0"
    ] * 2
    assert "RM4: which part of its receptive field a kernel uses" in out
    assert "not measured" not in out


def test_analyse_names_what_is_not_measured(run):
    """Masks are told of; --sparse 0 leaves the second table out."""
    status, out, err = run("analyse", "--model", f"{__name__}:masked_network", "--sparse", "0")
    assert status == 0, err
    assert "Kinks that are not measured, so that regions may end earlier: 1.1.where, where" in out
    assert "RM4" not in out


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
    for title in (
        "RM0: every class",
        "One unit of every layer",
        "Every unit of every layer: 110,602 hyperplanes",
    ):
        assert title in out
    assert (tmp_path / "demo" / "hyperplanes-ship.png").read_bytes().startswith(b"\x89PNG")


def test_train_and_start_again(run, tmp_path, monkeypatch):
    """A short training writes weights and card, and a second one begins from them."""
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: data.sample())
    first = tmp_path / "first"
    second = tmp_path / "second"
    status, out, err = run("train", "vgg7", "--epochs", "1", "--batch", "50", "--out", str(first))
    assert status == 0, err
    assert "test accuracy" in out
    weights = first / "vgg7-cifar10.safetensors"
    status, _, err = run(
        "train",
        "vgg7",
        "--epochs",
        "1",
        "--batch",
        "50",
        "--start",
        str(weights),
        "--out",
        str(second),
    )
    assert status == 0, err
    card = json.loads((second / "vgg7-cifar10.json").read_text())
    assert card["started from"]["recipe"]["epochs"] == 1


BAD_INPUT = {
    "pictures of a shipped network": (
        ("layers", SHIPPED, "--size", "64", "--std", "0.5"),
        "--size, --std must come with --model. Got vgg7-cifar10, which has its own",
    ),
    "two sizes": (
        ("layers", *TINY, "--size", "9"),
        r"--shape and --size must agree. Got \(8, 8\) and \(9, 9\)",
    ),
    "means of other channels": (
        ("layers", *TINY, "--mean", "0.1", "0.2"),
        "--mean must have a number for each of 3 channels, or one. Got 2",
    ),
    "no file of classes": (
        ("layers", *TINY, "--classes", "nowhere.txt"),
        "--classes must be a text file with a name on each line. Got nowhere.txt",
    ),
    "classes that are not the outputs": (
        ("layers", *TINY, "--classes", __file__),
        "--classes must have a line for each of the 2 outputs. Got",
    ),
    "images of another size": (
        ("verify", *TINY, "--images", "2"),
        r"--images are pictures of shape \(3, 32, 32\). Got a network of \(3, 8, 8\)",
    ),
    "no network": (("layers",), "Name a shipped network .* Got none"),
    "two networks": (("layers", SHIPPED, "--model", "a:b"), "Got a shipped name and --model"),
    "unknown network": (("layers", "vgg9"), "must be one of .*vgg7-cifar10.* Got 'vgg9'"),
    "no such module": (
        ("layers", "--model", "nowhere:f"),
        "must be module:function, importable from here. Got 'nowhere:f'",
    ),
    "no such function": (("layers", "--model", "math:f"), "must be module:function"),
    "no module built": (
        ("layers", "--model", f"{__name__}:no_network"),
        "returns a torch.nn.Module. Got str",
    ),
    "no weights": (
        ("layers", *TINY, "--weights", "nowhere.pt"),
        "--weights must be a file. Got nowhere.pt",
    ),
    "unknown layer": (
        ("map", SHIPPED, "--layer", "conv9", "--mode", "RM2"),
        "A layer must be one of conv0, .* Got 'conv9'",
    ),
    "mode not of the layer": (
        ("map", SHIPPED, "--layer", "fc", "--mode", "RM2"),
        "has the modes RM0. Got 'RM2'",
    ),
    "unknown mode": (("map", SHIPPED, "--layer", "fc", "--mode", "RM7"), '"RM7" for --mode'),
    "units that are none": (
        ("map", SHIPPED, "--layer", "fc", "--mode", "RM0", "--units", "x"),
        "--units must be ints and slices",
    ),
    "unit out of range": (
        ("map", SHIPPED, "--layer", "fc", "--mode", "RM0", "--units", "10"),
        "out_feature of 0 to 9. Got",
    ),
    "image out of range": (
        ("verify", SHIPPED, "--image", "200"),
        "--image must be from 0 to 199.* Got 200",
    ),
    "no such picture": (
        ("verify", SHIPPED, "--image", "nowhere.png"),
        "a sample image, a picture file, or random. Got nowhere.png",
    ),
    "too many images": (
        ("verify", SHIPPED, "--images", "201"),
        "--images must be from 1 to 200. Got 201",
    ),
    "too many for the table": (
        ("analyse", SHIPPED, "--sparse", "2"),
        "--sparse must be from 0 to --images, 1. Got 2",
    ),
    "no such data": (
        ("verify", SHIPPED, "--images", "2", "--dataset", "svhn"),
        '"svhn" for --dataset',
    ),
    "two kinds of workers": (
        ("verify", SHIPPED, "--workers", "2", "--cluster", "tcp://a:1"),
        r"shared by --workers or by --cluster. Got both \(2, tcp://a:1\): leave one out",
    ),
    "no workers": (
        ("verify", *TINY_CIFAR, "--workers", "0"),
        "workers must be at least 1, or the address .* Got 0",
    ),
    "threads": (("verify", SHIPPED, "--threads", "0"), "--threads must be at least 1. Got 0"),
    "memory": (
        ("map", SHIPPED, "--layer", "conv1", "--mode", "RM4", "--memory", "100B"),
        "memory must be at least .* for one hyperplane of 'conv1'. Got 100: raise memory",
    ),
    "unknown architecture": (("train", "vgg9"), "must be one of vgg7-nobias"),
    "no data": (
        ("evaluate", SHIPPED, "--data", "nowhere"),
        "nowhere/cifar-10-batches-bin must hold the official binary files",
    ),
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


def test_a_picture_of_another_size_is_resized_and_said_so(run, tmp_path):
    """As abm.image does it; the record and the output have what was done."""
    picture = tmp_path / "large.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    imsave(picture, pixels)
    out = tmp_path / "planes"
    words = ("--layer", "fc", "--mode", "RM0", "--image", str(picture), "--out", str(out))
    status, text, err = run("map", SHIPPED, *words)
    assert status == 0, err
    assert "large.png (resized to 32 x 51, cropped at row 0, column 10)" in text
    expected = abm.models.load(SHIPPED)(abm.image(pixels, size=32))
    stored = abm.open(tmp_path / "planes.zarr").value
    torch.testing.assert_close(stored, expected.detach(), rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "planes.json").read_text())
    assert record["image"] == str(picture)
    assert "resized to 32 x 51" in record["image as the network took it"]
    assert f"Written: {out} with the endings .zarr, .png, .npz, .json" in text


OWN_PICTURES = ("--mean", "0.4", "0.5", "0.6", "--std", "0.2")


@pytest.mark.parametrize("image", [None, "ship", "grey.png"])
def test_own_network_is_given_pictures_of_its_size_and_normalisation(run, tmp_path, image):
    """A sample image, the default, and a grey picture; normalised as the options say."""
    grey = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    sample = data.sample()
    ship = sample.pixels[int((sample.labels == 8).nonzero()[0])]
    source = {None: sample.pixels[0], "ship": ship, "grey.png": grey}[image]
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\n")
    words = ["map", *TINY[:2], "--size", "8", *OWN_PICTURES, "--layer", "3", "--mode", "RM0"]
    words += ["--classes", str(classes), "--out", str(tmp_path / "planes")]
    if image:
        words += ["--image", str(tmp_path / image) if "." in image else image]
    status, _, err = run(*words)
    assert status == 0, err
    x = abm.image(source, size=8, mean=(0.4, 0.5, 0.6), std=0.2)
    expected = tiny_network()(x).detach()
    stored = abm.open(tmp_path / "planes.zarr").value
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "planes.json").read_text())
    assert record["mean"] == [0.4, 0.5, 0.6]
    assert record["classes"] == ["cat", "dog"]


def test_presets_have_size_and_normalisation():
    own = NetworkOptions(model=f"{__name__}:tiny_network", preprocess="imagenet")
    subject = load_subject(own)
    assert subject.shape == (3, 224, 224)
    pixels = torch.rand(3, 224, 224)
    preset = PRESETS["imagenet"]
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (preset.mean, preset.std))
    assert torch.equal(subject.prepare(pixels), (pixels - mean) / std)
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    found = abm.image(photo, preprocess="imagenet")
    assert found.preparation.resized == (256, 341)


def test_default_name_has_network_layer_and_image(run, tmp_path, monkeypatch):
    """A second map of another image does not meet the first one."""
    monkeypatch.chdir(tmp_path)
    for image in ("ship", "frog"):
        words = ("--layer", "fc", "--mode", "RM0", "--units", "0", "--image", image)
        assert run("map", SHIPPED, *words)[0] == 0
    names = {path.name for path in tmp_path.glob("*.zarr")}
    assert names == {f"hyperplanes-{SHIPPED}-fc-RM0-0-{image}.zarr" for image in ("ship", "frog")}
    words = ("--layer", "fc", "--mode", "RM0", "--units", "0", "--out", "a", "--image")
    assert run("map", SHIPPED, *words, "ship")[0] == 0
    status, _, err = run("map", SHIPPED, *words, "frog")
    assert status == 2
    assert "--out must be a store of the same hyperplanes" in err
    assert "choose another --out" in err


def test_evaluate_refuses_a_network_of_other_classes(run):
    status, _, err = run("evaluate", *TINY_CIFAR, "--dataset", "sample")
    assert status == 2
    assert "an output for each of the 10 classes of sample. Got outputs of shape (2,)" in err


def test_missing_libraries_are_named_before_any_work(run, monkeypatch, tmp_path):
    """With the command that installs them: brackets are no markup."""
    monkeypatch.setattr(frame, "_is_installed", lambda module: False)
    for words, extra in (
        (("verify", SHIPPED, "--workers", "2"), "cluster"),
        (("study", "verification", "--workers", "2"), "cluster"),
        (("study", "all", "--sample", "--out", str(tmp_path / "s")), "study"),
    ):
        status, out, err = run(*words)
        assert status == 2
        assert err.strip().endswith(f"pip install 'adjointbackmap[{extra}]'.")
        assert not out
    assert not (tmp_path / "s").exists()
    assert "needs Jinja2, Plotly, Captum, scikit-learn. Got an installation without" in err


def test_report_of_an_unfinished_study_is_refused(run, tmp_path):
    status, _, err = run("report", str(tmp_path))
    assert status == 2
    assert "must hold the results of adjointbackmap study all" in err
    (tmp_path / "study.json").write_text("{}")
    status, _, err = run("report", str(tmp_path))
    assert status == 2
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "words", [("verify", SHIPPED), ("train", "vgg7"), ("study", "verification")], ids=" ".join
)
def test_device_that_is_not_there_is_one_line(run, words):
    status, _, err = run(*words, "--device", "cuda")
    assert status == 2
    assert "--device cuda needs a GPU that PyTorch can use. Got PyTorch" in err


# tables


@pytest.mark.parametrize("kind", ["--json", "--csv"])
def test_tables_are_for_programs_too(run, kind):
    """The same cells as in the table for people; other lines go to standard error."""
    status, out, err = run("layers", SHIPPED, kind)
    assert status == 0
    assert "384 biases" in err
    if kind == "--json":
        (document,) = json.loads(out)
        rows = document["rows"]
    else:
        rows = list(csv.DictReader(io.StringIO(out)))
    conv3 = next(row for row in rows if row["layer"] == "conv3")
    assert conv3["output"] == "64x16x16"
    assert conv3["hyperplanes"] == "16,384 in RM2"


def test_two_tables_of_numbers_are_refused_together(run):
    status, _, err = run("layers", SHIPPED, "--json", "--csv")
    assert status == 2
    assert "--json or --csv" in err


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_terminals_show_whole_numbers(width):
    """A table that does not fit becomes several, with the first column in each."""
    check = LayerCheck("layer1.0.conv2", units=16_384_000, within=16_384_000)
    check.within_signed = 16_384_000
    console = Console(width=width, file=io.StringIO())
    TABLES.tables(console, check_table({check.layer: check}))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for cell in ("16,384,000", "100.0000", "0.0e+00", "0 (0)"):
        assert cell in text
    assert sum("layer1.0.conv2" in line for line in lines) > 1


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(lines, "SECONDS", 0.0)
    bar = lines.LinesOfProgress("a")
    for share in (0.05, 0.1, 0.15, 0.3):
        bar.update(bar.job, completed=share)
    bar.update(bar.job, completed=0.3, description="b")
    bar.reset(bar.job, description="c")
    assert bar.tasks[bar.job].description == "c"
    err = capsys.readouterr().err.splitlines()
    assert err == ["a (10 % done)", "a (30 % done)", "b (30 % done)", "c (0 % done)"]


def test_help_has_no_options_for_empty_lists(run):
    for words in (("layers", "--help"), ("verify", "--help"), ("study", "all", "--help")):
        status, out, _ = run(*words)
        assert status == 0
        assert "--empty" not in out


# the help


def commands(program, words=()):
    """Each command by its words; those with commands of their own by these."""
    for name in program:
        if name.startswith("-"):
            continue
        inner = dict(commands(program[name], (*words, name)))
        yield from inner.items() if inner else [((*words, name), program[name])]


COMMANDS = {" ".join(words): command for words, command in commands(cli.app)}


@pytest.mark.parametrize("words", COMMANDS)
def test_help_of_each_command_has_examples_that_parse(words):
    shown = COMMANDS[words].help_epilogue
    lines = [line for line in shown.splitlines() if line.startswith("adjointbackmap")]
    assert lines
    for line in lines:
        assert line.startswith(f"adjointbackmap {words}")
        cli.app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("words", COMMANDS)
def test_help_shows_its_examples_and_no_option_that_says_nothing(run, words):
    status, out, _ = run(*words.split(), "--help")
    assert status == 0
    assert f"adjointbackmap {words}" in out.split("Examples:")[1]
    negative = set(re.findall(r"--no-[\w-]+", out))
    # two have a third state, in which the command decides; the explorer opens a browser by itself
    assert negative <= {"--no-own-bias", "--no-until-success", "--no-browser"}


def test_attack_prints_its_table_for_programs(run, tmp_path):
    words = ("attack", *TINY_CIFAR, "--iterations", "1", "--out", str(tmp_path), "--json")
    status, out, err = run(*words)
    assert status == 0, err
    (table,) = json.loads(out)
    assert table["rows"][0]["fooled"] in {"yes", "no"}
    assert "Written:" in err
