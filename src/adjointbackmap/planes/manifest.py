"""The manifest of a store of hyperplanes: its files, their sizes and their checksums.

A Zarr store that checks each file against the manifest is here too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from adjointbackmap.planes.query import Block
from adjointbackmap.planes.streaming import tiles

# Zarr's file of the metadata of a group or of an array.
ROOT_FILE = "zarr.json"
# Folder of the records, in the folder of a store.
RECORDS = "progress"
# Attribute with the method, the memory and the blocks of the computation. The hyperplanes do not
# depend on it.
LAYOUT = "blocks"
# The arrays that are written block by block.
BLOCK_ARRAYS = ("image", "bias", "value")
# Advice at the end of messages about damaged files.
AGAIN = "run the same save or map again, which repairs it"


class Seal(NamedTuple):
    """Checksum and size of a file as it was written.

    Attributes:
        sha256: Checksum of its bytes.
        size: Number of its bytes; ``None`` in the records of older versions.
    """

    sha256: str
    size: int | None

    @classmethod
    def of(cls, content: bytes) -> "Seal":
        """The seal of a file with these bytes."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    def matches(self, content: bytes) -> bool:
        """Whether a file with these bytes has this checksum and this size."""
        return self.size in (None, len(content)) and self.sha256 == Seal.of(content).sha256


Seals = Mapping[str, Seal]
"""Name of a file in the store -> its seal."""


class Manifest:
    """The files that a store must have, and the records of the finished files.

    Attributes:
        folder: Folder of the store.
        attributes: The settings that made the hyperplanes, and the layout of the computation.
        names: File of a record -> names of the files that the record must list.

    Args:
        folder: Folder of the store.
        metadata: Content of the root's ``zarr.json``.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        self.folder = folder
        self.attributes = metadata["attributes"]
        arrays = metadata["consolidated_metadata"]["metadata"]
        region = [slice(0, extent) for extent in self.attributes["shape"]]
        whole = [ROOT_FILE, *(f"{name}/{ROOT_FILE}" for name in arrays)]
        for key in arrays:
            if key not in BLOCK_ARRAYS:
                whole += _chunks(key, arrays[key], ())
        self.names = {record_path(folder, "metadata"): frozenset(whole)}
        for number, block in enumerate(tiles(region, self.attributes[LAYOUT]["shape"])):
            chunks = (_chunks(key, arrays[key], block) for key in BLOCK_ARRAYS)
            names = frozenset(chain.from_iterable(chunks))
            self.names[record_path(folder, f"{number:06}")] = names

    @cached_property
    def seals(self) -> Seals:
        """The seals of all files that finished records list."""
        return {name: seal for record in self.names for name, seal in self.finished(record).items()}

    @property
    def records(self) -> list[Path]:
        """The record of the metadata, then the record of each block."""
        return list(self.names)

    def finished(self, record: Path) -> Seals:
        """The seals that a record lists.

        Empty if the record is missing or damaged, or lists other files than it must.
        """
        seals = read_record(record)
        return seals if seals.keys() == self.names[record] else {}

    def damaged(self, record: Path) -> list[str]:
        """Files of a record that are missing or damaged.

        If the record itself is, its own name is given instead.
        """
        seals = self.finished(record)
        if not seals:
            return [str(record.relative_to(self.folder))]
        return [name for name, seal in seals.items() if not is_whole(self.folder / name, seal)]

    def wrong_sizes(self) -> Iterator[tuple[Path, str]]:
        """Path of each file that is missing or has another size, and what is wrong with it.

        No content is read.
        """
        for name, seal in self.seals.items():
            path = self.folder / name
            if not path.is_file():
                yield path, "no file"
            elif seal.size not in (None, path.stat().st_size):
                yield path, f"{path.stat().st_size:,} bytes instead of {seal.size:,}"


class CheckedStore(LocalStore):
    """A Zarr store that reads only the files of a manifest, and refuses damaged ones.

    Args:
        root: Folder of the store.
        seals: The seals of the files.
    """

    def __init__(self, root: Path, seals: Seals) -> None:
        super().__init__(root, read_only=True)
        self.seals = seals

    def with_read_only(self, read_only: bool = False) -> "CheckedStore":
        """The same store: it is always read-only."""
        return self

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """The content of a file, or ``None`` if the manifest has no such file.

        Raises:
            ValueError: If the file is missing or damaged; the message has its path.
        """
        if key not in self.seals:
            return None
        content = await super().get(key, prototype)  # the checksum is that of the whole file
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
        if byte_range is None:
            return content
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    def _check(self, key: str, content: Buffer | None) -> None:
        """Compare the content of a file with its seal.

        Raises:
            ValueError: If there is no content, or it does not match.
        """
        if content is None or not self.seals[key].matches(content.to_bytes()):
            got = "no file" if content is None else "a damaged file"
            msg = f"{self.root / key} must match its checksum. Got {got}: {AGAIN}."
            raise ValueError(msg)


def record_path(folder: Path, name: str) -> Path:
    """The record of the metadata or of a block."""
    return folder / RECORDS / f"{name}.json"


def read_record(record: Path) -> Seals:
    """The seals that a record lists; empty if it is missing or damaged."""
    found = read_json_object(record)
    try:
        return {
            name: Seal(s, None) if isinstance(s, str) else Seal(s["sha256"], int(s["bytes"]))
            for name, s in found.items()
        }
    except (KeyError, TypeError, ValueError):
        return {}


def record_text(seals: Seals) -> str:
    """The text of a record that lists these files."""
    listed = {name: {"sha256": seal.sha256, "bytes": seal.size} for name, seal in seals.items()}
    return json.dumps(listed, indent=1)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of(folder: Path) -> dict[str, Any]:
    """Content of the ``zarr.json`` in a folder; empty if it does not belong to a store."""
    found = read_json_object(folder / ROOT_FILE)
    try:
        Manifest(folder, found)
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return found


def is_whole(path: Path, seal: Seal) -> bool:
    """Whether there is a file that matches its seal."""
    return (
        path.is_file()
        and seal.size in (None, path.stat().st_size)
        and seal.matches(path.read_bytes())
    )


def refuse_links(folder: Path) -> None:
    """Raise if a link in a folder leads out of it.

    Raises:
        ValueError: If one does.
    """
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                msg = (
                    "A store must hold its own files. "
                    f"Got {path}, a link to {path.resolve()}: put the files in its place."
                )
                raise ValueError(msg)


def _chunks(name: str, array: Mapping[str, Any], block: Block) -> list[str]:
    """Files of the chunks of an array in a block.

    The block is a region along the first dimensions of the array; the others are complete.
    """
    shape = array["shape"]
    chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
    region = [*block, *(slice(0, extent) for extent in shape[len(block) :])]
    # numbers of the chunks along each axis; a chunk may be only partly in the block
    axes = [
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(region, chunk, strict=True)
    ]
    return ["/".join((name, "c", *map(str, place))) for place in product(*axes)]
