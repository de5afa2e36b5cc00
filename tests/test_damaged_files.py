"""Damaged weights, cards, data and examples are found and named in one sentence; none is run."""

import json
import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import harm
from safetensors.torch import load_file, save_file
from test_cli import run as run  # the fixture
from torch import nn

from adjointbackmap import data, models
from adjointbackmap.examples import read_examples
from adjointbackmap.files.checked import DamagedFile, read_sealed, sealed, sha256_of
from adjointbackmap.files.weights import load_weights, read_torch, read_weights, torch_bytes

SEEDS = range(20)
SHIPPED = Path(models.__file__).with_name("assets")


def small(seed=0):
    """A small network with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
        ).eval()


def assert_one_sentence(error, path):
    """It names the file and says what to do, in one line of less than 500 characters."""
    text = str(error)
    assert path.name in text
    assert "\n" not in text
    assert len(text) < 500
    assert ": " in text or isinstance(error, FileNotFoundError)


def same(ours, theirs):
    """The same tensors by name."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def read_or_refused(read, path):
    """What is read of a file; ``None`` where it is refused as it should be."""
    refusal = None
    try:
        return read(path)
    except (ValueError, FileNotFoundError) as error:
        refusal = error
    assert_one_sentence(refusal, path)
    return None


# weights


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_weights_of_torch(tmp_path, seed):
    """Damage that the ZIP checksums miss changes no number; torch.load alone compares none."""
    model = small()
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    harm(tmp_path, seed)
    found = read_or_refused(read_weights, path)
    assert found is None or same(found, model.state_dict())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("known", ["card", "list"])
def test_damaged_weights_with_a_checksum(tmp_path, seed, known):
    """A card or a list of checksums beside the file finds every flipped bit."""
    model = small()
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    if known == "card":
        (tmp_path / "weights.json").write_text(json.dumps(sealed({"file sha256": sha256_of(path)})))
    else:
        (tmp_path / "SHA256SUMS").write_text(f"{sha256_of(path)}  weights.safetensors\n")
    assert same(read_weights(path), model.state_dict())
    harm(tmp_path, seed, "*.safetensors")
    assert read_or_refused(read_weights, path) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_safetensors_are_one_sentence(tmp_path, seed):
    """Without a checksum, a header that fits no more."""
    path = tmp_path / "weights.safetensors"
    save_file(small().state_dict(), path)
    harm(tmp_path, seed, harms=("truncate", "longer", "empty", "garbage"))
    assert read_or_refused(read_weights, path) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_what_torch_bytes_gives_is_as_it_was_or_refused(tmp_path, seed):
    """Its own checksum covers all of it; torch.load reads it as well."""
    content = {"step": 3, "model": dict(small().state_dict())}
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(torch_bytes(content))
    assert torch.load(path, weights_only=True)["step"] == 3
    harm(tmp_path, seed)
    found = read_or_refused(read_torch, path)
    assert found is None or (found["step"] == 3 and same(found["model"], content["model"]))


class Harmful:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch run-by-the-pickle",)


@pytest.mark.parametrize("how", ["pickle", "torch", "module"])
def test_pickled_objects_are_refused(tmp_path, monkeypatch, how):
    """Nothing of it is run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Harmful()))
    else:
        torch.save(small() if how == "module" else {"a": Harmful()}, path)
    with pytest.raises(
        DamagedFile,
        match=(
            r"must hold tensors. Got a damaged file, "
            r"or a pickle of other objects, .*: save model"
        ),
    ):
        read_weights(path)
    assert not (tmp_path / "run-by-the-pickle").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {1: torch.ones(2)}, torch.ones(2)], ids=str
)
def test_other_content_is_refused(tmp_path, content):
    """With what it is."""
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(
        ValueError,
        match=r"weights.pt must hold tensors by name. Got .*: save model.state_dict\(\) alone",
    ):
        read_weights(tmp_path / "weights.pt")


def test_weights_of_another_model_are_one_sentence():
    """All that PyTorch says, in one line and shortened."""
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"w.pt must have the weights of Sequential. Got others: .*Missing key"
    ) as refusal:
        load_weights(small(), other.state_dict(), "w.pt")
    assert "\n" not in str(refusal.value)


def test_old_format_of_torch_is_read(tmp_path):
    """No ZIP file: without checksums."""
    torch.save(small().state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "w.pth"), small().state_dict())


# what ships


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A copy of one network that ships."""
    folder = tmp_path / "assets"
    folder.mkdir()
    for ending in ("safetensors", "json"):
        shutil.copy(SHIPPED / f"vgg7-cifar10.{ending}", folder)
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    return folder


def test_everything_that_ships_has_a_checksum():
    """Each card has its own, and that of the weights."""
    for name in models.names("all"):
        path = SHIPPED / f"{name}.json"
        assert "checksum" in json.loads(path.read_text())
        assert models.card(name)["file sha256"] == sha256_of(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_shipped_network(assets, seed):
    """No flipped bit of weights or card goes unseen."""
    expected = load_file(assets / "vgg7-cifar10.safetensors")
    card = models.card("vgg7-cifar10")
    path = harm(
        assets, seed, harms=("flip", "flip", "truncate", "zeros", "garbage", "longer", "empty")
    )
    read = read_or_refused(
        lambda path: (models.card("vgg7-cifar10"), models.load("vgg7-cifar10").state_dict()), path
    )
    assert read is None or (read[0] == card and same(read[1], expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_sample(tmp_path, monkeypatch, seed):
    """One bit of one pixel is enough."""
    (tmp_path / "assets").mkdir()
    shutil.copy(SHIPPED / "cifar10-sample.bin", tmp_path / "assets")
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    assert len(data.sample()) == 200
    harm(tmp_path, seed, harms=("flip", "zeros", "truncate", "garbage"))
    with pytest.raises(
        ValueError,
        match=(
            r"cifar10-sample.bin must have the SHA-256 that the package says.*: "
            r".*install it again"
        ),
    ):
        data.sample()


# data


def test_list_of_checksums_finds_a_flipped_bit(tmp_path, monkeypatch):
    """Where there is one: the files that it names are compared, the others are not."""
    source = replace(data.SOURCES["cifar10"], records_per_file={"test_batch.bin": 200})
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    for name in (*source.train_files, *source.test_files):
        (tmp_path / name).write_bytes(data.encode(data.sample()))
    path = tmp_path / "test_batch.bin"
    expected = sha256_of(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert len(data.load("cifar10", "test", tmp_path)) == 200
    (tmp_path / "SHA256SUMS").write_text(
        f"{expected}  ./test_batch.bin\n{expected} *data_batch_1.bin\n"
    )
    with pytest.raises(
        DamagedFile,
        match=r"test_batch.bin must have the SHA-256 that .*SHA256SUMS says. Got another one",
    ):
        data.load("cifar10", "test", tmp_path)
    (tmp_path / "SHA256SUMS").write_text("what\n")
    with pytest.raises(
        DamagedFile,
        match=r"SHA256SUMS must have lines of sha256sum. Got 'what' in line 1: make it again",
    ):
        data.load("cifar10", "test", tmp_path)


# examples


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ending", ["npz", "pt"])
def test_damaged_examples(tmp_path, seed, ending):
    """The checksums in NPZ and in what torch.save writes are compared."""
    images = torch.rand(3, 3, 8, 8)
    path = tmp_path / f"made.{ending}"
    if ending == "npz":
        np.savez(path, adversarial=images.numpy())
    else:
        torch.save({"adversarial": images}, path)
    harm(tmp_path, seed)
    found = read_or_refused(read_examples, path)
    assert found is None or torch.equal(found, images)


def test_pickled_examples_are_refused(tmp_path, monkeypatch):
    """Nothing of them is run."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "made.npz", adversarial=np.array([Harmful()], dtype=object))
    np.save(tmp_path / "made.npy", np.array([Harmful()], dtype=object))
    for name in ("made.npz", "made.npy"):
        with pytest.raises(
            ValueError, match=rf"{name} must hold arrays. It could not be read: .*: write it again"
        ):
            read_examples(tmp_path / name)
    assert not (tmp_path / "run-by-the-pickle").exists()


def test_examples_are_compared_with_their_card(tmp_path):
    """A bit of a pixel."""
    path = tmp_path / "attack.safetensors"
    save_file({"adversarial": torch.rand(2, 3, 4, 4)}, path)
    (tmp_path / "attack.json").write_text(json.dumps(sealed({"file sha256": sha256_of(path)})))
    read_examples(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(
        DamagedFile,
        match=r"attack.safetensors must have the SHA-256 that .*attack.json says. Got another one",
    ):
        read_examples(path)


# JSON with its checksum


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_json(tmp_path, seed):
    """Every number is as it was, or the file is refused."""
    content = {"errors": [0.1 + 0.2, float("inf"), 1e-300], "units": {"conv0": 10}, "name": "é"}
    path = tmp_path / "found.json"
    path.write_text(json.dumps(sealed(content), indent=1))
    assert read_sealed(path) == content
    harm(tmp_path, seed)
    found = read_or_refused(read_sealed, path)
    assert found is None or {key: found[key] for key in content} == content


def test_json_of_an_older_version_has_no_checksum(tmp_path):
    """It is read as it is."""
    (tmp_path / "found.json").write_text('{"units": 3}')
    assert read_sealed(tmp_path / "found.json") == {"units": 3}


# commands


def tiny():
    """What --model names in these tests."""
    return nn.Conv2d(3, 2, 3)


@pytest.mark.parametrize("kind", ["weights", "picture", "examples"])
def test_commands_say_it_in_one_line(run, tmp_path, monkeypatch, kind):
    """Status 2, and no traceback."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])  # however pytest imported it
    monkeypatch.chdir(tmp_path)
    options = {
        "weights": ["layers", "--model", f"{__name__}:tiny", "--weights", "bad.safetensors"],
        "picture": ["map", "vgg7-cifar10", "--layer", "fc", "--mode", "RM0", "--image", "bad.png"],
        "examples": ["attack", "vgg7-cifar10", "--examples", "bad.npz"],
    }[kind]
    bad = next(option for option in options if option.startswith("bad."))
    (tmp_path / bad).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    status, _, err = run(*options)
    assert status == 2
    assert "Traceback" not in err
    assert bad in err
    assert len(err.strip().splitlines()) == 1
