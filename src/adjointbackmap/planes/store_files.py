"""The files of a store of hyperplanes: Zarr arrays made in memory, put to the disk one whole file at a time."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from adjointbackmap.engine.patches import Patches
from adjointbackmap.engine.workspace import block_shape
from adjointbackmap.files import disk
from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.planes.manifest import LARGE, LAYOUT, ROOT, Seal, Seals, is_whole, record_text
from adjointbackmap.planes.query import Block
from adjointbackmap.planes.streaming import Stream, tiles
from adjointbackmap.planes.units import input_names

CHUNK_BYTES = 2**25  # of hyperplanes in one chunk, before compression
CHECKSUM = "crc32c"  # the last step of every chunk, which any Zarr reader checks
Labelled = tuple[tuple[str, ...], np.ndarray]


class Draft:
    """A store in memory: its metadata and small arrays whole, the large arrays one chunk at a time.

    Attributes:
        work: Hyperplanes that the store is to hold.

    Args:
        work: Hyperplanes that the store is to hold.
        attributes: What is written beside them.
    """

    def __init__(self, work: Stream, attributes: Mapping[str, Any]) -> None:
        self.work = work
        self.files: dict[str, Any] = {}
        self.chunk = _chunk(work)
        self.checksum = (
            attributes[LAYOUT].get("checksum") == CHECKSUM
        )  # older versions wrote chunks without one
        dims = ("n", *work.query.units.names)
        small = _small(work)
        coordinates = " ".join(
            sorted(set(small) - {"x", "b"} - set(dims))
        )  # xarray takes these as such
        whole = {**attributes, "coordinates": coordinates}
        group = zarr.create_group(MemoryStore(self.files), zarr_format=3, attributes=whole)
        for name, (names, array) in small.items():
            self._create(group, name, names, array.shape, array.shape, array.dtype)[...] = array
        dtype = small["x"][1].dtype
        self.arrays = [
            self._create(
                group, name, (*dims, *names), (*work.shape, *shape), (*self.chunk, *shape), dtype
            )
            for name, (names, shape) in _parts(work).items()
        ]
        with warnings.catch_warnings(
            action="ignore"
        ):  # consolidated metadata is not yet in the standard; xarray asks for it
            zarr.consolidate_metadata(group.store)

    @property
    def root(self) -> Seal:
        """What the root's ``zarr.json`` must be: it has all that the store depends on."""
        return Seal.of(self.files[ROOT].to_bytes())

    def put(self, folder: Path) -> Seals:
        """Write the metadata and small arrays, what the folder is first; file -> what it must be."""
        order = sorted(self.files, key=lambda name: (name != ROOT, name))
        return {name: _put(folder / name, self.files[name].to_bytes()) for name in order}

    def put_block(self, folder: Path, block: Block, planes: Hyperplanes) -> Seals:
        """Write the chunks of a block; file -> what it must be."""
        image = planes.image_part
        parts = (
            image.values if isinstance(image, Patches) else image,
            planes.bias_part,
            planes.value,
        )
        kept = set(self.files)
        seals = {}
        for tile in tiles(block, self.chunk):
            within = tuple(
                slice(t.start - b.start, t.stop - b.start) for t, b in zip(tile, block, strict=True)
            )
            for array, part in zip(self.arrays, parts, strict=True):
                array[tile] = part[within].cpu().numpy()
            for name in sorted(self.files.keys() - kept):
                seals[name] = _put(folder / name, self.files.pop(name).to_bytes())
        return seals

    def _create(
        self,
        group: zarr.Group,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        dtype: np.dtype,
    ) -> zarr.Array[Any]:
        blank: dict[str, Any] = (
            {"fill_value": np.nan} if self.checksum and dtype.kind == "f" else {}
        )  # what others read of a missing chunk
        return group.create_array(
            name,
            shape=shape,
            chunks=tuple(max(1, extent) for extent in chunk),
            dtype=str if dtype.kind == "U" else dtype,
            dimension_names=dims,
            compressors=[ZstdCodec(level=3), Crc32cCodec()]
            if self.checksum
            else ZstdCodec(level=3),
            config={"write_empty_chunks": True},  # every chunk is a file, which has a checksum
            **blank,
        )


def _parts(work: Stream) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The arrays that are written block by block: dimensions and shape of what belongs to one unit."""
    names = (
        ("channel", "patch_row", "patch_col")
        if work.query.in_patches
        else input_names(work.query.images.dim() - 2)
    )
    entries = len(work.query.readout.entries)
    return dict(
        zip(LARGE, ((names, work.query.part_shape), (("m",), (entries,)), ((), ())), strict=True)
    )


def _small(work: Stream) -> dict[str, Labelled]:
    """The images, the biases that the layer depends on, and where units and patches lie."""
    selection = work.query.units
    entries = work.query.readout.entries
    biases = work.query.network.biases_in(work.query.dtype)
    small: dict[str, Labelled] = {
        "x": (("n", *input_names(work.query.images.dim() - 2)), work.query.images.cpu().numpy()),
        "b": (("m",), biases.vector[entries].detach().cpu().numpy()),
        "entry": (("m",), entries.numpy()),
        "bias_name": (("m",), np.array(biases.labels, dtype=str)[entries.numpy()]),
    }
    for name, places in selection.coordinates().items():
        if name in selection.names:
            axis = selection.names.index(name)
            small[name] = (
                (name,),
                places[0].movedim(axis, 0).reshape(places.shape[1 + axis], -1)[:, 0].numpy(),
            )
        else:
            small[name] = (
                (selection.names, places[0].numpy())
                if len(places) == 1
                else (("n", *selection.names), places.numpy())
            )
    if work.query.in_patches:
        corners = work.query.corners().numpy()
        small |= {
            name: (selection.names, corners[..., axis]) for axis, name in enumerate(("top", "left"))
        }
    return small


def _chunk(work: Stream) -> tuple[int, ...]:
    """Images and units of a chunk: blocks are whole numbers of chunks."""
    most = block_shape(work.block, max(1, CHUNK_BYTES // work.query.bytes_each))
    return tuple(
        next(c for c in range(n, 0, -1) if whole % c == 0)
        for n, whole in zip(most, work.block, strict=True)
    )


# files


def put_record(record: Path, seals: Seals) -> None:
    """Write the checksums of files that are on the disk."""
    _put(record, record_text(seals).encode())


def _put(path: Path, content: bytes) -> Seal:
    seal = Seal.of(content)
    if not is_whole(path, seal):
        disk.write(path, content)
    return seal
