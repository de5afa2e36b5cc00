"""The files of a store of hyperplanes.

Zarr arrays are made in memory. Their files are then written to the disk, each as a whole.
"""

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
from adjointbackmap.planes.manifest import (
    BLOCK_ARRAYS,
    LAYOUT,
    ROOT_FILE,
    Seal,
    Seals,
    is_whole,
    record_text,
)
from adjointbackmap.planes.query import Block
from adjointbackmap.planes.streaming import Stream, tiles
from adjointbackmap.planes.units import input_names

# Most bytes of hyperplanes in a chunk, before compression. Readers load whole chunks, so that
# larger ones would cost them more for a few units; smaller ones would make more files.
CHUNK_BYTES = 2**25
# The last codec of every chunk. Any reader of Zarr checks it.
CHUNK_CHECKSUM = "crc32c"

Labelled = tuple[tuple[str, ...], np.ndarray]
"""Names of the dimensions of an array, and the array."""


class Draft:
    """A store in memory.

    Its metadata and small arrays are complete. The large arrays are made one chunk at a time.

    Attributes:
        work: The hyperplanes of the store.

    Args:
        work: The hyperplanes of the store.
        attributes: The attributes of the store's root.
    """

    def __init__(self, work: Stream, attributes: Mapping[str, Any]) -> None:
        self.work = work
        self.files: dict[str, Any] = {}
        self.chunk = _chunk(work)
        # older versions wrote chunks without a checksum
        self.checksum = attributes[LAYOUT].get("checksum") == CHUNK_CHECKSUM
        dims = ("n", *work.query.units.names)
        small = _small(work)
        # xarray reads the arrays that this attribute lists as coordinates
        coordinates = " ".join(sorted(set(small) - {"x", "b"} - set(dims)))
        whole = {**attributes, "coordinates": coordinates}
        group = zarr.create_group(MemoryStore(self.files), zarr_format=3, attributes=whole)
        for name, (names, array) in small.items():
            self._create(group, name, names, array.shape, array.shape, array.dtype)[...] = array
        dtype = small["x"][1].dtype
        self.arrays = []
        for name, (names, of_unit) in _block_arrays(work).items():
            shape = (*work.shape, *of_unit)
            chunk = (*self.chunk, *of_unit)
            self.arrays.append(self._create(group, name, (*dims, *names), shape, chunk, dtype))
        # xarray needs consolidated metadata, which the standard does not have yet: Zarr warns
        with warnings.catch_warnings(action="ignore"):
            zarr.consolidate_metadata(group.store)

    @property
    def root(self) -> Seal:
        """Seal of the root's ``zarr.json``, which holds everything that the store depends on."""
        return Seal.of(self.files[ROOT_FILE].to_bytes())

    def put(self, folder: Path) -> Seals:
        """Write the metadata and the small arrays, and give the seal of each file.

        The root's metadata, which say what the folder is, come first.
        """
        order = sorted(self.files, key=lambda name: (name != ROOT_FILE, name))
        return {name: _put(folder / name, self.files[name].to_bytes()) for name in order}

    def put_block(self, folder: Path, block: Block, planes: Hyperplanes) -> Seals:
        """Write the chunks of a block, and give the seal of each file."""
        image = planes.image_part
        values = image.values if isinstance(image, Patches) else image
        parts = (values, planes.bias_part, planes.value)
        kept = set(self.files)
        seals = {}
        for tile in tiles(block, self.chunk):
            # the tile's images and units, counted from the start of the block
            within = tuple(
                slice(t.start - b.start, t.stop - b.start) for t, b in zip(tile, block, strict=True)
            )
            for array, part in zip(self.arrays, parts, strict=True):
                array[tile] = part[within].cpu().numpy()
            # write the new files and drop them, so that the memory holds one tile at a time
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
        """Create an array; stores of older versions are created as they were."""
        # other readers then see NaN in place of a missing chunk, not zeros
        blank: dict[str, Any] = {}
        if self.checksum and dtype.kind == "f":
            blank = {"fill_value": np.nan}
        zstd = ZstdCodec(level=3)
        return group.create_array(
            name,
            shape=shape,
            chunks=tuple(max(1, extent) for extent in chunk),
            dtype=str if dtype.kind == "U" else dtype,
            dimension_names=dims,
            compressors=[zstd, Crc32cCodec()] if self.checksum else zstd,
            config={"write_empty_chunks": True},  # every chunk is a file, which has a checksum
            **blank,
        )


def _block_arrays(work: Stream) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The arrays that are written block by block: dimensions and shape for one unit."""
    names = input_names(work.query.images.dim() - 2)
    if work.query.in_patches:
        names = ("channel", "patch_row", "patch_col")
    image = (names, work.query.part_shape)
    bias = (("m",), (len(work.query.readout.entries),))
    value = ((), ())
    return dict(zip(BLOCK_ARRAYS, (image, bias, value), strict=True))


def _small(work: Stream) -> dict[str, Labelled]:
    """The arrays that are small: images, biases, and the coordinates of units and patches.

    The biases are those on which the layer depends.
    """
    selection = work.query.units
    entries = work.query.readout.entries
    biases = work.query.network.biases_in(work.query.dtype)
    small: dict[str, Labelled] = {
        "x": (("n", *input_names(work.query.images.dim() - 2)), work.query.images.cpu().numpy()),
        "b": (("m",), biases.vector[entries].detach().cpu().numpy()),
        "entry": (("m",), entries.numpy()),
        "bias_name": (("m",), np.array(biases.labels, dtype=str)[entries.numpy()]),
    }
    small |= selection.labelled()
    if work.query.in_patches:
        corners = work.query.corners().numpy()
        small["top"] = (selection.names, corners[..., 0])
        small["left"] = (selection.names, corners[..., 1])
    return small


def _chunk(work: Stream) -> tuple[int, ...]:
    """Images and units of a chunk. A block is a whole number of chunks along each dimension."""
    most = block_shape(work.block, max(1, CHUNK_BYTES // work.query.bytes_each))
    return tuple(_divisor(whole, n) for whole, n in zip(work.block, most, strict=True))


def _divisor(whole: int, most: int) -> int:
    """The largest divisor of a number that is at most ``most``."""
    return next(c for c in range(most, 0, -1) if whole % c == 0)


# files


def put_record(record: Path, seals: Seals) -> None:
    """Write the record of files that are on the disk."""
    _put(record, record_text(seals).encode())


def _put(path: Path, content: bytes) -> Seal:
    """Write a file unless it is there already, and give its seal."""
    seal = Seal.of(content)
    if not is_whole(path, seal):
        disk.write(path, content)
    return seal
