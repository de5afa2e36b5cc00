"""The files of a store of hyperplanes: which there must be, their sizes and checksums, and a Zarr store that checks them."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from adjointbackmap.planes.query import Block
from adjointbackmap.planes.streaming import tiles

ROOT = "zarr.json"
RECORDS = "progress"
LAYOUT = "blocks"  # the attribute that says how the store is computed, not what it holds
LARGE = ("image", "bias", "value")  # the arrays that are written block by block
AGAIN = "run the same save or map again, which repairs it"


class Seal(NamedTuple):
    """What a file must be.

    Attributes:
        sha256: Checksum of its bytes.
        size: Their number; ``None`` in the records of older versions.
    """

    sha256: str
    size: int | None

    @classmethod
    def of(cls, content: bytes) -> "Seal":
        """The seal of a file with these bytes."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    def matches(self, content: bytes) -> bool:
        """Whether a file is what it must be."""
        return self.size in (None, len(content)) and self.sha256 == Seal.of(content).sha256


Seals = Mapping[str, Seal]
"""Name of a file in the store -> what it must be."""


class Manifest:
    """Which files a store must have, and the records of those that are finished.

    Attributes:
        folder: Folder of the store.
        attributes: What made the hyperplanes, and how they are computed.
        names: File of a record -> names of the files that the record must list.

    Args:
        folder: Folder of the store.
        metadata: What the root's ``zarr.json`` holds.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        self.folder = folder
        self.attributes = metadata["attributes"]
        arrays = metadata["consolidated_metadata"]["metadata"]
        blocks = tiles(
            [slice(0, extent) for extent in self.attributes["shape"]],
            self.attributes[LAYOUT]["shape"],
        )
        whole = [ROOT, *(f"{name}/{ROOT}" for name in arrays)]
        whole += [
            name for key in arrays if key not in LARGE for name in _chunks(key, arrays[key], ())
        ]
        self.names = {record_path(folder, "metadata"): frozenset(whole)}
        for number, block in enumerate(blocks):
            names = frozenset(name for key in LARGE for name in _chunks(key, arrays[key], block))
            self.names[record_path(folder, f"{number:06}")] = names

    @cached_property
    def seals(self) -> Seals:
        """Each file that a finished record lists -> what it must be."""
        return {name: seal for record in self.names for name, seal in self.finished(record).items()}

    @property
    def records(self) -> list[Path]:
        """The record of the metadata, then that of each block."""
        return list(self.names)

    def finished(self, record: Path) -> Seals:
        """What a record lists; nothing where it is missing, damaged, or lists other files than it must."""
        seals = read_record(record)
        return seals if seals.keys() == self.names[record] else {}

    def damaged(self, record: Path) -> list[str]:
        """Files that are missing or damaged; the record's own name where that is."""
        seals = self.finished(record)
        if not seals:
            return [str(record.relative_to(self.folder))]
        return [name for name, seal in seals.items() if not is_whole(self.folder / name, seal)]

    def wrong_sizes(self) -> Iterator[tuple[Path, str]]:
        """Files that are missing or of another size, and what they are; nothing is read."""
        for name, seal in self.seals.items():
            path = self.folder / name
            if not path.is_file():
                yield path, "no file"
            elif seal.size not in (None, path.stat().st_size):
                yield path, f"{path.stat().st_size:,} bytes instead of {seal.size:,}"


class CheckedStore(LocalStore):
    """A Zarr store that reads nothing but the files of a manifest, and each of these only as it was written.

    Args:
        root: Folder of the store.
        seals: Each file -> what it must be.
    """

    def __init__(self, root: Path, seals: Seals) -> None:
        super().__init__(root, read_only=True)
        self.seals = seals

    def with_read_only(self, read_only: bool = False) -> "CheckedStore":
        """The same store: it is never written to."""
        return self

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """A file, or ``None`` where the manifest has no such one.

        Raises:
            ValueError: If the file is missing or damaged; the message has its path.
        """
        if key not in self.seals:
            return None
        content = await super().get(key, prototype)  # the whole file, of which the checksum is
        self._check(key, content)
        return content if byte_range is None else await super().get(key, prototype, byte_range)

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As :meth:`get`.

        Raises:
            ValueError: If the file is missing or damaged; the message has its path.
        """
        if key not in self.seals:
            return None
        content = super().get_sync(key, prototype=prototype)
        self._check(key, content)
        return (
            content
            if byte_range is None
            else super().get_sync(key, prototype=prototype, byte_range=byte_range)
        )

    def _check(self, key: str, content: Buffer | None) -> None:
        if content is None or not self.seals[key].matches(content.to_bytes()):
            got = "no file" if content is None else "a damaged file"
            msg = f"{self.root / key} must match its checksum. Got {got}: {AGAIN}."
            raise ValueError(msg)


def record_path(folder: Path, name: str) -> Path:
    """The record of the metadata or of a block."""
    return folder / RECORDS / f"{name}.json"


def read_record(record: Path) -> Seals:
    """What a record lists; nothing where it is missing or damaged."""
    found = read_json(record)
    try:
        return {
            name: Seal(s, None) if isinstance(s, str) else Seal(s["sha256"], int(s["bytes"]))
            for name, s in found.items()
        }
    except (KeyError, TypeError, ValueError):
        return {}


def record_text(seals: Seals) -> str:
    """The seals of files as a record holds them."""
    return json.dumps(
        {name: {"sha256": seal.sha256, "bytes": seal.size} for name, seal in seals.items()},
        indent=1,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of(folder: Path) -> dict[str, Any]:
    """What the ``zarr.json`` in a folder holds; nothing where that is none of a store of hyperplanes."""
    found = read_json(folder / ROOT)
    try:
        Manifest(folder, found)
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return found


def is_whole(path: Path, seal: Seal) -> bool:
    """Whether there is a file with the bytes that it must have."""
    return (
        path.is_file()
        and seal.size in (None, path.stat().st_size)
        and seal.matches(path.read_bytes())
    )


def refuse_links(folder: Path) -> None:
    """Make sure that no link in a folder leads out of it.

    Raises:
        ValueError: If one does.
    """
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                msg = f"A store must hold its own files. Got {path}, a link to {path.resolve()}: put the files in its place."
                raise ValueError(msg)


def _chunks(name: str, array: Mapping[str, Any], block: Block) -> list[str]:
    """Files of the chunks of an array that a block of its first dimensions covers."""
    shape = array["shape"]
    chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
    region = [*block, *(slice(0, extent) for extent in shape[len(block) :])]
    axes = [
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(region, chunk, strict=True)
    ]
    return ["/".join((name, "c", *map(str, place))) for place in product(*axes)]
