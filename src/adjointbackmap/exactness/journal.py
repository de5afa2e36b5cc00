"""A file with the results of finished images, one JSON line for each.

A run that was stopped reads it and continues.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from adjointbackmap.files import disk
from adjointbackmap.files.checked import CHECKSUM, DamagedFileWarning, checksum

MOST_LINES_NAMED = 10  # most damaged lines whose numbers are in a warning
LONGEST_SETTING = 40  # most characters of a setting in a message
FIRST_SHOWN = 12  # characters of a longer setting that are shown; enough to identify a checksum

ResultCheck = Callable[[str, Any], None]
"""Raises a ValueError if the result of this name cannot be right."""


class Record:
    """A file of results with names, to which lines are only added.

    Its first line is the job: the settings that make the results.

    Each line has a checksum of the job, the name and the result. A line that does not match its
    checksum is left out, with a warning that names it. Its result is then missing and is computed
    again. Lines of older versions have no checksum. They are taken as they are, with a warning, if
    ``check`` accepts them.

    Attributes:
        path: The file; it is made with the first result.
        job: The settings that make the results, as JSON can hold them.
        names: Names of the results in the file.

    Args:
        path: The file.
        job: The settings that make the results.
        check: Called with name and result of each line. It raises a ValueError with the reason if
            they cannot be right.

    Raises:
        ValueError: If the file is that of another job, or no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Record(Path(folder) / "kept.jsonl", {"k": 0.125}).append("8a3f", {"units": 10})
        ...     dict(Record(Path(folder) / "kept.jsonl", {"k": 0.125}).results())
        {'8a3f': {'units': 10}}
    """

    def __init__(
        self, path: Path, job: dict[str, Any], check: ResultCheck = lambda name, result: None
    ) -> None:
        disk.refuse_folder(path)
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
        """Write a result to the disk. After this call no crash loses it.

        Args:
            name: Name of the result.
            result: The result, as JSON can hold it.

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
        has_keys = {"name", "result"} <= entry.keys() <= {"name", "result", CHECKSUM}
        if not has_keys or not isinstance(entry["name"], str):
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
        """Compare the first line with the job.

        Returns:
            Empty, or line number 1 and what is wrong with it. The line may be damaged if other
            lines have the checksum of this job.

        Raises:
            ValueError: If the file is that of another job, or no such file.
        """
        with self.path.open("rb") as file:
            first = file.readline()
        if not first.endswith(b"\n") and self._first_line().encode().startswith(first):
            return {}  # a crash cut off the first line
        entry: dict[str, Any] = {}
        with suppress(ValueError):
            entry = _object(first)
        kept = entry.get("job")
        kept = kept if isinstance(kept, dict) and entry.keys() <= {"job", CHECKSUM} else {}
        damaged = not kept or entry.get(CHECKSUM, checksum(kept)) != checksum(kept)
        if damaged and any(self._is_ours(line) for _, line in self._lines()):
            return {1: "is damaged, but the others are of this job"}
        other = "" if damaged else setting_differences(kept, self.job)
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
        """Warn of lines that are left out, and of lines without a checksum.

        Args:
            bad: Number of a line that is left out -> what is wrong with it.
            plain: Number of lines without a checksum.
        """
        if bad:
            first, reason = next(iter(bad.items()))
            others = ", ".join(map(str, list(bad)[1:MOST_LINES_NAMED]))
            cut = "..." if len(bad) > MOST_LINES_NAMED else ""
            more = f" (also line {others}{cut})" if len(bad) > 1 else ""
            msg = (
                f"{self.path}: line {first} {reason}{more}. It is left out, and its result is "
                "computed again; delete the line to be rid of this warning."
            )
            warnings.warn(msg, DamagedFileWarning, stacklevel=3)
        if plain:
            msg = (
                f"{self.path} is of an older version: {plain} of its lines have no checksum and "
                "are taken as they are; delete the file to compute them again."
            )
            warnings.warn(msg, DamagedFileWarning, stacklevel=3)


def setting_differences(kept: dict[str, Any], asked: dict[str, Any]) -> str:
    """Differences between the settings of kept results and those of a run, in short.

    The text is empty if there is none.

    Args:
        kept: Settings of the kept results.
        asked: Settings of the run.

    Example:
        >>> setting_differences({"k": 0.125, "seed": 0}, {"k": 1.0, "seed": 0})
        'k 0.125, not 1.0'
    """
    pairs = {key: (kept.get(key), asked.get(key)) for key in asked | kept}
    differ = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return "; ".join(
        f"{key} {_short(was)}, not {_short(wanted)}" for key, (was, wanted) in differ.items()
    )


def _line(entry: dict[str, Any]) -> str:
    """A dict as a line of JSON."""
    return json.dumps(entry) + "\n"


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: If the line is none.
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
    """Remove a last line that a crash cut off."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _short(value: Any) -> str:
    """A setting in a message; of a long one, such as a checksum, the first characters."""
    text = str(value)
    return text if len(text) <= LONGEST_SETTING else f"{text[:FIRST_SHOWN]}..."
