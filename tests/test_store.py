"""Stores on disk: labelled, whole after interruptions, equal byte for byte, never mixed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr

import adjointbackmap as abm
from adjointbackmap.files import disk
from adjointbackmap.planes import store_files as drafts

CHAIN = "plain-conv-chain"
LAYER = "2"
MEMORY = 20_000
ABANDONED = (
    f".{disk.host_name()}.99999999.1{disk.PARTIAL}"  # as a process has left it that is no more
)
SELECTIONS = {
    "all": ("RM2", None),
    "one-unit": ("RM2", (1, 2, 3)),
    "arrays-pointwise": ("RM2", ([0, 1, 3], [0, 1, 2], [3, 2, 1])),
    "kernels": ("RM4", (slice(1, 3), slice(None), 2)),
    "kernels-summed": ("RM3", None),
    "channels": ("RM1", slice(1, None)),
    "own-units": ("RM2", torch.tensor([[[0, 0, 0], [1, 2, 3]], [[3, 3, 0], [2, 0, 1]]])),
}
PROGRAM = f"""
import os, signal, sys
from pathlib import Path
os.fsync = lambda file: None
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cases import make
import adjointbackmap as abm

name = Path.replace


def name_or_die(partial, path):
    files = sum(file.is_file() for file in Path(sys.argv[1]).rglob("*"))
    if files >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return name(partial, path)


Path.replace = name_or_die
model, x = make({CHAIN!r})
abm.save(sys.argv[1], abm.trace(model, x), x, {LAYER!r}, "RM4", method="adjoint", memory={MEMORY})
"""


@pytest.fixture(scope="module")
def chain(traced_case):
    """A chain of three convolutions."""
    return traced_case(CHAIN)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """The disk's cache will do: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def save(chain, tmp_path):
    """Save units of the chain in small blocks, by default to one folder."""

    def save(path=tmp_path / "planes", mode="RM2", memory=MEMORY, **given):
        return abm.save(path, chain.network, chain.x, LAYER, mode, memory=memory, **given)

    return save


def files(folder):
    """Every file of a folder and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def chunks(folder, name="image"):
    """Files of an array's chunks."""
    return sorted(path for path in (folder / name / "c").rglob("*") if path.is_file())


def assert_same_files(folder, other):
    """The same names with the same bytes."""
    ours = files(folder)
    theirs = files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# what is stored


@pytest.mark.parametrize("selection", SELECTIONS)
def test_stored_planes_are_the_planes(chain, save, selection):
    """All of it back as hyperplanes; their inner products without the network."""
    mode, units = SELECTIONS[selection]
    stored = save(mode=mode, units=units)
    whole = abm.hyperplanes(chain.network, chain.x, LAYER, mode, units)
    opened = abm.open(stored.path)
    planes = opened.planes(chain.network)
    assert (opened.shape, opened.dims) == (tuple(whole.value.shape), ("n", *whole.units.names))
    assert (planes.layer, planes.mode, planes.own_bias, planes.scale) == (
        LAYER,
        mode,
        whole.own_bias,
        1.0,
    )
    assert planes.units.names == whole.units.names
    torch.testing.assert_close(planes.units.flat, whole.units.flat)
    for part in ("image", "bias", "value", "x"):
        torch.testing.assert_close(
            getattr(planes, part), getattr(whole, part), rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(opened.value, whole.value)
    torch.testing.assert_close(opened.reconstruct(), whole.reconstruct(), rtol=1e-10, atol=1e-12)
    assert opened.relative_error().abs().max() < 1e-10
    torch.testing.assert_close(
        opened.reconstruct(chain.x[1]), whole.reconstruct(chain.x[1]), rtol=1e-10, atol=1e-12
    )
    assert opened.damaged() == []


def test_some_units_are_read(chain, save):
    """Ints drop their dimension, as everywhere."""
    stored = save()
    whole = abm.hyperplanes(chain.network, chain.x, LAYER, "RM2")
    some = stored.planes(chain.network, (1, slice(2, None)), images=1)
    assert some.units.names == ("out_col", "out_channel")
    torch.testing.assert_close(some.image, whole.image[1:, 1, 2:])
    torch.testing.assert_close(some.units.flat, whole.units.flat[:, 1, 2:])
    assert some.contributions().total().shape == (1, 2, 4)


def test_chunks_are_read_one_after_the_other(chain, save):
    """They are all of the hyperplanes."""
    stored = save()
    parts = list(stored.iter_planes(chain.network))
    assert len(parts) == len(chunks(stored.path))
    torch.testing.assert_close(
        torch.cat([p.value.flatten() for p in parts]), stored.value.flatten()
    )


def test_xarray_reads_labelled_dimensions(chain, save):
    """Opened lazily without a warning, with the units' places, corners and bias names."""
    with warnings.catch_warnings(action="error"):
        data = xarray.open_zarr(save().path, chunks=None)
        assert data["image"].dims == (
            "n",
            "out_row",
            "out_col",
            "out_channel",
            "channel",
            "patch_row",
            "patch_col",
        )
        assert data["bias"].dims == ("n", "out_row", "out_col", "out_channel", "m")
        assert set(data.coords) == {
            "out_row",
            "out_col",
            "out_channel",
            "top",
            "left",
            "bias_name",
            "entry",
        }
        unit = data.sel(out_row=2, out_col=1, out_channel=3).isel(n=0)
    planes = abm.hyperplanes(chain.network, chain.x[0], LAYER, "RM2", (2, 1, 3))
    top = int(unit["top"])
    left = int(unit["left"])
    expected = torch.nn.functional.pad(planes.image[0], (2, 2, 2, 2))[
        :, 2 + top : 7 + top, 2 + left : 7 + left
    ]
    np.testing.assert_allclose(unit["image"].values, expected.numpy(), rtol=1e-10, atol=1e-12)
    assert list(unit["bias_name"].values[:4]) == [
        "0.bias[0]",
        "0.bias[1]",
        "0.bias[2]",
        "2.bias[0]",
    ]
    reconstructed = float((unit["bias"] * unit["b"]).sum()) + float((planes.image * planes.x).sum())
    assert reconstructed == pytest.approx(float(unit["value"]))


def test_it_is_a_zarr_store_of_version_3(save):
    """Any Zarr reader finds arrays, dimension names and provenance."""
    group = zarr.open_group(save().path, mode="r")
    assert group.metadata.zarr_format == 3
    assert group["value"].metadata.dimension_names == ("n", "out_row", "out_col", "out_channel")
    assert (
        group.attrs["layer"],
        group.attrs["mode"],
        group.attrs["k"],
        group.attrs["own bias"],
    ) == (LAYER, "RM2", 1.0, True)
    assert group.attrs["biases"] == {"0.bias": [0, 3], "2.bias": [3, 7]}
    assert len(group.attrs["weights sha256"]) == 64
    assert group.attrs["blocks"]["memory"] == MEMORY


def test_a_network_without_biases(traced_case, tmp_path):
    """Bias parts of no entries."""
    case = traced_case("no-bias")
    stored = abm.save(tmp_path / "planes", case.network, case.x, "2", "RM2")
    assert stored.to_xarray()["bias"].sizes["m"] == 0
    assert stored.relative_error().abs().max() < 1e-10


def test_large_blocks_are_several_chunks(save, monkeypatch, tmp_path):
    """A chunk is bounded whatever the block is."""
    monkeypatch.setattr(drafts, "CHUNK_BYTES", 2_000)
    stored = save(memory=40_000)
    assert len(chunks(stored.path)) > len(stored.records) - 1
    assert all(path.stat().st_size <= 2_000 for path in chunks(stored.path))
    monkeypatch.undo()
    torch.testing.assert_close(stored.reconstruct(), save(tmp_path / "other").reconstruct())


def test_progress_is_reported(save):
    """The share of blocks, from the first to the last."""
    shares = []
    stored = save(report=shares.append)
    assert len(shares) == len(stored.records) - 1
    assert shares == sorted(shares)
    assert shares[-1] == 1


# interruptions


def kill_at(count, folder):
    """Run the program, which kills itself while it writes the next of so many files.

    Returns:
        The records that there are then -> their times.
    """
    program = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), str(count)], check=False)
    assert program.returncode == -signal.SIGKILL
    return {path: path.stat().st_mtime_ns for path in folder.glob("progress/0*.json")}


def test_a_killed_run_continues_where_it_stopped(save, tmp_path):
    """Killed among metadata and blocks: the finished part stays, and the end is one run's."""
    unbroken = save(tmp_path / "unbroken", mode="RM4", method="adjoint")
    folder = tmp_path / "planes"
    last = len(unbroken.records) - 1
    assert len(files(unbroken.path)) > 140
    finished: dict = {}
    for count in (5, 40, 100):
        seen = kill_at(count, folder)
        assert len(finished) <= len(seen) < last
        assert finished.items() <= seen.items()
        finished = seen
        with pytest.raises(
            ValueError, match=rf"must be complete. Got {len(seen)} of {last} blocks"
        ):
            abm.open(folder)
    assert finished
    save(folder, mode="RM4", method="adjoint")
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert_same_files(folder, unbroken.path)


def flip(path):
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    """Lose the second half."""
    os.truncate(path, path.stat().st_size // 2)


def half_written(path):
    """As it is while a chunk is written: a part of it under another name."""
    path.with_name(path.name + ABANDONED).write_bytes(path.read_bytes()[:10])
    path.unlink()


@pytest.mark.parametrize("harm", [flip, truncate, half_written, Path.unlink])
@pytest.mark.parametrize("array", ["image", "bias", "value", "x", "top"])
def test_a_damaged_chunk_is_computed_again(save, tmp_path, harm, array):
    """It is named, and mended alone."""
    stored = save()
    untouched = save(tmp_path / "untouched")
    chunk = chunks(stored.path, array)[-1]
    others = [path for path in chunks(stored.path) if path != chunk]
    before = [path.stat().st_mtime_ns for path in others]
    harm(chunk)
    assert stored.damaged() == [str(chunk.relative_to(stored.path))]
    assert save().damaged() == []
    assert_same_files(stored.path, untouched.path)
    assert [path.stat().st_mtime_ns for path in others] == before


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["000003.json", "metadata.json"])
def test_a_damaged_record_is_written_again(save, tmp_path, harm, name):
    """A block is finished when its record says so and its files agree."""
    stored = save()
    untouched = save(tmp_path / "untouched")
    harm(stored.path / "progress" / name)
    assert stored.damaged()
    save()
    assert_same_files(stored.path, untouched.path)


@pytest.mark.parametrize("name", ["image/zarr.json", "value/zarr.json"])
def test_damaged_metadata_is_written_again(save, tmp_path, name):
    """Also where the readers of Zarr would fail on it."""
    stored = save()
    untouched = save(tmp_path / "untouched")
    truncate(stored.path / name)
    assert stored.damaged() == [name]
    save()
    assert_same_files(stored.path, untouched.path)


def test_a_full_disk_is_one_sentence_and_finished_blocks_stay(save, tmp_path, monkeypatch):
    """How much is wanted, how much is free, what to do; then it goes on."""
    left = iter(range(120))  # flushes of files and of their folders

    def full(file):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(0, 0, 3 * 2**20)
    )
    message = (
        r"The disk must have room for .*planes, at most 0\.\d MiB more. Got 3.0 MiB "
        r"free: make room and run the same again"
    )
    with pytest.raises(OSError, match=message):
        save()
    monkeypatch.undo()
    folder = tmp_path / "planes"
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("progress/0*.json")}
    assert finished
    assert not list(folder.rglob(f"*{disk.PARTIAL}"))
    save()
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert_same_files(folder, save(tmp_path / "other").path)


def test_another_failure_of_the_disk_is_told_as_it_is(save, monkeypatch):
    """Only a full disk is a full disk."""

    def broken(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        save()


# what is refused


def test_other_hyperplanes_in_the_folder_are_kept(save):
    """Another layer, mode, k, selection or dtype: what differs is named, nothing is touched."""
    stored = save()
    before = files(stored.path)
    for given, differs in (
        ({"mode": "RM1"}, "mode, shape, unit dimensions, mode dimensions"),
        ({"scale": 0.5}, "k"),
        ({"own_bias": False}, "own bias"),
        ({"dtype": torch.float32}, "images sha256, dtype"),
    ):
        with pytest.raises(
            ValueError,
            match=r"must be a store of the same hyperplanes. Got .*: choose another path",
        ) as refusal:
            save(**given)
        named = str(refusal.value).split("of other ")[1].split(": choose")[0].split(", ")
        assert set(differs.split(", ")) <= set(named)
    assert files(stored.path) == before


def test_another_network_or_image_is_refused(chain, traced_case, save):
    """By the hash of the weights and of the images."""
    stored = save()
    other = traced_case("no-bias")
    with pytest.raises(ValueError, match="of other images sha256: choose another path"):
        abm.save(stored.path, chain.network, chain.x.flip(0), LAYER, "RM2", memory=MEMORY)
    with pytest.raises(ValueError, match="of other weights sha256"):
        abm.save(stored.path, other.network, other.x, LAYER, "RM2", memory=MEMORY)
    with pytest.raises(ValueError, match=r"must have the weights that .* was computed with"):
        stored.planes(other.network)
    with pytest.raises(ValueError, match=r"must have the weights that .* was computed with"):
        stored.iter_planes(other.network)


def test_a_folder_of_other_files_is_refused(save, tmp_path):
    """Nothing is written into it."""
    (tmp_path / "planes").mkdir()
    (tmp_path / "planes" / "thesis.tex").write_text("a year's work")
    with pytest.raises(
        ValueError,
        match=(
            r"must be a new folder or a store of these hyperplanes. "
            r"Got .*, which holds other files"
        ),
    ):
        save()
    assert list(files(tmp_path / "planes")) == ["thesis.tex"]


def test_more_memory_continues_and_less_is_refused(save, tmp_path):
    """The blocks are those with which the store was begun."""
    stored = save()
    untouched = save(tmp_path / "untouched")
    truncate(chunks(stored.path)[3])
    with pytest.raises(
        ValueError,
        match=(
            r"memory must be at least the 20,000 bytes that .* was begun with. "
            r"Got 19,000: raise memory"
        ),
    ):
        save(memory=19_000)
    save(memory=10**6)
    assert_same_files(stored.path, untouched.path)


def test_open_of_an_incomplete_store_says_how_to_continue(save):
    """How far it is, and what to do."""
    stored = save()
    stored.records[-1].unlink()
    blocks = len(stored.records) - 1
    message = (
        rf"must be complete. Got {blocks - 1} of {blocks} blocks in .*: run the same "
        r"save or map again, which continues it"
    )
    with pytest.raises(ValueError, match=message):
        abm.open(stored.path)
    save()
    assert abm.open(stored.path).damaged() == []


@pytest.mark.parametrize("content", [None, "{}", "no json", json.dumps({"attributes": {}})])
def test_open_of_no_store(tmp_path, content):
    """A folder that is none, or of another program."""
    if content is not None:
        (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(
        FileNotFoundError,
        match=r"path must be a folder that save or the command map wrote. Got .*, which is none",
    ):
        abm.open(tmp_path if content is not None else tmp_path / "nowhere")


def test_images_of_another_shape_are_refused(chain, save):
    """An inner product needs the same pixels."""
    with pytest.raises(
        ValueError, match=r"x must have shape \(2, 6, 6\) or \(2, 2, 6, 6\). Got \(2, 5, 6\)"
    ):
        save().reconstruct(chain.x[0, :, :5])
