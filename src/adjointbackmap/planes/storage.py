"""Hyperplanes on disk, larger than memory: a chunked array store that a run which was stopped continues."""

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointbackmap.engine.network import Network
from adjointbackmap.engine.patches import Patches
from adjointbackmap.files import disk
from adjointbackmap.planes.hyperplane import Hyperplanes, relative_error
from adjointbackmap.planes.manifest import (
    AGAIN,
    LAYOUT,
    ROOT,
    CheckedStore,
    Manifest,
    Seal,
    is_whole,
    metadata_of,
    read_record,
    record_path,
    refuse_links,
)
from adjointbackmap.planes.query import Block, Query, bytes_of
from adjointbackmap.planes.store_files import CHECKSUM, Draft, put_record
from adjointbackmap.planes.streaming import Stream, stream, tiles
from adjointbackmap.planes.units import Selection

if TYPE_CHECKING:
    import xarray

METADATA = "metadata"  # the record of all that is not written block by block


def save(
    path: Path | str,
    network: Network,
    x: Tensor,
    layer: str | nn.Module,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    scale: float | str = 1.0,
    dtype: torch.dtype | str | None = None,
    method: str | None = None,
    memory: str | float | int | None = "2GiB",
    report: Callable[[float], None] = lambda share: None,
) -> "StoredPlanes":
    """Compute hyperplanes into a folder, a Zarr store (version 3) that xarray reads; they may be larger than memory.

    The same call again continues a run that was stopped: blocks whose files match their checksums are kept, all others are
    computed again, and the files are in the end byte by byte those of an unbroken run. It goes on with the method and the
    blocks with which it was begun.

    ``path`` is the folder of the store: a new one, or one of the same hyperplanes. The other arguments are those of
    :func:`adjointbackmap.iter_hyperplanes`, and ``report`` is called with the share of blocks that are finished.

    Returns:
        The stored hyperplanes.

    Raises:
        ValueError: If an argument does not fit, the folder holds something else, or its blocks are larger than ``memory``.
        OSError: If the disk is full, where finished blocks are kept, or another process writes to the folder.

    Example:
        >>> import tempfile
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> stored = save(tempfile.mkdtemp(), network, torch.rand(3, 8, 8), "output", "RM2")
        >>> stored.to_xarray()["image"].sizes["patch_row"], bool(stored.relative_error().abs().max() < 1e-3)
        (3, True)
    """
    query = Query.of(network, x, layer, mode, units, own_bias, scale, dtype, method, memory)
    return write(path, stream(query), report)


def write(
    path: Path | str, work: Stream, report: Callable[[float], None] = lambda share: None
) -> "StoredPlanes":
    """Compute a stream of hyperplanes into a folder, see :func:`save`.

    Raises:
        ValueError: If the folder holds something else, or its blocks are larger than the memory of the stream.
        OSError: If the disk is full, or another process writes to the folder.
    """
    path = Path(path)
    with disk.hold_folder(path):
        draft = _continued(path, work)
        for folder in path.rglob("*/"):
            disk.remove_partial(folder)
        return _write(path, draft, report)


def _write(path: Path, draft: Draft, report: Callable[[float], None]) -> "StoredPlanes":
    """Compute a draft's stream into a folder that no other process writes to.

    Raises:
        DiskFull: If the disk is full.
    """
    work = draft.work
    stored = StoredPlanes(path)
    finished = 0.0
    try:
        put_record(record_path(path, METADATA), draft.put(path))
        manifest = stored.manifest
        for number, (block, record) in enumerate(
            zip(draft.work.blocks, manifest.records[1:], strict=True), 1
        ):
            if manifest.damaged(record):
                put_record(record, draft.put_block(path, block, draft.work.compute(block)))
            finished = number / len(draft.work.blocks)
            report(finished)
    except disk.DiskFull as error:
        left = (1 - finished) * prod(work.shape) * work.query.bytes_each / 2**20
        advice = "make room and run the same again, which keeps the blocks that are finished"
        raise disk.DiskFull(path, advice, left) from error
    return stored


def open(path: Path | str) -> "StoredPlanes":
    """Open what :func:`save` wrote; arrays are read when they are used.

    Every file that the store must have is there and has its size, or this raises. Its bytes are compared with its checksum
    when they are read: a damaged chunk raises then, and the message names it.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: If it is not complete, a file is missing or damaged, or a link leads out of it.
    """
    stored = StoredPlanes(Path(path))
    record = record_path(stored.path, METADATA)
    if not metadata_of(stored.path) and not record.is_file():
        msg = (
            f"path must be a folder that save or the command map wrote. Got {path}, which is none."
        )
        raise FileNotFoundError(msg)
    refuse_links(stored.path)
    seals = read_record(record)
    if not metadata_of(stored.path) or (
        ROOT in seals and not is_whole(stored.path / ROOT, seals[ROOT])
    ):
        msg = (
            f"{stored.path / ROOT} must match its checksum in {record}. Got another file: {AGAIN}."
        )
        raise ValueError(msg)
    metadata, *blocks = (bool(stored.manifest.finished(record)) for record in stored.records)
    if not metadata or not all(blocks):
        msg = (
            f"The store must be complete. Got {sum(blocks):,} of {len(blocks):,} blocks in {path}: run the same save or map "
            "again, which continues it."
        )
        raise ValueError(msg)
    wrong = list(stored.manifest.wrong_sizes())
    if wrong:
        more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        msg = f"Every file of the store must be as it was written. Got {wrong[0][1]} at {wrong[0][0]}{more}: {AGAIN}."
        raise ValueError(msg)
    return stored


@dataclass(frozen=True)
class StoredPlanes:
    """Hyperplanes in a store on disk: made by :func:`save` and :func:`open`.

    Attributes:
        path: Folder of the store.
    """

    path: Path

    @property
    def attributes(self) -> dict[str, Any]:
        """What made the hyperplanes: weights, versions, layer, mode, k, dtype, where each bias lies in b; and the blocks."""
        return self.manifest.attributes

    @cached_property
    def manifest(self) -> Manifest:
        """Which files the store must have.

        Raises:
            FileNotFoundError: If there is no store.
        """
        found = metadata_of(self.path)
        if not found:
            msg = f"path must be a folder that save or the command map wrote. Got {self.path}, which is none."
            raise FileNotFoundError(msg)
        return Manifest(self.path, found)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions of images and units."""
        return ("n", *self.attributes["unit dimensions"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Images and units, ``(N, *units)``."""
        return tuple(self.attributes["shape"])

    @property
    def value(self) -> Tensor:
        """What the untouched model computes for the units, ``(N, *units)``."""
        return _tensor(self._data["value"])

    @property
    def x(self) -> Tensor:
        """The images, ``(N, C, H, W)``."""
        return _tensor(self._data["x"])

    @property
    def records(self) -> list[Path]:
        """Files with the checksums of the metadata and of each block: there is one as soon as what it names is on the disk."""
        return self.manifest.records

    def to_xarray(self) -> "xarray.Dataset":
        """The store with labelled dimensions, image parts as they are stored; nothing is read before it is used."""
        return self._data.copy()

    def planes(
        self,
        network: Network,
        units: Any = (),
        images: int | slice = slice(None),
        memory: str | float | int | None = "2GiB",
    ) -> Hyperplanes:
        """Some of the hyperplanes, read into memory, as :func:`adjointbackmap.hyperplanes` gives them.

        Args:
            network: The network that they were computed of.
            units: An int or slice along each of the stored unit dimensions, or of the first of them; all if left out.
            images: Which images.
            memory: Bytes that dense image parts may take.

        Raises:
            ValueError: If the network has other weights.
        """
        self._check(network)
        key = (
            slice(images, images + 1) if isinstance(images, int) else images,
            *(units if isinstance(units, tuple) else (units,)),
        )
        return self._planes(key, network, bytes_of(memory))

    def iter_planes(
        self, network: Network, memory: str | float | int | None = "2GiB"
    ) -> Iterator[Hyperplanes]:
        """All hyperplanes, one chunk at a time.

        Args:
            network: The network that they were computed of.
            memory: Bytes that dense image parts of a chunk may take.

        Returns:
            An iterator over parts of the units, in order.

        Raises:
            ValueError: If the network has other weights.
        """
        self._check(network)
        return (self._planes(tile, network, bytes_of(memory)) for tile in self._tiles())

    def reconstruct(self, x: Tensor | None = None) -> Tensor:
        r"""The inner product :math:`\langle [x; b] | H \rangle`, ``(N, *units)``, one chunk at a time.

        Args:
            x: Images ``(N, C, H, W)``, or one ``(C, H, W)`` for all; by default those of the hyperplanes.

        Raises:
            ValueError: If the shape does not fit.
        """
        own = self.x
        images = own if x is None else x
        whole = own.new_zeros(self.shape)
        b = _tensor(self._data["b"])
        if images.shape not in (own.shape, own.shape[1:]):
            msg = f"x must have shape {tuple(own.shape[1:])} or {tuple(own.shape)}. Got {tuple(images.shape)}."
            raise ValueError(msg)
        images = images.to(own).expand(own.shape)
        for tile in self._tiles():
            part = self._part(tile)
            whole[tile] = _inner(self._image(part), images[tile[0]]) + (
                _tensor(part["bias"]) * b
            ).sum(-1)
        return whole

    def relative_error(self) -> Tensor:
        """Signed relative error of the reconstruction [Wan2022, eq. 3.29], ``(N, *units)``."""
        return relative_error(self.reconstruct(), self.value)

    def damaged(self) -> list[str]:
        """Files that are missing or do not match their checksums; the same :func:`save` again computes them anew."""
        return [name for record in self.records for name in self.manifest.damaged(record)]

    @cached_property
    def _data(self) -> "xarray.Dataset":
        import xarray

        return xarray.open_zarr(CheckedStore(self.path, self.manifest.seals), chunks=None)

    def _tiles(self) -> list[Block]:
        return tiles(
            [slice(0, extent) for extent in self.shape], self._data["value"].encoding["chunks"]
        )

    def _part(self, key: tuple[int | slice, ...]) -> "xarray.Dataset":
        return self._data.isel(dict(zip(self.dims, key, strict=False))).load()

    def _image(
        self, part: "xarray.Dataset", device: torch.device | str = "cpu"
    ) -> Tensor | Patches:
        values = _tensor(part["image"]).to(device)
        if "top" not in part:
            return values
        rows, columns = self._data["x"].shape[2:]
        return Patches(
            values,
            torch.stack([_tensor(part[name]) for name in ("top", "left")], -1),
            (rows, columns),
        )

    def _check(self, network: Network) -> None:
        if network.weights_hash() != self.attributes["weights sha256"]:
            msg = f"The network must have the weights that {self.path} was computed with. Got others: load and trace that model."
            raise ValueError(msg)

    def _planes(self, key: tuple[int | slice, ...], network: Network, memory: int) -> Hyperplanes:
        part = self._part(key)
        attributes = self.attributes
        dims: dict[str, int] = attributes["mode dimensions"]
        units = part["value"] if any("n" in part[name].dims for name in dims) else part["value"][:1]
        places = [part[name].broadcast_like(units).transpose(*units.dims).values for name in dims]
        flat = torch.from_numpy(np.ravel_multi_index(places, tuple(dims.values())))
        return Hyperplanes(
            image_part=self._image(part, network.device),
            bias_part=_tensor(part["bias"]).to(network.device),
            entries=_tensor(part["entry"]),
            value=_tensor(part["value"]).to(network.device),
            x=_tensor(part["x"]).to(network.device),
            network=network,
            layer=attributes["layer"],
            mode=attributes["mode"],
            units=Selection(dims, flat, tuple(str(name) for name in units.dims[1:])),
            own_bias=attributes["own bias"],
            scale=attributes["k"],
            memory=memory,
        )


def _tensor(array: "xarray.DataArray") -> Tensor:
    return torch.from_numpy(np.array(array.values))


def _inner(image: Tensor | Patches, x: Tensor) -> Tensor:
    if isinstance(image, Patches):
        return image.inner(x)
    axes = x.dim() - 1
    return (
        (image * x.view(len(x), *(1,) * (image.dim() - x.dim()), *x.shape[1:]))
        .flatten(-axes)
        .sum(-1)
    )


# what made them


def provenance(work: Stream) -> dict[str, Any]:
    """What makes some hyperplanes: weights, versions, images, layer, mode, units, k, dtype, and where each bias lies in b."""
    query = work.query
    return {
        "adjointbackmap": version("adjointbackmap"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "weights sha256": query.network.weights_hash(),
        "images sha256": hashlib.sha256(_bytes(query.images)).hexdigest(),
        "units sha256": hashlib.sha256(_bytes(query.units.flat)).hexdigest(),
        "layer": query.layer.name,
        "mode": query.mode,
        "own bias": query.own_bias,
        "k": query.scale,
        "dtype": str(query.dtype).removeprefix("torch."),
        "shape": list(work.shape),
        "unit dimensions": list(query.units.names),
        "mode dimensions": query.units.dims,
        "biases": {
            name: [part.slice.start, part.slice.stop] for name, part in query.network.biases.items()
        },
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _continued(path: Path, work: Stream) -> Draft:
    """A draft of the store in a folder, computed as it was begun.

    Raises:
        ValueError: If the folder holds something else, or its blocks are larger than the stream's memory.
    """
    refuse_links(path)
    found = metadata_of(path)
    seal = read_record(record_path(path, METADATA)).get(ROOT)
    if seal is not None and not is_whole(path / ROOT, seal):
        return _repaired(path, work, found, seal)
    if not found:
        if any(file.suffix != disk.PARTIAL and file.name != disk.LOCK for file in path.iterdir()):
            msg = f"path must be a new folder or a store of these hyperplanes. Got {path}, which holds other files: choose another."
            raise ValueError(msg)
        return _draft(work, _layout(work))
    attributes = found["attributes"]
    other = [name for name, value in provenance(work).items() if attributes.get(name) != value]
    if other:
        msg = f"path must be a store of the same hyperplanes. Got {path}, of other {', '.join(other)}: choose another path."
        raise ValueError(msg)
    layout = attributes[LAYOUT]
    if layout["memory"] > work.memory:
        began = f"the {layout['memory']:,} bytes that {path} was begun with"
        msg = f"memory must be at least {began}. Got {work.memory:,}: raise memory, or choose another path."
        raise ValueError(msg)
    return _draft(work, layout)


def _repaired(path: Path, work: Stream, found: dict[str, Any], seal: Seal) -> Draft:
    """The draft of a store whose metadata is damaged: that which gives the checksum that was recorded.

    Raises:
        ValueError: If no draft of these arguments does.
    """
    layout = _layout(work)
    older = {key: value for key, value in layout.items() if key != "checksum"}
    for draft in (_draft(work, layout), _draft(work, older)):
        # the second: the record is damaged, not the metadata
        if draft.root.sha256 == seal.sha256 or is_whole(path / ROOT, draft.root):
            return draft
    kept = found["attributes"][LAYOUT] if found else {}
    if kept.keys() >= older.keys():  # begun with other memory, and damaged elsewhere
        draft = _draft(work, kept)
        if draft.root.sha256 == seal.sha256:
            return draft
    msg = (
        f"{path / ROOT} must match its checksum. Got a damaged file: run the save or map that began the store, with the same "
        "arguments, memory too, which repairs it; or choose another path."
    )
    raise ValueError(msg)


def _layout(work: Stream) -> dict[str, Any]:
    """How a new store is computed."""
    return {
        "method": work.method,
        "memory": work.memory,
        "shape": list(work.block),
        "checksum": CHECKSUM,
    }


def _draft(work: Stream, layout: dict[str, Any]) -> Draft:
    begun = work.begun(layout["method"], layout["memory"], tuple(layout["shape"]))
    return Draft(begun, {**provenance(work), LAYOUT: layout})
