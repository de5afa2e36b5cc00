"""The command attack: table, files, pictures, kept results, and one line for each bad input."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adjointbackmap import attacks, cli, data, examples, models

SHIPPED = "vgg7-cifar10"


def tiny_network() -> nn.Module:
    """What --model names in these tests."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 4)
    )


TINY = ("--model", f"{__name__}:tiny_network")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command into a folder, and return its exit status, output and errors."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])  # however pytest imported it

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["adjointbackmap", "attack", *words, "--out", str(tmp_path / "out")]
        )
        monkeypatch.setattr(cli.console, "width", 200, raising=False)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def test_study_is_what_nothing_named_gives(run, tmp_path):
    """The sample's first horse under experiment 1's attack: files, provenance, a picture."""
    status, text, err = run(SHIPPED)
    assert status == 0, err
    sample = data.sample()
    horse = sample[sample.labels == 7][:1]
    settings = attacks.study_attack(1, horse.unit_interval())
    expected = attacks.basic_iterative(
        models.load(SHIPPED), horse.unit_interval(), horse.labels, settings
    )
    written = load_file(tmp_path / "out/attack.safetensors")
    numbers = json.loads((tmp_path / "out/attack.json").read_text())
    assert torch.equal(written["pixels"], horse.unit_interval())
    assert torch.equal(written["adversarial"], expected.adversarial)
    assert (numbers["network"], len(numbers["weights sha256"])) == (SHIPPED, 64)
    assert (numbers["method"], numbers["step"], numbers["until_success"], numbers["radius"]) == (
        "basic",
        0.008,
        True,
        None,
    )
    row = numbers["images"][0]
    assert (row["image"], row["before"], row["after"]) == (horse.hashes[0], 7, int(expected.after))
    assert (row["l2"], row["linf"], row["steps"]) == (
        float(expected.l2),
        float(expected.linf),
        int(expected.steps),
    )
    assert row["fooled"] is row["inside"] is True
    assert f"{SHIPPED}: 1 of 1 images fooled" in text
    assert all(
        cell in text
        for cell in (
            horse.hashes[0][:8],
            "horse",
            sample.classes[int(expected.after)],
            f"{row['l2']:.4g}",
        )
    )
    assert (tmp_path / "out" / f"{horse.hashes[0][:8]}.png").read_bytes().startswith(b"\x89PNG")


def test_targeted_leaves_out_what_is_the_target(run, tmp_path):
    """Images already of the target class are left out; steps by channel and radii are accepted."""
    words = (
        "--images",
        "60",
        "--method",
        "targeted",
        "--target",
        "automobile",
        "--iterations",
        "4",
        "--radius",
        "0.02",
    )
    status, text, err = run(
        "vgg7-nobias-cifar10", *words, "--step", "0.01", "0.008", "0.009", "--until-success"
    )
    assert status == 0, err
    numbers = json.loads((tmp_path / "out/attack.json").read_text())
    assert (numbers["target"], numbers["step"], numbers["radius"]) == (
        1,
        [0.01, 0.008, 0.009],
        [0.02],
    )
    assert (numbers["iterations"], numbers["until_success"]) == (4, True)
    rows = numbers["images"]
    assert 20 < len(rows) < 60
    assert all(
        row["before"] != 1 and row["fooled"] == (row["after"] == 1) and row["linf"] <= 0.02 + 1e-7
        for row in rows
    )
    assert f"{sum(row['fooled'] for row in rows)} of {len(rows)} images fooled" in text
    assert f"the first 20 of {len(rows)} images; 0 outside" in text
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_least_likely_on_a_network_of_ones_own(run, tmp_path):
    """A module without class names, with a fixed number of steps."""
    status, text, err = run(*TINY, "--images", "2", "--method", "least-likely", "--threads", "1")
    assert status == 0, err
    rows = json.loads((tmp_path / "out/attack.json").read_text())["images"]
    assert [row["steps"] for row in rows] == [attacks.iterative.STUDY_STEPS] * 2
    pixels = data.sample()[:2].unit_interval()
    with torch.no_grad():
        scores = tiny_network().eval()(pixels)
    assert [row["before"] for row in rows] == scores.argmax(1).tolist()
    assert "of 2 images fooled" in text


@pytest.mark.parametrize(("method", "norm"), [("pgd", "linf"), ("apgd", "l2")])
def test_attack_inside_a_ball(run, tmp_path, method, norm):
    """The images are those of the function with the same numbers."""
    words = ("--method", method, "--norm", norm, "--radius", "0.05", "--iterations", "4")
    status, _, err = run(*TINY, "--images", "2", *words, "--starts", "2", "--seed", "5")
    assert status == 0, err
    pixels = data.sample()[:2].unit_interval()
    model = tiny_network().eval()
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    ball = attacks.Ball(0.05, norm)
    expected = getattr(attacks, method)(model, pixels, labels, ball, steps=4, starts=2, seed=5)
    made = load_file(tmp_path / "out/attack.safetensors")["adversarial"]
    assert torch.equal(made, expected.adversarial)
    numbers = json.loads((tmp_path / "out/attack.json").read_text())
    assert (numbers["method"], numbers["norm"], numbers["radius"]) == (method, norm, 0.05)


def test_kept_images_are_not_attacked_again(run, tmp_path, monkeypatch):
    """A second run with more images attacks the missing batches, and gives what one run gives."""
    monkeypatch.setattr(examples, "BATCH", 2)
    counted = []
    whole = attacks.basic_iterative
    monkeypatch.setattr(
        attacks, "basic_iterative", lambda *args: counted.append(len(args[1])) or whole(*args)
    )
    keep = ("--keep", str(tmp_path / "kept.jsonl"))
    assert run(*TINY, "--images", "4", *keep)[0] == 0
    assert run(*TINY, "--images", "5", *keep)[0] == 0
    assert counted == [2, 2, 1]
    kept = load_file(tmp_path / "out/attack.safetensors")["adversarial"]
    rows = json.loads((tmp_path / "out/attack.json").read_text())["images"]
    assert run(*TINY, "--images", "5")[0] == 0
    assert torch.equal(load_file(tmp_path / "out/attack.safetensors")["adversarial"], kept)
    assert json.loads((tmp_path / "out/attack.json").read_text())["images"] == rows
    status, _, err = run(*TINY, "--images", "5", "--step", "0.1", *keep)
    assert (status, "must hold results of this job" in err) == (2, True)


@pytest.mark.parametrize("keep", [(), ("--keep", "kept.jsonl")], ids=["lost", "kept"])
def test_interrupt_says_whether_work_is_kept(run, monkeypatch, tmp_path, keep):
    """Ctrl-C is one line and status 130."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attacks, "basic_iterative", stop)
    status, _, err = run(*TINY, *keep)
    assert status == 130
    assert err.strip() == (
        "stopped; finished work is kept"
        if keep
        else "stopped; add --keep FILE to continue where a run was stopped"
    )


def test_examples_of_a_file_are_measured(run, tmp_path):
    """One outside of the box is told; nothing is attacked."""
    pixels = data.sample()[:2].unit_interval()
    changed = pixels.clone()
    changed[1, 0, 0, 0] = 1.5
    save_file({"adversarial": changed}, tmp_path / "made.safetensors")
    status, text, err = run(
        *TINY, "--images", "2", "--examples", str(tmp_path / "made.safetensors")
    )
    assert status == 0, err
    assert "1 outside [0, 1]" in text
    numbers = json.loads((tmp_path / "out/attack.json").read_text())
    assert numbers["examples"].endswith("made.safetensors")
    assert [row["inside"] for row in numbers["images"]] == [True, False]
    assert [row["steps"] for row in numbers["images"]] == [None, None]
    assert numbers["images"][0]["l2"] == 0


BAD = {
    "no-target": (
        ("--method", "targeted"),
        "--target must come with --method targeted, pgd or apgd, and targeted with --target",
    ),
    "apgd-step": (
        ("--method", "apgd", "--step", "0.1"),
        "--step must be left out for --method apgd",
    ),
    "pgd-radii": (
        ("--method", "pgd", "--radius", "0.1", "0.2", "0.1"),
        "--radius must be one number for --method pgd",
    ),
    "target-alone": (("--target", "bird"), "Got basic and bird"),
    "no-such-class": (("--method", "targeted", "--target", "unicorn"), "or airplane, automobile"),
    "target-is-what-it-sees": (
        ("--method", "targeted", "--target", "horse"),
        "see an image as another class than --target",
    ),
}


BAD_FOR_ANY = {
    "no-such-number": (
        ("--method", "targeted", "--target", "4"),
        "targets must be one integer from 0 to 3",
    ),
    "no-names": (
        ("--method", "targeted", "--target", "cat"),
        "--target must be the number of a class. Got 'cat'",
    ),
    "step": (("--step", "-1"), "step must be positive"),
    "channels": (
        ("--step", "0.1", "0.1"),
        "step must be one number, or one for each of the 3 channels",
    ),
    "examples": (("--examples", "none.npy"), "none.npy, which is none"),
    "threads": (("--threads", "0"), "--threads must be at least 1"),
}


@pytest.mark.parametrize("why", [*BAD, *BAD_FOR_ANY])
def test_bad_input_is_one_line(run, why):
    """Exit status 2, and what must be given."""
    words, message = {**BAD, **BAD_FOR_ANY}[why]
    status, out, err = run(*((SHIPPED,) if why in BAD else TINY), *words)
    assert status == 2
    assert message in err
    assert (out.strip(), err.count("\n")) == ("", 1)
