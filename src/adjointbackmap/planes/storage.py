"""Hyperplanes on disk, larger than memory: a store of chunked arrays, written block by block.

A run that was stopped can be continued.
"""

import hashlib
import platform
from collections.abc import Callable
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.engine.network import Network
from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.files import disk
from adjointbackmap.planes.manifest import (
    AGAIN,
    LAYOUT,
    ROOT_FILE,
    Seal,
    is_whole,
    metadata_of,
    read_record,
    record_path,
    refuse_links,
)
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.store_files import CHUNK_CHECKSUM, Draft, put_record
from adjointbackmap.planes.stored_planes import StoredPlanes
from adjointbackmap.planes.streaming import Stream, stream

# Name of the record of all files that are not written block by block.
METADATA = "metadata"


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
    pattern: ActivationPattern | None = None,
) -> StoredPlanes:
    """Compute hyperplanes into a folder. They may be larger than memory.

    The folder is a Zarr store (version 3) that xarray reads.

    The same call continues a run that was stopped, with the method and the blocks of that run.
    Blocks whose files match their checksums are kept, and all others are computed again. At the end
    the files are byte by byte those of a run that was not stopped.

    ``path`` is the folder of the store: a new folder, or a store of the same hyperplanes. The other
    arguments are those of :func:`adjointbackmap.iter_hyperplanes`. ``report`` is called with the
    share of finished blocks.

    Returns:
        The stored hyperplanes.

    Raises:
        ValueError: If an argument does not fit, the folder holds something else, or its blocks are
            larger than ``memory``.
        OSError: If the disk is full, or another process writes to the folder. Finished blocks are
            kept.

    Example:
        >>> import tempfile
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> stored = save(tempfile.mkdtemp(), network, torch.rand(3, 8, 8), "output", "RM2")
        >>> stored.to_xarray()["image"].sizes["patch_row"]
        3
        >>> bool(stored.relative_error().abs().max() < 1e-3)
        True
    """
    wanted = (mode, units, own_bias, scale, dtype, method, memory, pattern)
    return write_store(path, stream(Query.of(network, x, layer, *wanted)), report)


def write_store(
    path: Path | str, work: Stream, report: Callable[[float], None] = lambda share: None
) -> StoredPlanes:
    """Compute a stream of hyperplanes into a folder, see :func:`save`.

    Raises:
        ValueError: If the folder holds something else, or its blocks are larger than the memory of
            the stream.
        OSError: If the disk is full, or another process writes to the folder.
    """
    path = Path(path)
    with disk.hold_folder(path):
        draft = _continued(path, work)
        for folder in path.rglob("*/"):
            disk.remove_partial(folder)
        return _write_blocks(path, draft, report)


def _write_blocks(path: Path, draft: Draft, report: Callable[[float], None]) -> StoredPlanes:
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
        blocks = work.blocks
        records = manifest.records[1:]  # the first is that of the metadata
        for number, (block, record) in enumerate(zip(blocks, records, strict=True), 1):
            if manifest.damaged(record):
                put_record(record, draft.put_block(path, block, work.compute(block)))
            finished = number / len(blocks)
            report(finished)
    except disk.DiskFull as error:
        left = (1 - finished) * prod(work.shape) * work.query.bytes_each / 2**20
        advice = "make room and run the same again, which keeps the blocks that are finished"
        raise disk.DiskFull(path, advice, left) from error
    return stored


def open(path: Path | str) -> StoredPlanes:
    """Open a folder that :func:`save` wrote. Arrays are read when they are used.

    Every file of the store must be there and have its size. The bytes of a file are compared with
    its checksum when they are read: a damaged chunk raises an error at that time, which names it.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: If the store is not complete, a file is missing or damaged, or a link leads out
            of it.
    """
    stored = StoredPlanes(Path(path))
    root = stored.path / ROOT_FILE
    record = record_path(stored.path, METADATA)
    if not metadata_of(stored.path) and not record.is_file():
        msg = (
            f"path must be a folder that save or the command map wrote. Got {path}, which is none."
        )
        raise FileNotFoundError(msg)
    refuse_links(stored.path)
    seals = read_record(record)
    changed = ROOT_FILE in seals and not is_whole(root, seals[ROOT_FILE])
    if changed or not metadata_of(stored.path):
        msg = f"{root} must match its checksum in {record}. Got another file: {AGAIN}."
        raise ValueError(msg)
    metadata, *blocks = (bool(stored.manifest.finished(record)) for record in stored.records)
    if not metadata or not all(blocks):
        msg = (
            f"The store must be complete. Got {sum(blocks):,} of {len(blocks):,} blocks in {path}: "
            "run the same save or map again, which continues it."
        )
        raise ValueError(msg)
    wrong = list(stored.manifest.wrong_sizes())
    if wrong:
        where, what = wrong[0]
        more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        msg = (
            "Every file of the store must be as it was written. "
            f"Got {what} at {where}{more}: {AGAIN}."
        )
        raise ValueError(msg)
    return stored


# where hyperplanes come from, and how a run continues


def provenance(work: Stream) -> dict[str, Any]:
    """The settings that make some hyperplanes.

    These are weights, versions, images, layer, mode, units, k, dtype, and the indices of each bias
    in b.
    """
    query = work.query
    biases = query.network.biases.items()
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
        "biases": {name: [part.slice.start, part.slice.stop] for name, part in biases},
        **query.network.curved_settings,
    }


def _bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _continued(path: Path, work: Stream) -> Draft:
    """The draft of the store in a folder: a new one, or with the layout of the run that began it.

    Raises:
        ValueError: If the folder holds something else, or its blocks are larger than the memory of
            the stream.
    """
    refuse_links(path)
    found = metadata_of(path)
    seal = read_record(record_path(path, METADATA)).get(ROOT_FILE)
    if seal is not None and not is_whole(path / ROOT_FILE, seal):
        return _repaired(path, work, found, seal)
    if not found:
        if any(file.suffix != disk.PARTIAL and file.name != disk.LOCK for file in path.iterdir()):
            msg = (
                "path must be a new folder or a store of these hyperplanes. "
                f"Got {path}, which holds other files: choose another."
            )
            raise ValueError(msg)
        return _draft(work, _layout(work))
    attributes = found["attributes"]
    other = [name for name, value in provenance(work).items() if attributes.get(name) != value]
    if other:
        msg = (
            "path must be a store of the same hyperplanes. "
            f"Got {path}, of other {', '.join(other)}: choose another path."
        )
        raise ValueError(msg)
    layout = attributes[LAYOUT]
    if layout["memory"] > work.memory:
        began = f"the {layout['memory']:,} bytes that {path} was begun with"
        msg = (
            f"memory must be at least {began}. "
            f"Got {work.memory:,}: raise memory, or choose another path."
        )
        raise ValueError(msg)
    return _draft(work, layout)


def _repaired(path: Path, work: Stream, found: dict[str, Any], seal: Seal) -> Draft:
    """The draft of a store whose metadata do not match the record.

    It is the draft whose metadata have the recorded checksum. If the record is damaged and not the
    metadata, it is the draft with the metadata in the folder.

    Raises:
        ValueError: If no draft with these arguments matches.
    """
    layout = _layout(work)
    older = {key: value for key, value in layout.items() if key != "checksum"}  # of older versions
    for draft in (_draft(work, layout), _draft(work, older)):
        if draft.root.sha256 == seal.sha256 or is_whole(path / ROOT_FILE, draft.root):
            return draft
    kept = found["attributes"][LAYOUT] if found else {}
    if kept.keys() >= older.keys():  # begun with other memory, and damaged elsewhere
        draft = _draft(work, kept)
        if draft.root.sha256 == seal.sha256:
            return draft
    msg = (
        f"{path / ROOT_FILE} must match its checksum. Got a damaged file: run the save or map "
        "that began the store, with the same arguments, memory too, which repairs it; "
        "or choose another path."
    )
    raise ValueError(msg)


def _layout(work: Stream) -> dict[str, Any]:
    """The layout of a new store: the method, the memory and the blocks of its computation."""
    return {
        "method": work.method,
        "memory": work.memory,
        "shape": list(work.block),
        "checksum": CHUNK_CHECKSUM,
    }


def _draft(work: Stream, layout: dict[str, Any]) -> Draft:
    """The draft of a store with a layout."""
    begun = work.begun(layout["method"], layout["memory"], tuple(layout["shape"]))
    return Draft(begun, {**provenance(work), LAYOUT: layout})
