"""Damaged checkpoints and results are set aside and made again, or refused in one sentence."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from damage import harm
from safetensors.torch import load_file, save_file
from test_cli import importable as importable  # fixtures
from test_cli import run as run
from test_training import KilledError, assert_same_end, stop_at, task
from test_training import little_data as few_images

from adjointbackmap import data, models
from adjointbackmap.benchmark import runs as benchmark
from adjointbackmap.benchmark.ways import Settings
from adjointbackmap.exactness.layer_check import LayerCheck
from adjointbackmap.files.checked import DamagedFile, DamagedFileWarning, sealed_text
from adjointbackmap.study import everything, results
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.setup import Setup, read_json, write_json
from adjointbackmap.study.verification import results_file
from adjointbackmap.study.verification.tally import Tally
from adjointbackmap.training import loop as training

SEEDS = range(20)
TINY = ("attack", "--model", "test_damaged_results:tiny", "--images", "2")
little_data = few_images


def tiny():
    """What --model names in these tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 2, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(128, 3)
        )


# checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped at its last step but one, and that of the whole run."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("stopped")
    whole = tmp_path_factory.mktemp("whole")
    images = data.sample().draw(200, seed=0)
    splits = {"train": images[:40], "validation": images[70:80], "test": images[110:120]}
    patch.setattr(data, "load", lambda dataset, split, root=None: splits[split])
    patch.setattr(
        training,
        "fastest_setting",
        lambda *args: training.Setting(channels_last=True, bfloat16=False),
    )
    patch.setattr(training, "draw_curves", lambda log, title: None)
    with pytest.raises(KilledError):
        training.train(task(), folder, report=stop_at(3))
    training.train(task(), whole)
    yield folder, whole, splits
    patch.undo()


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_checkpoint(stopped, tmp_path, monkeypatch, seed):
    """A run goes on from the last good state, or from the start, and ends like an unbroken run."""
    folder, whole, splits = stopped
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: splits[split])
    out = shutil.copytree(folder, tmp_path / "run")
    steps = []
    (out / "log.jsonl").unlink()
    harm(out, seed, "checkpoint.pt")
    there = (out / "checkpoint.pt").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.train(task(), out, report=lambda progress: steps.append(progress.step))
    said = [str(warning.message) for warning in caught if warning.category is DamagedFileWarning]
    assert steps[0] in (1, 4)
    assert (
        steps[0] == 4
        or not there
        or f"{out / 'checkpoint.pt'} is damaged, so that it is made again" in said[0]
    )
    assert steps[0] == 4 or not there or (out / "checkpoint.pt.damaged").exists()
    assert_same_end(out, whole)


@pytest.mark.parametrize(
    "content", [{}, [1], {"task": {}}, {"task": {"network": "vgg7", "recipe": 3}}], ids=str
)
def test_other_content_is_no_checkpoint(tmp_path, content):
    """It is kept beside, and training begins."""
    torch.save(content, tmp_path / "checkpoint.pt")
    with (
        pytest.warns(
            DamagedFileWarning, match=r"checkpoint.pt is damaged, .* is now checkpoint.pt.damaged"
        ),
        pytest.raises(KilledError),
    ):
        training.train(task(), tmp_path, report=stop_at(1))
    assert torch.load(tmp_path / "checkpoint.pt.damaged", weights_only=True) == content


def test_card_has_the_checksums(stopped, tmp_path):
    """Weights to start from are compared with their card."""
    _, whole, _ = stopped
    shutil.copytree(whole, tmp_path / "first")
    weights = tmp_path / "first" / "vgg7-cifar10.safetensors"
    state = load_file(weights)
    state["fc.weight"][0, 0] += 1e-6
    save_file(state, weights)
    with pytest.raises(
        DamagedFile,
        match=r"vgg7-cifar10.safetensors must have the SHA-256 that .*vgg7-cifar10.json says",
    ):
        training.train(task(start=str(weights)), tmp_path / "second")
    weights.write_bytes(b"what")
    weights.with_suffix(".json").unlink()
    with pytest.raises(
        DamagedFile,
        match=r"must be a safetensors file. It could not be read \(.*\): fetch or write it again",
    ):
        training.train(task(start=str(weights)), tmp_path / "third")
    save_file({"a": torch.ones(2)}, weights)
    with pytest.raises(
        ValueError, match=r"must have the weights of VGG7. Got others: .*Missing key"
    ):
        training.train(task(start=str(weights)), tmp_path / "fourth")


def test_trained_network_with_a_damaged_log(tmp_path):
    """The log is written again, from the checkpoint."""
    with pytest.raises(KilledError):
        training.train(task(), tmp_path, report=stop_at(5))
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text("what")
    with pytest.raises(KilledError):
        training.train(task(), tmp_path, report=stop_at(6))
    assert (tmp_path / "log.jsonl").read_text() == whole


# results of the study

NAME = (
    PUBLISHED_COLUMNS[0] if isinstance(PUBLISHED_COLUMNS, tuple) else next(iter(PUBLISHED_COLUMNS))
)
SETTINGS = {"seed": 0, "steps": [0.1, 0.2]}


def measured():
    """Numbers and arrays."""
    return {"error": 0.1 + 0.2, "classes": ["cat", "dog"]}, {
        "map": np.arange(12.0).reshape(3, 4),
        "names": np.array(["a", "b"]),
    }


def same(found, arrays):
    """Whether they are those that were measured."""
    numbers, expected = measured()
    return numbers.items() <= found.items() and all(
        np.array_equal(arrays[name], array) for name, array in expected.items()
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ending", ["json", "npz"])
def test_damaged_results(tmp_path, seed, ending):
    """The page refuses them by their name; the next run makes them again, and says so."""
    path = tmp_path / f"{NAME}.json"
    results.keep(path, SETTINGS, measured)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    damaged = harm(tmp_path, seed, f"*.{ending}")
    there = damaged.exists()
    refusal = ""
    try:
        assert all(same(found, arrays) for _, found, arrays in results.kept(tmp_path))
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    assert not refusal or (
        str(damaged) in refusal
        and refusal.endswith("run the same study again, which makes it anew.")
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results.keep(path, SETTINGS, measured)
    said = [str(warning.message) for warning in caught]
    remade = damaged.with_name(f"{damaged.name}.damaged").exists()
    assert remade == any(f"{damaged} is damaged, so that it is made again" in text for text in said)
    assert remade == (there and refusal != "")
    assert before.items() <= {file.name: file.read_bytes() for file in tmp_path.iterdir()}.items()


@pytest.mark.parametrize("harm_it", ["missing", "another"])
def test_arrays_belong_to_their_numbers(tmp_path, harm_it):
    """Arrays of other numbers, whole as they are, are refused."""
    path = tmp_path / f"{NAME}.json"
    arrays = tmp_path / f"{NAME}.npz"
    results.keep(path, SETTINGS, measured)
    arrays.unlink()
    if harm_it == "another":
        np.savez(arrays, map=np.zeros(3))
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"{NAME}.npz must .*: .*run the same study again"
    ):
        list(results.kept(tmp_path))
    with warnings.catch_warnings(action="ignore"):
        results.keep(path, SETTINGS, measured)
    assert [same(found, a) for _, found, a in results.kept(tmp_path)] == [True]


def test_results_of_an_older_version_are_read(tmp_path):
    """Without checksums, but with those in the NPZ file."""
    path = tmp_path / f"{NAME}.json"
    results.keep(path, SETTINGS, measured)
    path.write_text(json.dumps({"settings": SETTINGS, **measured()[0]}))
    assert [same(found, arrays) for _, found, arrays in results.kept(tmp_path)] == [True]
    content = bytearray(path.with_suffix(".npz").read_bytes())
    content[60] ^= 1
    path.with_suffix(".npz").write_bytes(bytes(content))
    with pytest.raises(
        DamagedFile,
        match=r"npz must hold arrays. It could not be read \(.*\): run the same study again",
    ):
        list(results.kept(tmp_path))


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_verification(tmp_path, seed):
    """A truncated file is made again from the images beside it; other files are refused."""
    found = results_file.Results(tmp_path)
    tally = Tally(LayerCheck("fc"))
    tally.add(LayerCheck("fc", units=10, within=9, within_signed=9, largest=0.1 + 0.2))
    found.network(NAME, "0123")["runs"] = {
        "float32": {"fc": {"images": 1, "layers": {"fc": tally.to_dict()}}}
    }
    found.write()
    path = found.path
    expected = read_json(path)
    harm(tmp_path, seed, path.name)
    refusal = ""
    again = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            again = results_file.Results(tmp_path).found
        except ValueError as error:
            refusal = str(error)
    if refusal:
        assert f"Got {path}: delete it or name another" in refusal
    else:
        assert again["networks"] in (expected["networks"], {})
        assert again["networks"] or caught or not path.with_name(path.name + ".damaged").exists()


def test_truncated_files_of_ours_are_made_again(tmp_path, monkeypatch):
    """Also an empty one, which a power failure leaves."""
    idle = replace(everything.EXPERIMENTS["noise"], compute=lambda setup, report: None)
    monkeypatch.setitem(everything.EXPERIMENTS, "noise", idle)
    path = tmp_path / everything.ABOUT
    setup = Setup(tmp_path, (NAME,))
    everything.run_experiments(setup, ["noise"], lambda what, share: None)
    expected = everything.about(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        DamagedFile,
        match=r"study.json must hold JSON. Got a damaged file \(.*\): run the same study again",
    ):
        everything.about(tmp_path)
    with pytest.warns(
        DamagedFileWarning,
        match=r"is damaged, so that it is made again; the damaged file is now study.json.damaged",
    ):
        everything.run_experiments(setup, ["noise"], lambda what, share: None)
    assert everything.about(tmp_path) == expected
    (tmp_path / "verification.json").write_text("")
    with pytest.warns(DamagedFileWarning, match="verification.json is damaged"):
        assert results_file.Results(tmp_path).found["networks"] == {}


def test_results_that_are_none_are_one_sentence(tmp_path):
    """Also those of an older version, which have no checksum."""
    path = tmp_path / results_file.RESULTS
    for networks in (
        {NAME: {"runs": 3}},
        {NAME: {"runs": {"float32": {"fc": {"layers": {"fc": {"units": 3}}}}}}},
        {NAME: {}},
    ):
        path.write_text(
            json.dumps({"format": results_file.FORMAT, "environments": [], "networks": networks})
        )
        with pytest.raises(
            ValueError,
            match=(
                r"must be a file that study verification wrote. "
                r"Got .*: delete it or name another"
            ),
        ):
            results_file.read_results(path)
    path.unlink()
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / f"{NAME}.json").write_text('{"image": {}}')
    with pytest.raises(
        ValueError,
        match=(
            r"many must hold results of study all. "
            r"They could not be read \(KeyError: .*\): run it"
        ),
    ):
        everything.sections(tmp_path)


def test_truncated_benchmark_is_measured_again(tmp_path):
    """Another file is refused as before."""
    out = tmp_path / "benchmark.json"
    out.write_text(
        sealed_text(
            {**benchmark.read_or_begin(out, Settings()), "entries": {"a": {"seconds": 1.0}}}
        )
    )
    assert benchmark.read_or_begin(out, Settings())["entries"] == {"a": {"seconds": 1.0}}
    out.write_text(out.read_text().replace("1.0", "1.5"))
    with pytest.warns(DamagedFileWarning, match="benchmark.json is damaged"):
        assert benchmark.read_or_begin(out, Settings())["entries"] == {}


def test_write_json_keeps_its_checksum_right(tmp_path):
    """What is read and written again has a new one."""
    path = tmp_path / "found.json"
    write_json(path, {"units": 3})
    write_json(path, read_json(path) | {"more": [0.1]})
    assert read_json(path) == {"units": 3, "more": [0.1]}
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(
        DamagedFile, match=r"must match the checksum in it. Got a damaged or edited file: run"
    ):
        read_json(path)


# the attack


def test_damaged_results_of_an_attack_are_made_again(run, tmp_path, monkeypatch):
    """And its examples are compared with their checksum when they are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        __import__("sys").modules, "test_damaged_results", __import__("sys").modules[__name__]
    )
    assert run(*TINY, "--out", "out")[0] == 0
    whole = (tmp_path / "out/attack.json").read_bytes()
    (tmp_path / "out/attack.json").write_bytes(whole[:-30])
    with warnings.catch_warnings(action="ignore"):
        status, _, err = run(*TINY, "--out", "out")
    assert (status, err) == (0, "")
    assert (tmp_path / "out/attack.json").read_bytes() == whole
    examples = tmp_path / "out/attack.safetensors"
    content = bytearray(examples.read_bytes())
    content[-2] ^= 1
    examples.write_bytes(bytes(content))
    status, _, err = run(*TINY, "--out", "other", "--examples", str(examples))
    assert status == 2
    assert "attack.safetensors must have the SHA-256 that" in err


def test_shipped_names_are_those_of_the_study():
    """The tests above take one of them."""
    assert NAME in models.names()
