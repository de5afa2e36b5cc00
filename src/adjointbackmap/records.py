"""Results of finished images in a file of one JSON line each, so that a stopped run goes on where it was."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adjointbackmap import disk


class Record:
    """A file of results by name, which only grows; its first line tells the job that they belong to.

    Attributes:
        path: The file; the first result makes it.
        job: What makes the results, as JSON can hold it.
        names: Names of the results that are there.

    Raises:
        ValueError: If the file is that of another job, or damaged in its midst.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Record(Path(folder) / "kept.jsonl", {"k": 0.125}).append("8a3f", {"units": 10})
        ...     dict(Record(Path(folder) / "kept.jsonl", {"k": 0.125}).results())
        {'8a3f': {'units': 10}}
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path, self.job = path, job
        if path.exists():
            self._check_job()
            _drop_half_line(path)
        self.names = {name for name, _ in self.results()}

    def results(self) -> Iterator[tuple[str, Any]]:
        """Name and result of each line, each name once."""
        seen: set[str] = set()
        for entry in self._entries():
            if entry["name"] not in seen:
                seen.add(entry["name"])
                yield entry["name"], entry["result"]

    def append(self, name: str, result: Any) -> None:
        """Write a result to the disk: after this call no crash loses it.

        Raises:
            DiskFull: If there is no room; finished results stay.
        """
        new = not self.path.exists() or not self.path.stat().st_size
        disk.append(self.path, (_line({"job": self.job}) if new else "") + _line({"name": name, "result": result}))
        self.names.add(name)

    def _entries(self) -> Iterator[dict[str, Any]]:
        """The lines after the first.

        Raises:
            ValueError: If one is no JSON.
        """
        if not self.path.exists():
            return
        with self.path.open() as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    msg = (
                        f"{self.path} must hold one JSON object a line. Got none in line {number}: delete that line, or the file."
                    )
                    raise ValueError(msg) from error
                if number > 1:
                    yield entry

    def _check_job(self) -> None:
        """Hold the first line against the job.

        Raises:
            ValueError: If it is that of another one.
        """
        with self.path.open("rb") as file:
            first = file.readline()
        if not first.endswith(b"\n") and _line({"job": self.job}).encode().startswith(first):
            return  # a crash within the first line
        kept = _job_in(first)
        other = differences(kept, self.job)
        if other:
            got = f"those of another ({other})" if kept else "something else"
            msg = f"{self.path} must hold results of this job. Got {got}: name another file."
            raise ValueError(msg)


def differences(kept: dict[str, Any], asked: dict[str, Any]) -> str:
    """What differs in kept settings from those that are asked for, in short; empty if nothing does.

    Args:
        kept: Settings of results that are there.
        asked: Settings of a run.

    Example:
        >>> differences({"k": 0.125, "seed": 0}, {"k": 1.0, "seed": 0})
        'k 0.125, not 1.0'
    """
    other = [key for key in asked | kept if kept.get(key) != asked.get(key)]
    return "; ".join(f"{key} {_short(kept.get(key))}, not {_short(asked.get(key))}" for key in other)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _job_in(line: bytes) -> dict[str, Any]:
    """The job that a first line tells; none where it is no record's."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry.get("job", {}) if isinstance(entry, dict) else {}


def _drop_half_line(path: Path) -> None:
    """Cut off what a crash left of a last line."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
