"""The reader of the official binary files, on files of the same layout with fewer records."""

import hashlib
import http.server
import tarfile
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pooch
import pytest
import torch

from adjointbackmap import data

RECORDS = {"cifar10": {"train": 40, "test": 40}, "cifar100": {"train": 2_000, "test": 100}}
DATASETS = tuple(RECORDS)


def records_of(source: data.Dataset, dataset: str) -> dict[str, int]:
    return {
        **{name: RECORDS[dataset]["train"] for name in source.train_files},
        **{name: RECORDS[dataset]["test"] for name in source.test_files},
    }


def write(folder, source: data.Dataset, table: np.ndarray, sizes: dict[str, int]) -> None:
    """Write the rows of a table, in their order, into the files of a data set."""
    folder.mkdir(parents=True)
    start = 0
    for name in (*source.train_files, *source.test_files):
        (folder / name).write_bytes(table[start : start + sizes[name]].tobytes())
        start += sizes[name]


def table_of(source: data.Dataset, sizes: dict[str, int]) -> np.ndarray:
    """Random records whose fine labels go round; a coarse label is never the fine one."""
    generator = np.random.default_rng(0)
    table = generator.integers(
        0, 256, (sum(sizes.values()), source.label_bytes + data.IMAGE_BYTES), dtype=np.uint8
    )
    labels = np.arange(len(table)) % len(source.classes)
    table[:, 0] = (labels + 7) % 20
    table[:, source.label_bytes - 1] = labels
    return table


@pytest.fixture(scope="session")
def tables():
    return {
        dataset: table_of(source, records_of(source, dataset))
        for dataset, source in data.SOURCES.items()
    }


@pytest.fixture(scope="session")
def official(tmp_path_factory, tables):
    """A root that holds both data sets."""
    root = tmp_path_factory.mktemp("official")
    for dataset, source in data.SOURCES.items():
        write(root / source.folder, source, tables[dataset], records_of(source, dataset))
    return root


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
    """The sizes of the files written here in place of the official ones; no user data is read."""
    monkeypatch.delenv(data.ENVIRONMENT_VARIABLE, raising=False)
    for dataset, source in list(data.SOURCES.items()):
        monkeypatch.setitem(
            data.SOURCES, dataset, replace(source, records_per_file=records_of(source, dataset))
        )


def copy_of(official, tmp_path, dataset):
    folder = tmp_path / data.SOURCES[dataset].folder
    folder.mkdir()
    for path in (official / folder.name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("dataset", DATASETS)
def test_test_images_are_the_records_in_their_order(official, tables, dataset):
    images = data.load(dataset, "test", official)
    source = data.SOURCES[dataset]
    count = RECORDS[dataset]["test"]
    rows = tables[dataset][-count:]
    assert images.classes == source.classes
    assert images.labels.tolist() == rows[:, source.label_bytes - 1].tolist()
    assert np.array_equal(images.pixels.numpy().reshape(count, -1), rows[:, source.label_bytes :])
    assert images.hashes[3] == hashlib.sha256(images.pixels[3].numpy().tobytes()).hexdigest()


def test_pixels_are_red_green_and_blue_planes(official, tables):
    image = data.load("cifar10", "test", official).pixels[0]
    record = tables["cifar10"][-RECORDS["cifar10"]["test"]]
    assert image[1, 2, 3] == record[1 + 1024 + 2 * 32 + 3]


def validation_twin(table, source):
    """Class by class the tenth of the images with the smallest hashes, written plainly."""
    chosen = set()
    for label in range(len(source.classes)):
        rows = [row for row in table if row[source.label_bytes - 1] == label]
        hashes = sorted(
            hashlib.sha256(row[source.label_bytes :].tobytes()).hexdigest() for row in rows
        )
        chosen |= set(hashes[: len(hashes) // 10])
    return chosen


@pytest.mark.parametrize("dataset", DATASETS)
def test_validation_is_the_tenth_with_the_smallest_hashes(official, tables, dataset):
    count = len(tables[dataset]) - RECORDS[dataset]["test"]
    validation, training = (
        data.load(dataset, split, official) for split in ("validation", "train")
    )
    assert (len(training), len(validation)) == (count * 9 // 10, count // 10)
    assert set(validation.hashes) == validation_twin(tables[dataset][:count], data.SOURCES[dataset])
    assert not set(validation.hashes) & set(training.hashes)
    assert torch.bincount(validation.labels).tolist() == [
        count // 10 // len(validation.classes)
    ] * len(validation.classes)


@pytest.mark.parametrize("dataset", DATASETS)
def test_splits_do_not_depend_on_the_order_of_the_records(official, tables, tmp_path, dataset):
    source = data.SOURCES[dataset]
    count = len(tables[dataset]) - RECORDS[dataset]["test"]
    order = np.concatenate(
        [np.random.default_rng(1).permutation(count), np.arange(count, len(tables[dataset]))]
    )
    write(tmp_path / source.folder, source, tables[dataset][order], source.records_per_file)
    for split in ("train", "validation"):
        original = data.load(dataset, split, official)
        shuffled = data.load(dataset, split, tmp_path)
        assert original.hashes != shuffled.hashes
        assert original.by_hash().hashes == shuffled.by_hash().hashes
        assert torch.equal(original.by_hash().labels, shuffled.by_hash().labels)


def test_root_may_be_the_folder_of_the_files_itself(official):
    assert len(data.load("cifar10", "test", official / "cifar-10-batches-bin")) == 40


def test_environment_variable_names_the_root(official, monkeypatch):
    monkeypatch.setenv("ADJOINTBACKMAP_DATA", str(official))
    assert len(data.load("cifar100", "test")) == 100


def test_root_goes_before_the_environment_variable(official, monkeypatch, tmp_path):
    monkeypatch.setenv("ADJOINTBACKMAP_DATA", str(tmp_path))
    assert len(data.load("cifar10", "test", official)) == 40


@pytest.mark.parametrize(("dataset", "split"), [("mnist", "test"), ("cifar10", "val")])
def test_unknown_names_are_answered_with_the_known_ones(dataset, split):
    expected = (
        r"one of cifar10, cifar100 and its split train, "
        rf"validation or test\. Got '{dataset}', '{split}'"
    )
    with pytest.raises(ValueError, match=expected):
        data.load(dataset, split)


def test_missing_files_are_named(official, tmp_path):
    copy_of(official, tmp_path, "cifar10").joinpath("data_batch_3.bin").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"cifar-10-batches-bin must hold .* data_batch_3\.bin, .*cifar-10-binary\.tar\.gz",
    ):
        data.load("cifar10", "train", tmp_path)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("split", ["test", "train"])
def test_a_split_needs_only_its_own_files(official, tmp_path, dataset, split):
    """Without the files of the other splits the same images come."""
    source = data.SOURCES[dataset]
    folder = copy_of(official, tmp_path, dataset)
    for name in source.train_files if split == "test" else source.test_files:
        folder.joinpath(name).unlink()
    found = data.load(dataset, split, tmp_path)
    assert found.hashes == data.load(dataset, split, official).hashes


def test_missing_root_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"nowhere.cifar-100-binary must hold the official binary files test\.bin; unpack",
    ):
        data.load("cifar100", "test", tmp_path / "nowhere")


def test_truncated_file_is_named(official, tmp_path):
    path = copy_of(official, tmp_path, "cifar10") / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=r"data_batch_2\.bin must have 122,920 bytes \(40 records of 3,073\), got 122,919",
    ):
        data.load("cifar10", "train", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "file", "expected"),
    [
        ("cifar10", "test_batch.bin", r"test_batch\.bin must have 30,730,000 bytes"),
        ("cifar100", "train.bin", r"train\.bin must have 153,700,000 bytes"),
        ("cifar100", "test.bin", r"test\.bin must have 30,740,000 bytes"),
    ],
)
def test_official_files_have_their_official_sizes(official, monkeypatch, dataset, file, expected):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=expected):
        data.load(dataset, "train" if file.startswith("train") else "test", official)


@pytest.mark.parametrize(
    ("dataset", "file", "top"), [("cifar10", "test_batch.bin", 9), ("cifar100", "test.bin", 99)]
)
def test_damaged_file_is_named(official, tmp_path, dataset, file, top):
    path = copy_of(official, tmp_path, dataset) / file
    content = bytearray(path.read_bytes())
    content[data.SOURCES[dataset].label_bytes - 1] = top + 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{file} must have labels from 0 to {top}, got {top + 1}: it is damaged"
    ):
        data.load(dataset, "test", tmp_path)


@pytest.fixture
def server(official, tmp_path, monkeypatch):
    """The archive of CIFAR-10 on a local server, its checksum, and a function that stops it."""
    served = tmp_path / "served"
    served.mkdir()
    archive = served / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(official / "cifar-10-batches-bin", "cifar-10-batches-bin")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=served)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/{archive.name}"
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(data.SOURCES, "cifar10", replace(data.SOURCES["cifar10"], url=url, md5=md5))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield httpd.shutdown
    httpd.shutdown()
    httpd.server_close()


def test_archive_is_downloaded_once(server, official):
    expected = data.load("cifar10", "test", official)
    assert data.load("cifar10", "test").hashes == expected.hashes
    server()
    assert data.load("cifar10", "test").hashes == expected.hashes


def test_archive_with_another_checksum_is_refused(server, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "cifar10", replace(data.SOURCES["cifar10"], md5="0" * 32))
    with pytest.raises(ValueError, match=r"hash of downloaded file .* does not match"):
        data.load("cifar10", "test")


def test_failed_download_says_what_to_do(monkeypatch):
    def retrieve(*args, **kwargs):
        msg = "no route to host"
        raise OSError(msg)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    expected = (
        r"cifar-10-binary\.tar\.gz could not be downloaded \(no route to host\); .* "
        r"--data or ADJOINTBACKMAP_DATA\."
    )
    with pytest.raises(ConnectionError, match=expected):
        data.load("cifar10", "test")


def test_sample_has_twenty_different_images_of_each_class():
    images = data.sample()
    assert images.pixels.shape == (200, 3, 32, 32)
    assert torch.bincount(images.labels).tolist() == [20] * 10
    assert len(set(images.hashes)) == 200
    assert images.pixels.float().std() > 50  # pictures, not a constant


def test_encode_writes_what_the_reader_reads(official):
    images = data.load("cifar10", "test", official)
    assert (
        data.encode(images) == (official / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    )


def test_images_are_chosen_by_position_slice_and_mask():
    images = data.sample()
    assert images[5].hashes == images[5:6].hashes == images[[5]].hashes == (images.hashes[5],)
    ships = images[images.labels == images.classes.index("ship")]
    assert len(ships) == 20
    assert set(ships.labels.tolist()) == {8}
    assert torch.equal(images[[7, 3]].pixels, torch.stack([images.pixels[7], images.pixels[3]]))


def test_unit_interval_divides_by_255():
    images = data.sample()
    x = images.unit_interval()
    assert x.dtype == torch.float32
    assert x.max() == 1
    torch.testing.assert_close(x[9, 2, 4, 6].item() * 255, float(images.pixels[9, 2, 4, 6]))


def test_draw_depends_on_the_seed_and_not_on_the_order():
    images = data.sample()
    shuffled = images[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    drawn = images.draw(50, seed=0)
    assert drawn.hashes == shuffled.draw(50, seed=0).hashes
    assert drawn.hashes != images.draw(50, seed=1).hashes
    assert len(set(drawn.hashes)) == 50
    assert set(images.draw(200, seed=0).hashes) == set(images.hashes)


@pytest.mark.parametrize("count", [0, 201, -1])
def test_draw_of_too_many_or_none_is_refused(count):
    with pytest.raises(ValueError, match=rf"must be from 1 to 200\. Got {count}\."):
        data.sample().draw(count, seed=0)
