"""Runs over many images: the finished part is kept, and the totals do not depend on it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import make

import adjointbackmap as abm
from adjointbackmap import data
from adjointbackmap.exactness import verification as runs
from adjointbackmap.exactness.layer_check import LayerCheck

CHAIN = "plain-conv-chain"
STOPPED = """
import time
from cases import make
import adjointbackmap as abm
model, x = make("plain-conv-chain", 6)
abm.verify(abm.trace(model, x), x, keep={keep!r}, report=lambda share: time.sleep(0.05))
"""


def as_json(checks):
    """Checks as the text that a file would hold: equal texts are equal to the bit."""
    return json.dumps({name: check.to_dict() for name, check in checks.items()})


@pytest.fixture(scope="module")
def six():
    """A network, six images, and their checks from one run."""
    model, x = make(CHAIN, 6)
    network = abm.trace(model, x)
    return network, x, as_json(abm.verify(network, x))


@pytest.fixture
def computed(monkeypatch):
    """Names of the images that are computed from here on."""
    seen = []
    right = runs.verify_images

    def spy(network, batch, names, *rest):
        seen.extend(names)
        return right(network, batch, names, *rest)

    monkeypatch.setattr(runs, "verify_images", spy)
    return seen


def test_any_order_and_any_parts_give_the_same_total(six):
    """One by one, in parts, backwards: the same to the bit, the worst unit's place too."""
    network, x, whole = six
    alone = [abm.verify(network, image) for image in x]
    for seed in range(3):
        order = random.Random(seed).sample(range(6), 6)
        total = {}
        for n in order:
            runs.merge(total, alone[n])
        assert as_json(total) == whole
    parts = abm.verify(network, x[4:])
    runs.merge(parts, abm.verify(network, x[:4].flip(0)))
    assert as_json(parts) == whole


def test_finished_images_are_not_computed_again(six, tmp_path, computed):
    """A second run takes all from the file; a later one adds what is new."""
    network, x, whole = six
    keep = tmp_path / "kept.jsonl"
    abm.verify(network, x[:4], keep=keep)
    assert len(computed) == 4
    assert as_json(abm.verify(network, x, keep=keep)) == whole
    assert len(computed) == 6
    assert as_json(abm.verify(network, x, keep=keep)) == whole
    assert computed == [runs.image_hash(image) for image in x]
    assert abm.verify(network, x[:1], keep=keep)["2"].units == abm.verify(network, x[:1])["2"].units


def test_killed_run_goes_on_where_it_was(six, tmp_path, computed):
    """SIGKILL loses only the current image; the total is that of an unbroken run."""
    network, x, whole = six
    keep = tmp_path / "kept.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(keep=str(keep))], env=environment
    )
    try:
        while process.poll() is None and not (
            keep.exists() and keep.read_bytes().count(b"\n") >= 3
        ):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = keep.read_bytes().count(b"\n") - 1
    assert 2 <= kept < 6
    assert as_json(abm.verify(network, x, keep=keep)) == whole
    assert computed == [runs.image_hash(image) for image in x[kept:]]


def test_half_written_image_is_computed_again(six, tmp_path, computed):
    """A crash within the last line."""
    network, x, whole = six
    keep = tmp_path / "kept.jsonl"
    abm.verify(network, x[:3], keep=keep)
    keep.write_bytes(keep.read_bytes()[:-40])
    computed.clear()
    assert as_json(abm.verify(network, x, keep=keep)) == whole
    assert computed == [runs.image_hash(image) for image in x[2:]]


OTHER_JOBS = {
    "k": ({"scale": 1.0}, "k 0.125, not 1.0"),
    "own-bias": ({"own_bias": True}, "own bias False, not True"),
    "layers": ({"layers": ["0"]}, r"layers \['0', .*, not \['0'\]"),
    "dtype": (
        {"dtype": torch.float32},
        "dtype float64, not float32; accumulate float64, not float32",
    ),
    "accumulate": ({"accumulate": torch.float32}, "accumulate float64, not float32"),
}


@pytest.mark.parametrize("job", OTHER_JOBS)
def test_file_of_another_job_is_refused(six, tmp_path, job):
    """Other arguments are another job."""
    network, x, _ = six
    keep = tmp_path / "kept.jsonl"
    abm.verify(network, x[:1], keep=keep)
    other, message = OTHER_JOBS[job]
    with pytest.raises(ValueError, match=message):
        abm.verify(network, x[:1], keep=keep, **other)


def test_file_of_other_weights_is_refused(six, tmp_path):
    """The job holds the hash of the weights."""
    network, x, _ = six
    keep = tmp_path / "kept.jsonl"
    abm.verify(network, x[:1], keep=keep)
    model, _ = make(CHAIN)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-9
    with pytest.raises(ValueError, match=r"weights sha256 .*, not .*: name another file"):
        abm.verify(abm.trace(model, x), x[:1], keep=keep)


def test_interrupt_keeps_what_is_finished(six, tmp_path, monkeypatch):
    """Ctrl-C comes through, and the images before it are in the file."""
    network, x, whole = six
    keep = tmp_path / "kept.jsonl"
    right = runs.verify_images
    third = runs.image_hash(x[2])

    def stopped(network, batch, names, *rest):
        if third in names:
            raise KeyboardInterrupt
        return right(network, batch, names, *rest)

    monkeypatch.setattr(runs, "verify_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        abm.verify(network, x, keep=keep)
    monkeypatch.undo()
    assert keep.read_bytes().count(b"\n") == 3
    assert as_json(abm.verify(network, x, keep=keep)) == whole


def test_image_that_is_there_twice_counts_twice(six, tmp_path, computed):
    """It is computed and kept once."""
    network, x, _ = six
    twice = abm.verify(network, x[[0, 0]], keep=tmp_path / "kept.jsonl")
    once = abm.verify(network, x[0])
    assert twice["2"].units == 2 * once["2"].units
    assert abm.verify(network, x[[0, 0]], keep=tmp_path / "kept.jsonl") == twice
    assert len(computed) == 2


def test_images_may_be_named(six):
    """The worst unit's image goes by the name that was given."""
    network, x, _ = six
    check = abm.verify(network, x[:2], ["2"], names=["ship", "frog"])["2"]
    assert check.worst[0] in ("ship", "frog")


def test_names_are_those_of_the_data():
    """The hash of an image's bytes is its hash in a data set."""
    sample = data.sample()[:3]
    assert tuple(runs.image_hash(image) for image in sample.pixels) == sample.hashes


def test_progress_counts_what_is_kept(six, tmp_path):
    """It begins at the share that the file has, rises, and ends at one."""
    network, x, _ = six
    abm.verify(network, x[:3], keep=tmp_path / "kept.jsonl")
    heard = []
    abm.verify(network, x, keep=tmp_path / "kept.jsonl", report=heard.append)
    assert heard[0] == 0.5
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_sums_in_float64_are_nearer():
    """float64 sums of float32 hyperplanes, measured on a float32 network."""
    model, x = make(CHAIN, 4)
    model = model.float()
    x = x.float()
    network = abm.trace(model, x)
    plain = abm.verify(network, x)["4"]
    sums = abm.verify(network, x, accumulate=torch.float64)["4"]
    assert sums.units == plain.units
    assert sums.scaled != plain.scaled
    assert sums.scaled < 1e-6


def test_checks_are_the_same_after_json(six):
    """To the bit, for every layer."""
    network, x, _ = six
    for check in abm.verify(network, x).values():
        assert LayerCheck.from_dict(json.loads(json.dumps(check.to_dict()))) == check
