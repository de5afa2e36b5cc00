"""Damaged stores: never a wrong number; the file is named, and saving again repairs it."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import xarray
from damage import harm

import adjointbackmap as abm
from adjointbackmap.files import disk
from adjointbackmap.planes import storage as store

LAYER = "2"
MEMORY = 40_000
ARRAYS = (
    "image",
    "bias",
    "value",
    "x",
    "b",
    "entry",
    "bias_name",
    "top",
    "left",
    "out_row",
    "out_col",
    "out_channel",
)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """The disk's cache will do: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def chain(traced_case):
    """A chain of three convolutions."""
    return traced_case("plain-conv-chain")


@pytest.fixture
def save(chain, tmp_path):
    """Save units of the chain in a few blocks, by default to one folder."""

    def save(path=tmp_path / "planes", memory=MEMORY):
        return abm.save(path, chain.network, chain.x, LAYER, "RM2", memory=memory)

    return save


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    """The same store, which no test touches."""
    return abm.save(
        tmp_path_factory.mktemp("whole") / "planes",
        chain.network,
        chain.x,
        LAYER,
        "RM2",
        memory=MEMORY,
    )


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole.path, tmp_path / "planes")


def contents(folder):
    """Every file of a folder and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path):
    """Every number of a store, as it is read."""
    stored = abm.open(path)
    data = stored.to_xarray()
    return {name: data[name].values for name in ARRAYS} | {"sum": stored.reconstruct().numpy()}


@pytest.mark.parametrize("seed", range(20))
def test_damaged_file_is_named_and_repaired(whole, copied, save, seed):
    """After any damage to one file: its path or right numbers, and a repair byte for byte."""
    path = harm(copied, seed)
    refusal = found = None
    try:
        found = read(copied)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert str(copied) in refusal
        assert "run the same save or map again, which" in refusal
    else:
        expected = read(whole.path)
        assert all(np.array_equal(found[name], expected[name]) for name in expected), path
    save()
    assert contents(copied) == contents(whole.path)


def test_missing_chunk_is_refused_at_open(copied):
    """With its path; and one that goes missing later is refused when it is read."""
    opened = abm.open(copied)
    chunk = next(path for path in sorted((copied / "image" / "c").rglob("*")) if path.is_file())
    chunk.unlink()
    with pytest.raises(
        ValueError,
        match=rf"must be as it was written. Got no file at {chunk}: run the same save or map again",
    ):
        abm.open(copied)
    with pytest.raises(
        ValueError,
        match=rf"{chunk} must match its checksum. Got no file: run the same save or map again",
    ):
        opened.reconstruct()


def test_shortened_chunk_is_refused_at_open(copied):
    """By its size: nothing is read."""
    chunk = next(path for path in sorted((copied / "value" / "c").rglob("*")) if path.is_file())
    os.truncate(chunk, 9)
    with pytest.raises(
        ValueError, match=rf"must be as it was written. Got 9 bytes instead of \d+ at {chunk}"
    ):
        abm.open(copied)


@pytest.mark.parametrize("name", ["image", "value", "x"])
def test_flipped_bit_is_found_by_any_reader(copied, name):
    """Our reader names the file; any reader of Zarr finds the chunk's checksum wrong."""
    chunk = [path for path in sorted((copied / name / "c").rglob("*")) if path.is_file()][-1]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{chunk} must match its checksum. Got a damaged file"):
        read(copied)
    with pytest.raises(ValueError, match="checksum do not match"):
        xarray.open_zarr(copied, chunks=None)[name].load()


def test_missing_chunk_is_not_zero_for_any_reader(copied):
    """It is not a number."""
    chunk = next(path for path in sorted((copied / "value" / "c").rglob("*")) if path.is_file())
    chunk.unlink()
    assert xarray.open_zarr(copied, chunks=None)["value"].isnull().any()


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", '{"zarr.json": 3}', '{"../thesis": "00"}', "[" * 100_000]
)
@pytest.mark.parametrize("name", ["000001.json", "metadata.json"])
def test_record_of_nothing_is_not_finished(whole, copied, save, name, text):
    """A block is finished when its record lists all of its files."""
    (copied / "progress" / name).write_text(text)
    with pytest.raises(
        ValueError,
        match=r"must be complete. Got \d of \d blocks in .*: run the same save or map again",
    ):
        abm.open(copied)
    save()
    assert contents(copied) == contents(whole.path)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"no json", b"\xff\xfe", b'{"attributes": {"blocks": 3}}']
)
def test_damaged_metadata_does_not_strand_the_blocks(whole, copied, save, text):
    """The same save repairs it, and computes nothing again."""
    (copied / "zarr.json").write_bytes(text)
    with pytest.raises(
        ValueError, match=r"zarr.json must match its checksum in .*: run the same save or map again"
    ):
        abm.open(copied)
    before = {path: path.stat().st_mtime_ns for path in copied.glob("progress/0*.json")}
    save()
    assert contents(copied) == contents(whole.path)
    assert {path: path.stat().st_mtime_ns for path in copied.glob("progress/0*.json")} == before


def test_damaged_layout_is_told_from_the_real_one(whole, copied, save):
    """A flipped digit of the blocks' shape would shift every block."""
    text = (copied / "zarr.json").read_text()
    (copied / "zarr.json").write_text(
        text.replace(f'"memory": {MEMORY}', f'"memory": {MEMORY + 1}')
    )
    with pytest.raises(ValueError, match=r"zarr.json must match its checksum"):
        abm.open(copied)
    with pytest.raises(
        ValueError,
        match=r"run the save or map that began the store, with the same arguments, memory too",
    ):
        save(memory=10**6)
    save()
    assert contents(copied) == contents(whole.path)


def test_damage_elsewhere_is_repaired_with_more_memory(whole, copied, save):
    """The layout that the store was begun with is still there."""
    text = (copied / "zarr.json").read_text()
    (copied / "zarr.json").write_text(text.replace('"NaN"', '"Nan"'))
    save(memory=10**6)
    assert contents(copied) == contents(whole.path)


def test_link_out_of_the_store_is_refused(copied, save, tmp_path):
    """Neither read nor written through; one within the store is a file as any other."""
    outside = shutil.move(copied / "image", tmp_path / "elsewhere")
    (copied / "image").symlink_to(outside)
    before = contents(tmp_path / "elsewhere")
    message = (
        r"must hold its own files. Got .*image, a link to .*elsewhere: put the files in its place"
    )
    for attempt in (save, lambda: abm.open(copied)):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert contents(tmp_path / "elsewhere") == before
    (copied / "image").unlink()
    shutil.move(outside, copied / "image")
    chunk = next(path for path in sorted((copied / "value" / "c").rglob("*")) if path.is_file())
    chunk.replace(copied / "value" / "moved")
    chunk.symlink_to(copied / "value" / "moved")
    read(copied)


def test_store_of_an_older_version_opens_and_continues(chain, whole, tmp_path, monkeypatch):
    """Without checksums of chunks: its records have those of files, which are compared as well."""
    older = {
        key: value
        for key, value in json.loads((whole.path / "zarr.json").read_text())["attributes"][
            "blocks"
        ].items()
    }
    del older["checksum"]
    monkeypatch.setattr(store, "_layout", lambda work: older)
    arguments = (tmp_path / "older", chain.network, chain.x, LAYER, "RM2")
    folder = abm.save(*arguments, memory=MEMORY).path
    monkeypatch.undo()
    for record in folder.glob("progress/*.json"):
        seals = json.loads(record.read_text())
        record.write_text(
            json.dumps({name: seal["sha256"] for name, seal in seals.items()}, indent=1)
        )
    assert "crc32c" not in (folder / "zarr.json").read_text()
    for name, array in read(whole.path).items():
        np.testing.assert_array_equal(read(folder)[name], array)
    chunk = [path for path in sorted((folder / "image" / "c").rglob("*")) if path.is_file()][-1]
    kept = chunk.read_bytes()
    chunk.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{chunk} must match its checksum"):
        read(folder)
    (folder / "zarr.json").write_text("")
    abm.save(*arguments, memory=MEMORY)
    assert chunk.read_bytes() == kept
    torch.testing.assert_close(abm.open(folder).reconstruct(), whole.reconstruct())


def test_partial_file_is_no_chunk(copied, save):
    """What a killed save leaves under another name is never read."""
    chunk = next(path for path in sorted((copied / "bias" / "c").rglob("*")) if path.is_file())
    chunk.rename(chunk.with_name(chunk.name + disk.PARTIAL))
    with pytest.raises(ValueError, match=r"Got no file at"):
        abm.open(copied)
