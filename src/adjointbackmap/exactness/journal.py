"""Results of finished images in a file of one JSON line each, so that a stopped run goes on where it was."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from adjointbackmap.files import disk
from adjointbackmap.files.checked import CHECKSUM, DamagedFileWarning, checksum

MOST_NAMED = 10  # damaged lines in a warning

Check = Callable[[str, Any], None]
"""Raises a ValueError where a result of this name cannot be."""


class Record:
    """A file of results by name, which only grows; its first line says the job that they belong to.

    Each line has a checksum of the job, the name and the result. A line that does not match it is left out, with a warning that
    names it: its result is missing here, so that it is computed again. The lines of older versions have no checksum: they are
    taken as they are, with a warning, if ``check`` lets them pass.

    Attributes:
        path: The file; the first result makes it.
        job: What makes the results, as JSON can hold it.
        names: Names of the results that are there.

    Args:
        path: The file.
        job: What makes the results.
        check: Called with name and result of each line; raises a ValueError, which says why, where they cannot be.

    Raises:
        ValueError: If the file is that of another job, or no record.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Record(Path(folder) / "kept.jsonl", {"k": 0.125}).append("8a3f", {"units": 10})
        ...     dict(Record(Path(folder) / "kept.jsonl", {"k": 0.125}).results())
        {'8a3f': {'units': 10}}
    """

    def __init__(
        self, path: Path, job: dict[str, Any], check: Check = lambda name, result: None
    ) -> None:
        self.path = path
        self.job = job
        self._check = check
        self._older = False
        bad: dict[int, str] = {}
        if path.exists():
            bad = self._check_first_line()
            _drop_half_line(path)
        self.names: set[str] = set()
        plain = 0
        for number, line in self._lines():
            try:
                name, _ = self._parsed(line)
            except ValueError as error:
                bad[number] = str(error)
            else:
                self.names.add(name)
                plain += self._older and CHECKSUM.encode() not in line
        self._warn(bad, plain)

    def results(self) -> Iterator[tuple[str, Any]]:
        """Name and result of each line, each name once."""
        seen: set[str] = set()
        for _, line in self._lines():
            with suppress(ValueError):
                name, result = self._parsed(line)
                if name not in seen:
                    seen.add(name)
                    yield name, result

    def append(self, name: str, result: Any) -> None:
        """Write a result to the disk: after this call no crash loses it.

        Raises:
            DiskFull: If there is no room; finished results stay.
        """
        new = not self.path.exists() or not self.path.stat().st_size
        line = _line({"name": name, "result": result, CHECKSUM: self._checksum(name, result)})
        disk.append(self.path, (self._first_line() if new else "") + line)
        self.names.add(name)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line after the first."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.readline()
                yield from enumerate(file, start=2)

    def _parsed(self, line: bytes) -> tuple[str, Any]:
        """Name and result of a line.

        Raises:
            ValueError: If it is damaged.
        """
        entry = _object(line)
        if not {"name", "result"} <= entry.keys() <= {"name", "result", CHECKSUM} or not isinstance(
            entry["name"], str
        ):
            msg = "is no result"
            raise ValueError(msg)
        name = entry["name"]
        result = entry["result"]
        if CHECKSUM not in entry and not self._older:
            msg = "has no checksum"
            raise ValueError(msg)
        if CHECKSUM in entry and entry[CHECKSUM] != self._checksum(name, result):
            msg = "does not match its checksum"
            raise ValueError(msg)
        try:
            self._check(name, result)
        except ValueError as error:
            msg = f"cannot be right: {error}"
            raise ValueError(msg) from error
        return name, result

    def _checksum(self, name: str, result: Any) -> str:
        return checksum([self.job, name, result])

    def _first_line(self) -> str:
        return _line({"job": self.job, CHECKSUM: checksum(self.job)})

    def _check_first_line(self) -> dict[int, str]:
        """Compare the first line with the job; 1 and what is wrong, where it is damaged and the file is yet this job's.

        Raises:
            ValueError: If the file is that of another job, or no record.
        """
        with self.path.open("rb") as file:
            first = file.readline()
        if not first.endswith(b"\n") and self._first_line().encode().startswith(first):
            return {}  # a crash within the first line
        entry: dict[str, Any] = {}
        with suppress(ValueError):
            entry = _object(first)
        kept = entry.get("job")
        kept = kept if isinstance(kept, dict) and entry.keys() <= {"job", CHECKSUM} else {}
        damaged = not kept or entry.get(CHECKSUM, checksum(kept)) != checksum(kept)
        if damaged and any(self._is_ours(line) for _, line in self._lines()):
            return {1: "is damaged, but the others are of this job"}
        other = "" if damaged else differences(kept, self.job)
        if damaged or other:
            got = f"those of another ({other})" if other else "something else"
            msg = f"{self.path} must hold results of this job. Got {got}: name another file."
            raise ValueError(msg)
        self._older = CHECKSUM not in entry
        return {}

    def _is_ours(self, line: bytes) -> bool:
        """Whether a line has the checksum of this job."""
        with suppress(ValueError):
            return CHECKSUM in _object(line) and bool(self._parsed(line))
        return False

    def _warn(self, bad: dict[int, str], plain: int) -> None:
        """Say which lines are left out, and which have no checksum."""
        if bad:
            first, reason = next(iter(bad.items()))
            more = f" (also line {', '.join(map(str, list(bad)[1:MOST_NAMED]))}{'...' if len(bad) > MOST_NAMED else ''})"
            msg = (
                f"{self.path}: line {first} {reason}{more if len(bad) > 1 else ''}. It is left out, and its result is computed "
                "again; delete the line to be rid of this warning."
            )
            warnings.warn(msg, DamagedFileWarning, stacklevel=3)
        if plain:
            msg = (
                f"{self.path} is of an older version: {plain} of its lines have no checksum and are taken as they are; delete "
                "the file to compute them again."
            )
            warnings.warn(msg, DamagedFileWarning, stacklevel=3)


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
    return "; ".join(
        f"{key} {_short(kept.get(key))}, not {_short(asked.get(key))}" for key in other
    )


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: If it has none.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        msg = "is no JSON object"
        raise ValueError(msg)
    return entry


def _drop_half_line(path: Path) -> None:
    """Cut off what a crash left of a last line."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
