"""Kept results: one process per folder, no mixed settings, safe on full disks and SIGTERM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import run as run  # the fixture
from test_disk import small_disk as small_disk
from torch import nn

from adjointbackmap import data, models
from adjointbackmap.files import disk
from adjointbackmap.files.stopping import Stopped, stoppable
from adjointbackmap.study import everything, setup
from adjointbackmap.study.adversarial import noise
from adjointbackmap.study.everything import EXPERIMENTS
from adjointbackmap.study.verification import results_file
from adjointbackmap.training import loop as training

NETWORK = "vgg7-nobias-cifar10"
OTHER = "vgg7-cifar10"
SPLITS = {"train": slice(0, 64), "validation": slice(64, 80), "test": slice(80, 100)}
STEPS = 4


def tiny() -> nn.Module:
    """What --model names in these tests."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 4)
    )


TINY = ("--model", f"{__name__}:tiny")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The functions of this file can be named by --model, however pytest imported it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.fixture
def little_data(monkeypatch):
    """A few images of the sample in place of CIFAR-10, and one setting in place of the fastest."""
    images = data.sample().draw(100, seed=0)
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: images[SPLITS[split]])
    monkeypatch.setattr(
        training,
        "fastest_setting",
        lambda *args: training.Setting(channels_last=True, bfloat16=False),
    )


def task(**changes):
    """Four steps of the smallest network."""
    return training.Task(
        "vgg7", "cifar10", **{"recipe": training.Recipe(epochs=1, batch=16), **changes}
    )


def steps_of(folder):
    """How far the checkpoint of a folder is."""
    return torch.load(folder / training.CHECKPOINT, weights_only=True)["step"]


# one process in a folder

WRITERS = {
    "save": ("map", *TINY, "--layer", "3", "--mode", "RM0", "--out", "{}/a", "--image", "0"),
    "verify": ("verify", *TINY, "--keep", "{}/a"),
    "attack": ("attack", *TINY, "--out", "{}/a"),
    "attack-keep": ("attack", *TINY, "--out", "{}/b", "--keep", "{}/a"),
    "train": ("train", "vgg7", "--out", "{}/a"),
    "study": ("study", "all", "--sample", "--network", NETWORK, "--out", "{}/a"),
    "verification": ("study", "verification", "--network", NETWORK, "--out", "{}/a"),
    "bench": ("bench", "--quick", "--out", "{}/a"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_second_process_is_told(run, tmp_path, name):
    """Status 2 and one sentence with the holder, before anything is computed or written."""
    folders = ("save", "attack", "train", "study", "verification")
    path = tmp_path / ("a.zarr" if name == "save" else "a")
    with disk.hold_folder(path) if name in folders else disk.hold_file(path):
        status, _, err = run(*(word.format(tmp_path) for word in WRITERS[name]))
        assert status == 2
        assert (
            f"a{'.zarr' if name == 'save' else ''} must be written by one process at a time" in err
        )
        assert f"It is in use by process {os.getpid()} on " in err
        assert err.count("\n") == 1
        left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert left <= {disk.LOCK, f"a{disk.LOCK}"}


# other settings


@pytest.fixture
def measured(monkeypatch):
    """An experiment that takes no time: the images that it was run on."""
    seen = []
    monkeypatch.setattr(
        noise, "measure_noise", lambda trained, image: seen.append(image.hashes[0]) or ({}, {})
    )
    monkeypatch.setitem(
        EXPERIMENTS, "noise", replace(EXPERIMENTS["noise"], section=lambda folder: None)
    )
    return seen


def contents(folder):
    """Every file of a folder and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_of_fewer_networks_has_the_same_image(tmp_path):
    """The image of a class is one that all shipped networks know, whichever of them are run."""
    runs = [
        setup.Setup(tmp_path, names, "cat", sample=True)
        for names in ((OTHER,), (OTHER, "resnet20-cifar10"))
    ]
    images = [run.one(OTHER) for run in runs]
    assert images[0].hashes == images[1].hashes
    for name in (name for name in models.names() if models.card(name)["dataset"] == "cifar10"):
        trained = runs[0].trained(name)
        assert (
            trained.subject.module(trained.input(images[0].unit_interval())).argmax()
            == images[0].labels
        )


def test_a_study_of_other_settings_is_refused(run, tmp_path, measured):
    """Refused before any computation, and the files stay; a new network may have its own."""
    asked = ("study", "all", "--sample", "--only", "noise", "--out", str(tmp_path / "study"))
    assert run(*asked, "--network", NETWORK, "--images", "3")[0] == 0
    before = contents(tmp_path / "study")
    for words in (
        ("--images", "4"),
        ("--images", "3", "--seed", "1"),
        ("--images", "3", "--image", "frog"),
    ):
        status, _, err = run(*asked, "--network", NETWORK, OTHER, *words)
        assert status == 2
        assert f"must have results of {NETWORK} for the same settings" in err
        assert "name another folder with --out" in err
    assert contents(tmp_path / "study") == before
    assert len(measured) == 1
    assert run(*asked, "--network", OTHER, "--images", "4")[0] == 0


def test_a_mistake_does_not_claim_a_folder(run, tmp_path, measured):
    """Where nothing was computed, other settings are welcome."""
    asked = (
        "study",
        "all",
        "--sample",
        "--only",
        "noise",
        "--network",
        NETWORK,
        "--out",
        str(tmp_path),
    )
    assert run(*asked, "--image", "zzz")[0] == 2
    assert run(*asked)[0] == 0
    assert "image of the study" in everything.about(tmp_path)["settings"][NETWORK]


def test_a_killed_study_has_told_its_settings(run, tmp_path, monkeypatch):
    """Before its first result."""
    told = []

    def compute(setup, report):
        told.append(everything.about(tmp_path)["settings"])

    experiment = replace(EXPERIMENTS["noise"], compute=compute, section=lambda folder: None)
    monkeypatch.setitem(EXPERIMENTS, "noise", experiment)
    asked = ("study", "all", "--sample", "--only", "noise", "--network", NETWORK)
    status, _, err = run(*asked, "--out", str(tmp_path))
    assert (status, "where none was finished" in err) == (2, True)
    assert list(told[0]) == [NETWORK]


def test_verification_of_other_weights_is_refused(tmp_path):
    """What the file has of the network stays."""
    results = results_file.Results(tmp_path)
    results.network(NETWORK, "0" * 64)["accuracy"] = 1
    with pytest.raises(
        ValueError,
        match=(
            r"must have results of the weights 11111111 of .* Got those of 00000000: "
            r"name another"
        ),
    ):
        results.network(NETWORK, "1" * 64)
    assert results.network(NETWORK, "0" * 64)["accuracy"] == 1


def test_another_attack_is_refused(run, tmp_path):
    """Other steps, or fewer images; more images of the same attack are welcome."""
    asked = ("attack", *TINY, "--out", str(tmp_path / "out"), "--iterations", "2")
    assert run(*asked, "--images", "3")[0] == 0
    before = contents(tmp_path / "out")
    for words, differs in (
        (("--images", "3", "--step", "0.5"), "step 0.0"),
        (("--images", "2"), "1 images that this run lacks"),
        (("--image", "horse"), "3 images that this run lacks"),
    ):
        status, _, err = run(*asked, *words)
        assert status == 2
        assert "must hold results of this job. Got those of another" in err
        assert differs in err
    assert contents(tmp_path / "out") == before
    assert run(*asked, "--images", "4")[0] == 0


def test_a_picture_without_a_store_is_kept(run, tmp_path):
    """It is not map's own."""
    (tmp_path / "photo.png").write_text("a year's work")
    status, _, err = run(
        "map", *TINY, "--layer", "3", "--mode", "RM0", "--out", str(tmp_path / "photo")
    )
    assert status == 2
    assert "photo.png without photo.zarr: choose another name" in err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_weights_without_their_checkpoint_are_kept(tmp_path, little_data):
    """A training would replace them at its end."""
    (tmp_path / "vgg7-cifar10.safetensors").write_text("weights")
    with pytest.raises(
        ValueError,
        match=r"Got vgg7-cifar10.safetensors without its checkpoint.pt: name another folder",
    ):
        training.train(task(), tmp_path)
    assert (tmp_path / "vgg7-cifar10.safetensors").read_text() == "weights"


# a full disk


def test_verify_on_a_full_disk(run, small_disk):
    """One sentence with the file; with room it goes on."""
    asked = ("verify", *TINY, "--keep", str(small_disk / "kept.jsonl"), "--images")
    assert run(*asked, "2")[0] == 0
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    status, _, err = run(*asked, "6")
    assert status == 2
    assert "The disk must have room for" in err
    assert (
        "kept.jsonl. Got 0.0 MiB free: make room and run the same again, "
        "which keeps what is finished."
    ) in err.replace("\n", "")
    (small_disk / "filler").unlink()
    assert run(*asked, "6")[0] == 0


def test_study_on_a_full_disk(run, small_disk, monkeypatch):
    """The experiment before stays; the file that has no room is named, not that of the settings."""
    arrays = {"large": torch.rand(2**17).numpy()}
    monkeypatch.setattr(noise, "measure_noise", lambda trained, image: ({}, arrays))
    monkeypatch.setitem(
        EXPERIMENTS, "noise", replace(EXPERIMENTS["noise"], section=lambda folder: None)
    )
    status, _, err = run(
        "study",
        "all",
        "--sample",
        "--only",
        "noise",
        "--network",
        NETWORK,
        "--out",
        str(small_disk),
    )
    assert status == 2
    assert f"The disk must have room for {small_disk / 'noise' / NETWORK}.npz." in err
    assert [path.name for path in (small_disk / "noise").iterdir()] == []


def test_training_on_a_full_disk(tmp_path, little_data, monkeypatch):
    """The last checkpoint stays, from which it goes on."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    write = disk.write

    def full_at(step):
        def limited(path, content):
            if path.name == training.CHECKPOINT and path.exists() and steps_of(tmp_path) == step:
                raise disk.DiskFull(path)
            return write(path, content)

        return limited

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write", full_at(2))
        with pytest.raises(
            disk.DiskFull,
            match=r"must have room for .*checkpoint.pt. Got .* MiB free: make room and run",
        ):
            training.train(task(), tmp_path)
    assert steps_of(tmp_path) == 2
    seen = []
    training.train(task(), tmp_path, report=lambda progress: seen.append(progress.step))
    assert seen == [3, 4]


# signals


def test_sigterm_ends_the_step_and_saves_it(tmp_path, little_data, monkeypatch):
    """A signal within a step: the checkpoint has the step, and the run goes on with the next."""
    calls = []
    loss = training.training_loss

    def signalled(*args):
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    def stopped():
        with stoppable():
            training.train(task(), tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_loss", signalled)
        with pytest.raises(Stopped):
            stopped()
    assert steps_of(tmp_path) == 2
    seen = []
    training.train(task(), tmp_path, report=lambda progress: seen.append(progress.step))
    assert seen == [3, 4]
    assert load_file(tmp_path / "vgg7-cifar10.safetensors")


def test_the_first_checkpoint_comes_at_once(tmp_path, little_data, monkeypatch):
    """Before the first step."""
    seen = []
    loss = training.training_loss
    monkeypatch.setattr(
        training, "training_loss", lambda *args: seen.append(steps_of(tmp_path)) or loss(*args)
    )
    training.train(task(), tmp_path)
    assert seen == [0] * STEPS


def test_sigterm_of_a_command_keeps_what_is_finished(tmp_path):
    """Status 143, one line; the same command goes on where it was."""
    keep = tmp_path / "kept.jsonl"
    here = Path(__file__).parent
    code = "import sys; sys.argv[0] = 'adjointbackmap'; from adjointbackmap.cli import main; main()"
    words = ("verify", "--model", "test_kept_runs:tiny", "--images", "200", "--keep", str(keep))
    path = os.pathsep.join([str(here), *sys.path])
    program = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    while program.poll() is None and not (keep.exists() and keep.read_bytes().count(b"\n") > 3):
        time.sleep(0.002)
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate()
    assert (program.returncode, err.strip()) == (
        128 + signal.SIGTERM,
        "stopped; finished work is kept",
    )
    lines = [json.loads(line) for line in keep.read_text().splitlines()]
    assert 4 <= len(lines) < 201
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]
