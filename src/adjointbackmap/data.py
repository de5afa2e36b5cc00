"""CIFAR-10 and CIFAR-100 from the official binary files, and the sample that ships.

The order of the images differs between copies of the files, so nothing depends on it. An image is
identified by the SHA-256 of its pixels. The validation images of a class are the tenth of its
training images with the smallest hashes.
"""

import hashlib
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from adjointbackmap.display import Shown, Summary, by, png_of
from adjointbackmap.files.checked import check_file, compare

ENVIRONMENT_VARIABLE = "ADJOINTBACKMAP_DATA"
IMAGE_BYTES = 3 * 32 * 32  # bytes of an image
MOST_SHOWN = 8  # images in a notebook
MOST_NAMED = 10  # classes
VALIDATION_SHARE = 10  # one in ten training images of a class
MOST_CHARACTERS = 120  # of an error of the network in our message
SAMPLE_SHA256 = "9e756fc99443fb2f72db930857c8927ff9ba5aa832665b7d0451a32e6974b11f"

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)


@dataclass(frozen=True)
class Dataset:
    """A data set: its official binary files, the layout of their records, and its classes.

    Attributes:
        folder: Name of the folder of the files.
        train_files: Names of the files of training images.
        test_files: Names of the files of test images.
        records_per_file: Number of images in each file.
        label_bytes: Bytes of label before the pixels; the last one is used.
        classes: Names of the classes.
        url: Address of the archive.
        md5: Checksum of the archive, as published with it.
    """

    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    records_per_file: dict[str, int]
    label_bytes: int
    classes: tuple[str, ...]
    url: str
    md5: str


Source = Dataset  # its name before it had this one; it stays for one release


SOURCES = {
    "cifar10": Dataset(
        folder="cifar-10-batches-bin",
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_files=("test_batch.bin",),
        records_per_file={
            **{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
            "test_batch.bin": 10_000,
        },
        label_bytes=1,
        classes=CIFAR10_CLASSES,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": Dataset(
        folder="cifar-100-binary",
        train_files=("train.bin",),
        test_files=("test.bin",),
        records_per_file={"train.bin": 50_000, "test.bin": 10_000},
        label_bytes=2,  # coarse label, fine label
        classes=CIFAR100_CLASSES,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
    ),
}


@dataclass(frozen=True, repr=False)
class Images(Shown):
    """Images with labels.

    Attributes:
        pixels: Bytes ``(N, 3, 32, 32)``.
        labels: Class of each image ``(N,)``.
        classes: Names of the classes.
        hashes: SHA-256 of the pixels of each image.
    """

    pixels: UInt8[Tensor, "n 3 32 32"]
    labels: Int64[Tensor, " n"]
    classes: tuple[str, ...]
    hashes: tuple[str, ...]

    def _summary(self) -> Summary:
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        present = [f"{name} {n}" for name, n in zip(self.classes, counts, strict=True) if n]
        more = f", ... {len(present) - MOST_NAMED} more" if len(present) > MOST_NAMED else ""
        facts = {
            "pixels": f"{by(self.pixels.shape[1:])} uint8",
            "classes": ", ".join(present[:MOST_NAMED]) + more,
        }
        return Summary(f"Images: {len(self):,}", facts)

    def _pictures(self) -> Iterator[tuple[str, bytes]]:
        for i in range(min(MOST_SHOWN, len(self))):
            yield self.classes[self.labels[i]], png_of(self.pixels[i] / 255, side=64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Images":
        """The images chosen by a slice, a mask or a sequence of positions."""
        positions = torch.arange(len(self))[index].reshape(-1)
        hashes = tuple(self.hashes[i] for i in positions.tolist())
        return Images(self.pixels[positions], self.labels[positions], self.classes, hashes)

    def unit_interval(self) -> Float[Tensor, "n 3 32 32"]:
        """Pixels in [0, 1], ``(N, 3, 32, 32)`` in float32."""
        return self.pixels.float() / 255

    def by_hash(self) -> "Images":
        """The same images in the order of their hashes, which is the same for all copies."""
        return self[sorted(range(len(self)), key=self.hashes.__getitem__)]

    def draw(self, count: int, seed: int) -> "Images":
        """Draw ``count`` different images.

        The draw depends only on the images and on ``seed``.

        Raises:
            ValueError: If there are fewer images than ``count``.
        """
        if not 0 < count <= len(self):
            msg = f"The number of images must be from 1 to {len(self)}. Got {count}."
            raise ValueError(msg)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.by_hash()[order[:count]]


def load(dataset: str, split: str, root: str | os.PathLike[str] | None = None) -> Images:
    """Load one split of CIFAR-10 or CIFAR-100.

    If the folder has a list ``SHA256SUMS``, as ``sha256sum *.bin > SHA256SUMS`` writes it, the
    files are compared with it.

    Args:
        dataset: ``"cifar10"`` or ``"cifar100"``.
        split: ``"train"`` (45,000 images), ``"validation"`` (5,000) or ``"test"`` (10,000).
        root: The official binary folder, or the folder that it is in. It needs only the files of
            this split. The default is the environment variable ``ADJOINTBACKMAP_DATA``. Without
            both, the archive is downloaded once.

    Returns:
        Images with the fine labels.

    Raises:
        ValueError: If a name is unknown, or a file is truncated or damaged.
        FileNotFoundError: If ``root`` lacks the official files.
        ConnectionError: If the archive cannot be downloaded.
    """
    if dataset not in SOURCES or split not in ("train", "validation", "test"):
        msg = (
            f"Data must be one of {', '.join(SOURCES)} and its split train, validation or test. "
            f"Got {dataset!r}, {split!r}."
        )
        raise ValueError(msg)
    source = SOURCES[dataset]
    needed = source.test_files if split == "test" else source.train_files
    folder = _find(source, needed, root or os.environ.get(ENVIRONMENT_VARIABLE))
    images = _read([folder / name for name in needed], source)
    if split == "test":
        return images
    return images[_is_validation(images) if split == "validation" else ~_is_validation(images)]


def sample() -> Images:
    """The 200 CIFAR-10 test images that ship with the package, 20 of each class.

    Raises:
        ValueError: If the file is damaged.

    Example:
        >>> len(sample())
        200
    """
    with as_file(files("adjointbackmap") / "assets" / "cifar10-sample.bin") as path:
        content = path.read_bytes()
        actual = hashlib.sha256(content).hexdigest()
        compare(actual, SAMPLE_SHA256, path, "the package", "install it again")
        return _decode(content, path, SOURCES["cifar10"], records=200)


def encode(images: Images) -> bytes:
    """Convert images of CIFAR-10 to the official layout: a byte of label, 3,072 of pixels."""
    labels = images.labels.to(torch.uint8)[:, None]
    return torch.cat([labels, images.pixels.flatten(1)], dim=1).numpy().tobytes()


def _find(source: Dataset, needed: tuple[str, ...], root: str | os.PathLike[str] | None) -> Path:
    """The folder of the official binary files that are needed.

    Raises:
        FileNotFoundError: If ``root`` lacks them.
    """
    if not root:
        return _download(source)
    for folder in (Path(root) / source.folder, Path(root)):
        if all((folder / name).is_file() for name in needed):
            return folder
    msg = (
        f"{Path(root) / source.folder} must hold the official binary files {', '.join(needed)}; "
        f"unpack {source.url} there."
    )
    raise FileNotFoundError(msg)


def _download(source: Dataset) -> Path:
    """The folder of the files in the cache; the archive is downloaded the first time.

    Raises:
        ConnectionError: If that fails.
    """
    import pooch

    archive = source.url.rsplit("/", 1)[1]
    unpack = pooch.Untar(extract_dir=archive.removesuffix(".tar.gz"))
    try:
        cache = pooch.os_cache("adjointbackmap")
        checksum = f"md5:{source.md5}"
        members = pooch.retrieve(source.url, checksum, archive, cache, processor=unpack)
    except OSError as error:
        reason = textwrap.shorten(str(error), MOST_CHARACTERS)
        msg = (
            f"{source.url} could not be downloaded ({reason}); "
            f"unpack a copy and name its folder with --data or {ENVIRONMENT_VARIABLE}."
        )
        raise ConnectionError(msg) from error
    return Path(next(m for m in members if m.endswith(source.test_files[0]))).parent


def _read(paths: list[Path], source: Dataset) -> Images:
    """The images of some files, one after the other."""
    for path in paths:
        check_file(path)
    parts = [
        _decode(path.read_bytes(), path, source, source.records_per_file[path.name])
        for path in paths
    ]
    return Images(
        torch.cat([p.pixels for p in parts]),
        torch.cat([p.labels for p in parts]),
        source.classes,
        tuple(h for p in parts for h in p.hashes),
    )


def _decode(content: bytes, path: Path, source: Dataset, records: int) -> Images:
    """The images of one file.

    Raises:
        ValueError: If the file is truncated or damaged.
    """
    length = source.label_bytes + IMAGE_BYTES
    if len(content) != records * length:
        expected = f"{records * length:,} bytes ({records:,} records of {length:,})"
        msg = f"{path} must have {expected}, got {len(content):,}: fetch it again."
        raise ValueError(msg)
    table = np.frombuffer(content, np.uint8).reshape(records, length)
    labels = table[:, source.label_bytes - 1]
    if labels.max() >= len(source.classes):
        msg = (
            f"{path} must have labels from 0 to {len(source.classes) - 1}, got {labels.max()}: "
            "it is damaged, fetch it again."
        )
        raise ValueError(msg)
    pixels = np.ascontiguousarray(table[:, source.label_bytes :])
    hashes = tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in pixels)
    return Images(
        torch.from_numpy(pixels).view(-1, 3, 32, 32),
        torch.from_numpy(labels.astype(np.int64)),
        source.classes,
        hashes,
    )


def _is_validation(images: Images) -> Tensor:
    """Which training images are validation images, ``(N,)``."""
    chosen = torch.zeros(len(images), dtype=torch.bool)
    for label in range(len(images.classes)):
        members = torch.nonzero(images.labels == label).flatten().tolist()
        members.sort(key=images.hashes.__getitem__)
        chosen[members[: len(members) // VALIDATION_SHARE]] = True
    return chosen
