"""What the explorer knows: networks, pictures, and a bounded number of networks at images."""

import hashlib
import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjointbackmap import data, models
from adjointbackmap.analysis.lines import RegionLine
from adjointbackmap.engine.network import Network
from adjointbackmap.explorer.held import Held
from adjointbackmap.images import image
from adjointbackmap.sources import NetworkOptions, Subject, find_image, load_subject
from adjointbackmap.text.readers import FROZEN, Reader

DEFAULT_NETWORK = "vgg7-cifar10"
DEFAULT_IMAGE = "ship"
MOST_UPLOADS = 16  # pictures that are kept; the oldest goes first
SAMPLES = 40  # sample images that are offered
SENTENCES = (  # that are offered; the first one is shown first
    "it's a thoughtful film, though never a moving one",
    "a gripping story, told with wit and warmth",
    "dull from start to end",
    "not bad at all",
)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network that is ready.

    Attributes:
        subject: The module, its classes and how it wants its pictures.
        network: The traced network.
    """

    subject: Subject
    network: Network

    @property
    def std(self) -> Tensor:
        """Pixels per unit of the network's input, ``(C, 1, 1)``."""
        std = torch.tensor(self.subject.preprocessing().std, dtype=torch.float64)
        return std.expand(self.subject.shape[0])[:, None, None]

    def class_name(self, number: int) -> str:
        """Name of an output."""
        classes = self.subject.classes
        return classes[number] if classes else str(number)


@dataclass(frozen=True)
class Upload:
    """A picture that the user gave.

    Attributes:
        content: The bytes of a file; pixels ``(C, H, W)`` as floating numbers, which may lie
            outside of [0, 1]; or what :func:`adjointbackmap.image` takes.
        name: Its name.
    """

    content: Any
    name: str

    def source(self) -> Any:
        """The picture as :func:`adjointbackmap.image` takes it."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return self.content.clamp(0, 1) if self.is_pixels() else self.content

    def is_pixels(self) -> bool:
        """Whether the content is a tensor of pixels."""
        return isinstance(self.content, Tensor) and self.content.is_floating_point()


class Session:
    """Networks, pictures and what is held of them.

    Two threads may use it at once, see :class:`adjointbackmap.explorer.server.Server`.

    Args:
        source: The network that is shown first.
        memory: Largest number of bytes of what is held.
        picture: The image that is shown first: a sample image or a file.
    """

    def __init__(
        self,
        source: NetworkOptions | Loaded | None = None,
        memory: int = 2**31,
        picture: str = DEFAULT_IMAGE,
    ) -> None:
        self.source = source or NetworkOptions(DEFAULT_NETWORK)
        self.memory = memory
        self.loaded: dict[str, Loaded] = {}
        self.readers: dict[str, Reader] = {}
        self.uploads: OrderedDict[str, Upload] = OrderedDict()
        self.held: OrderedDict[tuple[str, ...], Held] = OrderedDict()
        self.line: tuple[tuple[Any, ...], RegionLine] | None = None  # the one walked last
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        if isinstance(source, Loaded):
            self.loaded[source.subject.title] = source
        is_reader = self.reads(self.first_network)
        if is_reader:
            _check_reader(self.source, picture)
        self.first_picture = self.first(DEFAULT_IMAGE if is_reader else picture)

    # networks

    @property
    def first_network(self) -> str:
        """Name of the network that is shown first."""
        source = self.source
        if isinstance(source, Loaded):
            return source.subject.title
        file = source.onnx.name if source.onnx is not None else None
        return source.name or source.model or file or DEFAULT_NETWORK

    @cached_property
    def first_subject(self) -> Subject:
        """The network that is shown first, before it is traced."""
        return self.source.subject if isinstance(self.source, Loaded) else load_subject(self.source)

    @property
    def first_image(self) -> str:
        """What is shown first: the name of a picture, or a sentence."""
        return SENTENCES[0] if self.reads(self.first_network) else self.first_picture

    def sentences(self) -> list[str]:
        """The sentences that are offered."""
        return list(SENTENCES)

    def check(self) -> None:
        """Load the network that is shown first, before it is traced, to see that it can be.

        Raises:
            ValueError: If the options do not fit it.
        """
        if not self.reads(self.first_network):
            _ = self.first_subject

    def names(self) -> list[str]:
        """Names of the networks that can be shown."""
        shipped = [*models.names(), *models.names("sentences")]
        first = self.first_network
        return shipped if first in shipped else [first, *shipped]

    def reads(self, name: str) -> bool:
        """Whether a network reads sentences."""
        return name not in self.loaded and name in models.names("sentences")

    def reader(self, name: str) -> Reader:
        """A network that reads sentences, traced; the first call takes seconds."""
        with self._loading:
            if name not in self.readers:
                source = self.source if name == self.first_network else None
                # without frozen gates or a tangent, a transformer has no hyperplane
                is_tangent = isinstance(source, NetworkOptions) and source.curved == "tangent"
                reader = models.reader(name, "tangent" if is_tangent else FROZEN)
                _ = reader.network  # traced here, so that one thread does it
                self.readers[name] = reader
            return self.readers[name]

    def load(self, name: str) -> Loaded:
        """A traced network; the first call takes seconds.

        Raises:
            ValueError: If there is no such network, or its input is no picture.
        """
        with self._loading:
            if name not in self.loaded:
                self.loaded[name] = self._load(name)
            return self.loaded[name]

    def _load(self, name: str) -> Loaded:
        if name not in self.names():
            msg = f"net must be one of {', '.join(self.names())}. Got {name!r}: choose one."
            raise ValueError(msg)
        is_first = name == self.first_network
        subject = self.first_subject if is_first else load_subject(NetworkOptions(name))
        if len(subject.shape) != 3 or subject.shape[0] not in (1, 3):
            msg = (
                "The explorer shows networks of pictures with 1 or 3 channels. "
                f"Got inputs of {subject.shape}: use the package in Python."
            )
            raise ValueError(msg)
        source = self.source if is_first else NetworkOptions(name)
        is_as_shipped = isinstance(source, NetworkOptions) and source == NetworkOptions(source.name)
        return Loaded(subject, subject.trace_shipped() if is_as_shipped else subject.trace())

    # pictures

    def first(self, picture: str) -> str:
        """The name of an image that the user names; a file is kept as an upload.

        Raises:
            FileNotFoundError: If it is neither a sample image nor a file.
        """
        sample = data.sample()
        if picture in sample.classes:  # the page knows sample images by number
            return str(int((sample.labels == sample.classes.index(picture)).nonzero()[0]))
        if _is_sample(picture):
            return picture
        path = Path(picture).expanduser()
        if not path.is_file():
            msg = (
                "--image must be the number or class of a sample image, or a picture file. "
                f"Got {picture}."
            )
            raise FileNotFoundError(msg)
        return self.add(path.read_bytes(), path.name)

    def add(self, content: bytes, name: str) -> str:
        """Keep a picture, and return the name under which it is known.

        Raises:
            ValueError: If it is no picture.
        """
        image(io.BytesIO(content))  # before it is kept: a bad file has one clear sentence
        key = f"up-{hashlib.sha256(content).hexdigest()[:12]}"
        return self._kept(key, Upload(content, name))

    def keep_picture(self, content: Any, name: str) -> str:
        """Keep a picture of any kind, see :class:`Upload`, and return its name."""
        return self._kept(f"up-{secrets.token_hex(6)}", Upload(content, name))

    def _kept(self, key: str, upload: Upload) -> str:
        with self._lock:
            self.uploads[key] = upload
            self.uploads.move_to_end(key)
            while len(self.uploads) > MOST_UPLOADS:
                self.uploads.popitem(last=False)
        return key

    def pixels(self, name: str, picture: str) -> tuple[Tensor, str]:
        """Pixels in [0, 1] of a picture in the shape of a network, and words about it.

        Raises:
            ValueError: If there is no such picture.
        """
        subject = self.load(name).subject
        upload = self.uploads.get(picture)
        if upload is not None:
            if upload.is_pixels() and upload.content.shape == subject.shape:
                return upload.content, upload.name
            plain = subject.preprocessing().but(mean=(0.0,), std=(1.0,))
            found = image(upload.source(), preprocess=plain, channels=subject.shape[0])
            steps = ", ".join(found.preparation.steps())
            return found.detach()[0], f"{upload.name} ({steps})" if steps else upload.name
        if not _is_sample(picture):  # a path here would open any file for whoever has the page
            msg = f"img must be a sample image or an uploaded picture. Got {picture!r}: upload it."
            raise ValueError(msg)
        return find_image(picture, subject)

    # what is held

    def at(self, name: str, picture: str) -> Held:
        """A network at an image or a sentence, from what is held or computed now."""
        if self.reads(name):
            return self.keep((name, picture), partial(self._at_sentence, name, picture))
        loaded = self.load(name)

        def made() -> Held:
            x = self.prepared(loaded, self.pixels(name, picture)[0])
            return Held.of(loaded.network, x.to(loaded.network.dtype))

        return self.keep((name, picture), made)

    def _at_sentence(self, name: str, sentence: str) -> Held:
        """A network at a sentence, in float64: these networks are small."""
        reader = self.reader(name)
        return Held.of(reader.network, reader.embed(sentence), torch.float64)

    def keep(self, key: tuple[str, ...], make: Callable[[], Held]) -> Held:
        """What is held under a key, or made now; the least recently used goes first."""
        with self._lock:
            found = self.held.get(key)
        if found is None:
            found = make()
        with self._lock:
            self.held[key] = found
            self.held.move_to_end(key)
            while len(self.held) > 1 and sum(h.bytes for h in self.held.values()) > self.memory:
                self.held.popitem(last=False)
        return found

    def prepared(self, loaded: Loaded, pixels: Tensor) -> Tensor:
        """Pixels as the network takes them, ``(1, C, H, W)``, in their dtype."""
        with torch.no_grad():
            return loaded.subject.prepare(pixels[None])

    def pictures(self) -> list[dict[str, Any]]:
        """Names of the pictures that can be shown, the uploaded ones first."""
        sample = data.sample()
        with self._lock:
            own = [{"id": key, "name": upload.name} for key, upload in self.uploads.items()]
        labels = sample.labels[:SAMPLES].tolist()
        names = [{"id": str(n), "name": sample.classes[label]} for n, label in enumerate(labels)]
        return [*reversed(own), *names]


def _check_reader(source: NetworkOptions | Loaded, picture: str) -> None:
    """Raise if options for pictures are given for a network that reads sentences.

    Raises:
        ValueError: If there are any.
    """
    options = ("fold", "shape", "preprocess", "size", "resize", "mean", "std", "classes")
    given = [f"--{name}" for name in options if getattr(source, name, None)]
    if picture != DEFAULT_IMAGE:
        given.append("--image")
    if given:
        msg = (
            f"{given[0]} must come with a network of pictures. "
            "Got one that reads sentences: leave the option out."
        )
        raise ValueError(msg)


def _is_sample(picture: str) -> bool:
    sample = data.sample()
    if picture in sample.classes:
        return True
    return picture.isascii() and picture.isdigit() and int(picture) < len(sample)
