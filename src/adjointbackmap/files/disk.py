"""Files on disk: written as a whole, and by one process at a time.

A file is flushed to the disk before it gets its name.
"""

import errno
import json
import os
import platform
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np

PARTIAL = ".partial"  # suffix of a file while it is written
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no quota, larger than allowed
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems that cannot lock
# A file takes seconds to write. An older partial file has no process any more.
STALE_SECONDS = 3600
# The end of a partial file's name: machine, process and thread that write it.
OURS = re.compile(r"\.(?P<host>[\w-]*)\.(?P<pid>\d+)\.\d+" + re.escape(PARTIAL) + "$")


class DiskFull(OSError):
    """A file has no room on its disk.

    Args:
        path: The file or folder.
        advice: End of the message: what to do.
        megabytes: Most MiB that are still to be written, if that is known.
    """

    def __init__(
        self,
        path: Path,
        advice: str = "make room and run the same again, which keeps what is finished",
        megabytes: float | None = None,
    ) -> None:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 2**20
        wanted = "" if megabytes is None else f", at most {megabytes:,.1f} MiB more"
        super().__init__(
            f"The disk must have room for {path}{wanted}. Got {free:,.1f} MiB free: {advice}."
        )


def write(path: Path, content: bytes | str) -> Path:
    """Write a file. It is complete and on the disk before it gets its name.

    An earlier file of this name is replaced.

    Args:
        path: The file; missing folders are made.
        content: The whole content.

    Returns:
        The path.

    Raises:
        DiskFull: If there is no room. An earlier file stays, and the new one is removed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write(Path(folder) / "new" / "note.txt", "a note").read_text()
        'a note'
    """
    data = content.encode() if isinstance(content, str) else content
    writer = f"{host_name()}.{os.getpid()}.{threading.get_native_id()}"
    partial = path.with_name(f"{path.name}.{writer}{PARTIAL}")
    refuse_folder(path)
    with naming(path):
        _make(path.parent)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            flush_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    return path


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, and flush it to the disk.

    Args:
        path: The file; it is made if it is missing.
        text: The text.

    Raises:
        OSError: If the disk is full, :class:`DiskFull`, or fails. The file is then as it was.
    """
    refuse_folder(path)
    with naming(path):
        _make(path.parent)
        new = not path.exists()
        before = 0 if new else path.stat().st_size
        try:
            with path.open("ab", buffering=0) as file:
                rest = memoryview(text.encode())
                while rest:  # a disk that becomes full may write a part only
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise
        if new:
            flush_folder(path.parent)


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a compressed NPZ file.

    Args:
        arrays: Name -> array.
    """
    content = BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the disk in the block the name of the file that is written.

    Args:
        path: The file.

    Raises:
        DiskFull: If the disk is full.
        OSError: Any other error of the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL and not isinstance(error, DiskFull):
            raise DiskFull(path) from error
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def refuse_folder(path: Path) -> None:
    """Check that no folder has the name of a file that is to be written.

    Raises:
        IsADirectoryError: If there is one.
    """
    if path.is_dir():
        msg = f"{path} must be a file. Got a folder: remove it, or name another file."
        raise IsADirectoryError(msg)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk.

    Raises:
        OSError: If the disk fails.
    """
    if os.name == "nt":  # Windows opens no folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems whose folders are flushed with their files
            raise
    finally:
        os.close(handle)


def _make(folder: Path) -> None:
    """Make a folder and missing folders above it, and flush their names to the disk.

    Raises:
        NotADirectoryError: If there is a file of this name.
    """
    if folder.is_dir():
        return
    if folder.exists():
        msg = f"{folder} must be a folder. Got a file: name another."
        raise NotADirectoryError(msg)
    _make(folder.parent)
    with suppress(FileExistsError):  # another process made it
        folder.mkdir()
    flush_folder(folder.parent)


# one process at a time


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder during the block.

    Partial files of killed processes are removed.

    Args:
        folder: The folder in which the block writes; it is made if it is missing.

    Raises:
        BlockingIOError: If another process holds the folder; the message names the process.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, hold_folder(Path(folder)):
        ...     [path.name for path in Path(folder).iterdir()]
        ['.lock']
    """
    _make(folder)
    with _hold(folder / LOCK, folder, "folder"):
        remove_partial(folder)
        yield


@contextmanager
def hold_file(path: Path) -> Iterator[None]:
    """Keep other processes from writing a file during the block, see :func:`hold_folder`.

    Args:
        path: The file; the lock is in the same folder.

    Raises:
        BlockingIOError: If another process holds the file.
    """
    _make(path.parent)
    with _hold(path.with_name(path.name + LOCK), path, "file"):
        remove_partial(path.parent, path.name)
        yield


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove the partial files of killed processes from a folder, not from the folders in it.

    Args:
        folder: The folder.
        name: Name of a file, to remove only its partial files.
    """
    for path in folder.iterdir():
        match = OURS.search(path.name)
        if match is None or name not in ("", path.name[: match.start()]):
            continue
        if _abandoned(path, match["host"], int(match["pid"])):
            path.unlink(missing_ok=True)


def _abandoned(partial: Path, host: str, pid: int) -> bool:
    """Whether no process writes a partial file any more."""
    if host == host_name() and not _alive(pid):
        return True
    with suppress(FileNotFoundError):
        return time.time() - partial.stat().st_mtime > STALE_SECONDS
    return False


def _alive(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    if os.name == "nt":  # there a signal of 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def host_name() -> str:
    """Name of this machine, as it stands in the name of a partial file."""
    return re.sub(r"[^\w-]", "-", platform.node())


@contextmanager
def _hold(lock: Path, what: Path, kind: str) -> Iterator[None]:
    """Lock a file during the block.

    The system unlocks the file when the process ends, even if it is killed.

    Args:
        lock: The file to lock.
        what: The file or folder that the lock protects.
        kind: ``"file"`` or ``"folder"``, for the message.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If the disk fails.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock, fallback_to_soft=False)
    try:
        with naming(what):
            held.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(_in_use(lock, what, kind)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{what} is on a disk that cannot lock: let one process at a time write there.",
            stacklevel=4,
        )
    try:
        if held.is_locked:
            holder = {
                "pid": os.getpid(),
                "host": platform.node(),
                "since": time.strftime("%F %T"),
            }
            with suppress(OSError):  # on a full disk the lock holds without the name of its holder
                lock.write_text(json.dumps(holder))
        yield
    finally:
        # Removed while it is locked: another process can then never lock a file that is removed
        # later. It finds no file, and makes a new one.
        with suppress(OSError):
            lock.unlink()
        held.release()


def _in_use(lock: Path, what: Path, kind: str) -> str:
    """The message that another process holds a lock."""
    try:
        holder = json.loads(lock.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{what} must be written by one process at a time. "
        f"It is in use by {who}: wait for it, or name another {kind}."
    )
