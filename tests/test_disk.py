"""Files are whole or absent and have one writer; a stopped run keeps its finished part."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from adjointbackmap.exactness.journal import Record
from adjointbackmap.files import disk
from adjointbackmap.files.stopping import Stopped, stoppable, undivided

ABANDONED = (
    f".{disk.host_name()}.99999999.1{disk.PARTIAL}"  # as a process has left it that is no more
)
HOLD = """
import sys, time
from pathlib import Path
from adjointbackmap.files.disk import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def program(*words):
    """A Python process of its own that has said its first line; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# whole files


def test_a_file_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """First its content, then its name in the folder; the folders that were made for it too."""
    seen = []
    flush = os.fsync
    replace = Path.replace

    def fsync(handle):
        seen.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(
        Path, "replace", lambda self, other: seen.append("renamed") or replace(self, other)
    )
    path = disk.write(tmp_path / "new" / "folder" / "note.txt", "a note")
    folders = [str(tmp_path), str(tmp_path / "new")]
    partial = (
        str(path) + f".{disk.host_name()}.{os.getpid()}.{threading.get_native_id()}{disk.PARTIAL}"
    )
    assert seen == [*folders, partial, "renamed", str(path.parent)]
    assert [file.name for file in path.parent.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()],
    ids=["broken", "stopped"],
)
def test_what_fails_leaves_the_earlier_file(tmp_path, monkeypatch, error):
    """And nothing of the new one; the error names the file."""
    path = disk.write(tmp_path / "note.txt", "a note")

    def fail(handle):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as caught:
        disk.write(path, "another note")
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]
    assert path.read_text() == "a note"
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)


def test_two_writers_of_one_file(tmp_path):
    """Each writes all of its own; one of them is there in the end."""
    contents = [bytes([n]) * 200_000 for n in range(4)]
    threads = [
        threading.Thread(target=lambda c=c: [disk.write(tmp_path / "a", c) for _ in range(20)])
        for c in contents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "a").exists() or (tmp_path / "a").read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    """As expected and as it is."""
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError, match=r"a must be a folder. Got a file: name another"):
        disk.write(tmp_path / "a" / "b", "")


@pytest.mark.parametrize(
    "use",
    [
        lambda path: disk.write(path, "a"),
        lambda path: disk.append(path, "a"),
        lambda path: Record(path, {}),
    ],
)
def test_a_file_that_is_a_folder_is_named(tmp_path, use):
    """In one sentence; nothing is left of the new file."""
    (tmp_path / "kept").mkdir()
    with pytest.raises(IsADirectoryError, match=r"kept must be a file\. Got a folder: remove it"):
        use(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_arrays_are_read_back(tmp_path):
    """The bytes are those of an NPZ file."""
    path = disk.write(tmp_path / "a.npz", disk.npz({"a": np.arange(3)}))
    assert np.load(path)["a"].tolist() == [0, 1, 2]


# a full disk


def test_a_full_disk_keeps_the_earlier_file(small_disk):
    """The path, what is free, and what to do."""
    path = disk.write(small_disk / "a", b"a" * 100_000)
    with pytest.raises(
        disk.DiskFull,
        match=rf"must have room for {path}\. Got 0\.\d MiB free: make room and run the same again",
    ):
        disk.write(path, os.urandom(300_000))
    assert path.read_bytes() == b"a" * 100_000
    assert [file.name for file in small_disk.iterdir()] == ["a"]


def test_a_full_disk_keeps_finished_results(small_disk):
    """A record has no half line; with room it goes on."""
    record = Record(small_disk / "kept.jsonl", {"k": 1})

    def fill():
        for n in range(100):
            record.append(str(n), "x" * 10_000)

    with pytest.raises(disk.DiskFull, match=r"kept\.jsonl"):
        fill()
    again = Record(record.path, {"k": 1})
    assert len(again.names) > 20
    assert record.path.read_bytes().endswith(b"\n")
    assert dict(again.results()).keys() == record.names


def test_a_full_disk_in_the_midst_of_a_line(tmp_path, monkeypatch):
    """Without a full disk to mount: the first line is written in two parts, the second fails."""
    record = Record(tmp_path / "kept.jsonl", {"k": 1})
    record.append("a", 1)
    before = record.path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(disk.DiskFull, match=re.escape(str(record.path))):
        record.append("b", 2)
    assert record.path.read_bytes() == before
    assert record.names == {"a"}


# one process at a time


def test_a_second_process_is_told_who_is_there(tmp_path):
    """The message has its number, machine and start; a killed process's lock does not block."""
    with program(HOLD, tmp_path) as other:
        expected = (
            r"must be written by one process at a time. "
            rf"It is in use by process {other.pid} on .+, since \d{{4}}-"
        )
        with pytest.raises(BlockingIOError, match=expected), disk.hold_folder(tmp_path):
            pass
    assert (tmp_path / disk.LOCK).exists()
    with disk.hold_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_its_folder_are_held_apart(tmp_path):
    """A file of a folder that the same run holds; a second thread is told too."""
    path = tmp_path / "kept.jsonl"
    with disk.hold_folder(tmp_path), disk.hold_file(path):
        with pytest.raises(
            BlockingIOError,
            match=(
                rf"kept.jsonl must be .* process {os.getpid()} on .*: "
                r"wait for it, or name another file"
            ),
        ):
            disk.hold_file(path).__enter__()
        with disk.hold_file(tmp_path / "other.jsonl"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_many_processes_in_turn(tmp_path):
    """No two are inside at once, though each one removes the lock when it goes."""
    count = """
import sys, time
from pathlib import Path
from adjointbackmap.files.disk import hold_folder
folder, done = Path(sys.argv[1]), 0
while done < 20:
    try:
        with hold_folder(folder):
            number = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(number + 1))
        done += 1
    except BlockingIOError:
        time.sleep(0.001)
"""
    (tmp_path / "count").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", count, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    """Not those of a process that runs, nor files of the user's own."""
    running = f"b.json.{disk.host_name()}.{os.getpid()}.7{disk.PARTIAL}"
    old = f"c.json.elsewhere.1.1{disk.PARTIAL}"
    for name in (
        "a.json" + ABANDONED,
        running,
        old,
        "film.partial",
        f"d.json.elsewhere.2.2{disk.PARTIAL}",
    ):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / old, (0, 0))
    with disk.hold_folder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {
            running,
            "film.partial",
            f"d.json.elsewhere.2.2{disk.PARTIAL}",
            ".lock",
        }
    (tmp_path / ("a.json" + ABANDONED)).write_text("")
    with disk.hold_file(tmp_path / "other.json"):
        assert (tmp_path / ("a.json" + ABANDONED)).exists()


# signals


def test_sigterm_is_as_ctrl_c():
    """In a command; what was before is put back."""
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(Stopped) as stopped:
        work()
    assert stopped.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_waits_for_what_is_undivided():
    """It takes effect at the end of the block; a second one at once."""
    done = []

    def work(signals):
        with stoppable():
            with undivided():
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                done.append("all of it")
            done.append("too much")

    with pytest.raises(Stopped):
        work(1)
    assert done == ["all of it"]
    with pytest.raises(Stopped):
        work(2)
    assert done == ["all of it"]


def test_threads_take_no_signals():
    """Nor do they fail on them."""
    done = []

    def work():
        with stoppable(), undivided():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
