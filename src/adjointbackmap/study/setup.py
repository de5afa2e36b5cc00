"""The shipped networks, the test images and the result folder that the experiments use."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjointbackmap import data, models
from adjointbackmap.engine.network import Network
from adjointbackmap.files import disk
from adjointbackmap.files.checked import read_sealed, sealed_text
from adjointbackmap.sources import NetworkOptions, Subject, load_subject
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS

SCALE = 1 / 8  # the factor k of the pattern
BATCH = 500  # images per forward pass


@dataclass(frozen=True)
class Setup:
    """A run of the experiments.

    Attributes:
        folder: Folder for results, with a subfolder for each experiment.
        networks: Names of shipped networks.
        image: The image of the experiments on one image: a class, or the first digits of an image's
            hash. For a class, it is the first test image by hash that all shipped networks with
            these classes classify correctly, so it does not depend on ``networks``. ``None`` is the
            image of the study, see :func:`preset`.
        images: Number of images of the experiments on many images.
        seed: Seed of all draws.
        root: Folder of the official binary files.
        sample: Whether to use only the 200 test images of CIFAR-10 that ship.
    """

    folder: Path
    networks: tuple[str, ...]
    image: str | None = None
    images: int = 100
    seed: int = 0
    root: Path | None = None
    sample: bool = False

    @property
    def settings(self) -> str:
        """The settings needed to repeat the run, without paths of a machine."""
        pool = "the 200 test images that ship" if self.sample else "all test images"
        image = f"image {self.image or 'of the study'}"
        return f"{image}, {self.images} images, seed {self.seed}, drawn from {pool}"

    def trained(self, name: str) -> "Trained":
        """A network of the run with its test images."""
        return Trained(name, self.root, self.sample and models.card(name)["dataset"] == "cifar10")

    def one(self, name: str) -> data.Images:
        """The image of the experiments on one image, which the network classifies correctly.

        Raises:
            ValueError: If there is no such image, or the network does not classify it correctly.
        """
        trained = self.trained(name)
        asked = self.image or preset(name)
        if asked in trained.images.classes:
            found = trained.known_by_all(asked)
        else:
            named = torch.tensor([h.startswith(asked) for h in trained.images.hashes])
            found = trained.images[trained.known & named]
        if not len(found):
            msg = (
                "--image must be a class, or the first digits of a test image's hash, "
                f"that {name} classifies correctly. Got {asked!r}: name another."
            )
            raise ValueError(msg)
        return found[:1]

    def many(self, name: str, count: int | None = None) -> data.Images:
        """A seeded draw of images that a network classifies correctly; all if there are fewer."""
        trained = self.trained(name)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(trained.images), generator=generator)
        return trained.images[order[trained.known[order]][: count or self.images]]


def check_setup(names: Sequence[str] | None, images: int, sample: bool) -> tuple[str, ...]:
    """The networks of a run, in the order of the study.

    If ``names`` is empty, they are all shipped networks that have images.

    Raises:
        ValueError: If a network is not available, or ``images`` is less than 1.
    """
    able = [name for name in PUBLISHED_COLUMNS if name in models.names()]
    if sample:  # its images are of CIFAR-10
        able = [name for name in able if models.card(name)["dataset"] == "cifar10"]
    unknown = [name for name in names or () if name not in able]
    if unknown:
        msg = (
            f"--network must be some of {', '.join(able)}. "
            f"Got {', '.join(unknown)}: leave it out for all of them."
        )
        raise ValueError(msg)
    if images < 1:
        msg = f"--images must be at least 1. Got {images}."
        raise ValueError(msg)
    return tuple(name for name in able if not names or name in names)


def preset(name: str) -> str:
    """The class of the study's image.

    It is a horse for networks without biases, a bird for those with biases, and an apple for
    CIFAR-100.
    """
    if models.card(name)["dataset"] == "cifar100":
        return "apple"
    return "horse" if "nobias" in name else "bird"


@dataclass(frozen=True)
class Trained:
    """A shipped network, folded and traced, and the test images of its classes.

    Attributes:
        name: Its shipped name.
        root: Folder of the official binary files.
        sample: Whether to use only the 200 test images that ship.
    """

    name: str
    root: Path | None
    sample: bool

    @property
    def images(self) -> data.Images:
        """The test images in the order of their hashes."""
        return _images(models.card(self.name)["dataset"], self.root, self.sample)

    @property
    def known(self) -> Tensor:
        """Which images the network classifies correctly, ``(N,)``."""
        return _known(self)

    def known_by_all(self, word: str) -> data.Images:
        """The images of a class that all shipped networks with these classes classify correctly.

        They are in the order of their hashes.
        """
        return _known_by_all(models.card(self.name)["dataset"], self.root, self.sample, word)

    @property
    def subject(self) -> Subject:
        """The folded module and the map from pixels to its input."""
        return _subject(self.name)

    @property
    def network(self) -> Network:
        """The folded module, traced in its own input."""
        return _network(self.name)

    def input(self, pixels: Tensor) -> Tensor:
        """Convert pixels in [0, 1] to the units of the network's input."""
        return self.subject.prepare(pixels)

    @property
    def about(self) -> dict[str, Any]:
        """Name and weights hash, which identify the results of this network."""
        return {"network": self.name, "weights sha256": self.network.weights_hash()}


@cache
def _images(dataset: str, root: Path | None, sample: bool) -> data.Images:
    return (data.sample() if sample else data.load(dataset, "test", root)).by_hash()


@cache
def _subject(name: str) -> Subject:
    return load_subject(NetworkOptions(name, fold=True))


@cache
def _network(name: str) -> Network:
    return _subject(name).trace()


@cache
def _known(trained: Trained) -> Tensor:
    return _right(trained, trained.images)


@cache
def _known_by_all(dataset: str, root: Path | None, sample: bool, word: str) -> data.Images:
    images = _images(dataset, root, sample)
    found = images[images.labels == images.classes.index(word)]
    for name in PUBLISHED_COLUMNS:
        if name in models.names() and models.card(name)["dataset"] == dataset and len(found):
            found = found[_right(Trained(name, root, sample), found)]
    return found


def _right(trained: Trained, images: data.Images) -> Tensor:
    """Which images a network classifies correctly, ``(N,)``."""
    parts = images.pixels.split(BATCH)
    with torch.no_grad():
        scores = [trained.subject.module(trained.input(part.float() / 255)) for part in parts]
    return torch.cat(scores).argmax(1) == images.labels


def image_seed(seed: int, image: str, number: int = 0) -> int:
    """A seed for the draws of one image, so that they do not depend on the other images of a run.

    Args:
        seed: Seed of the run.
        image: Hash of the image.
        number: Which of an image's seeds, from 0 to 7.

    Example:
        >>> image_seed(0, "a") == image_seed(0, "a"), image_seed(0, "a") == image_seed(1, "a")
        (True, False)
    """
    digits = hashlib.sha256(f"{seed} {image}".encode()).hexdigest()
    return int(digits[8 * number : 8 * number + 8], 16)


def write_json(path: Path, found: Any) -> None:
    """Replace a file of results atomically. Its last key is its checksum."""
    disk.write(path, sealed_text(found))


def read_json(path: Path) -> Any:
    """Read a file of results.

    Raises:
        ValueError: If it is damaged.
    """
    return read_sealed(path, "run the same study again, which makes it anew")
