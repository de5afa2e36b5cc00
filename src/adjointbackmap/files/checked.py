"""Files with checksums: a damaged file is found when it is read.

The message is one sentence that names the file and says what to do.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"  # key of our JSON files: the SHA-256 of all other keys
HASH_LIST = "SHA256SUMS"  # the file that `sha256sum * > SHA256SUMS` writes
OF_FILE = "file sha256"  # key of a card: the SHA-256 of the file that the card describes


class DamagedFile(ValueError):
    """A file is not as it was written. The message names it and says what to do."""


class DamagedFileWarning(UserWarning):
    """A damaged file or line is not used, and its content is computed again."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(content: Any) -> str:
    """SHA-256 of a value that JSON can hold.

    It is the same before the value is written and after it is read.

    Example:
        >>> checksum({"error": 0.1 + 0.2}) == checksum(json.loads(json.dumps({"error": 0.1 + 0.2})))
        True
    """
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its checksum as the last key.

    Example:
        >>> list(sealed({"units": 10}))
        ['units', 'checksum']
    """
    rest = json.loads(json.dumps({key: value for key, value in found.items() if key != CHECKSUM}))
    return {**rest, CHECKSUM: checksum(rest)}


def read_sealed(path: Path, advice: str = "make it again") -> dict[str, Any]:
    """The content of a JSON file, without its checksum.

    Files of older versions have no checksum.

    Args:
        path: The file.
        advice: End of the message: what to do with a damaged file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFile: If it is no JSON object, or does not match its checksum.
    """
    if not path.is_file():
        msg = f"{path} must be a file. Got none: {advice}."
        raise FileNotFoundError(msg)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        msg = f"{path} must hold JSON. Got a damaged file ({shortened(error)}): {advice}."
        raise DamagedFile(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} must hold a JSON object. Got {type(found).__name__}: {advice}."
        raise DamagedFile(msg)
    expected = found.pop(CHECKSUM, None)
    if expected is not None and expected != checksum(found):
        msg = f"{path} must match the checksum in it. Got a damaged or edited file: {advice}."
        raise DamagedFile(msg)
    return found


def sealed_text(found: Mapping[str, Any], indent: int = 1) -> str:
    """The text of a JSON file with its checksum."""
    return json.dumps(sealed(found), indent=indent) + "\n"


def read_or_set_aside(path: Path, first_key: str | None = None) -> dict[str, Any] | None:
    """The content of a JSON file of ours; ``None`` if there is no file, or a damaged one.

    A damaged file is renamed to ``NAME.damaged``, with a warning. Nothing is lost, and the file can
    be made again.

    Args:
        path: The file.
        first_key: The first key of our files. Give it if a file of this name may be someone else's.

    Raises:
        DamagedFile: If it is damaged and does not begin with the first key.
    """
    if not path.exists():
        return None
    try:
        return read_sealed(path, "delete it or name another")
    except DamagedFile as error:
        begin = b"".join(path.read_bytes()[:100].split())  # without white space
        if first_key and begin and not begin.startswith(f'{{"{first_key}":'.encode()):
            raise
        set_aside(path, error)
        return None


def set_aside(path: Path, reason: object) -> None:
    """Rename a damaged file to ``NAME.damaged``, and warn that it is made again.

    Args:
        path: The file.
        reason: Why it counts as damaged, for the warning.
    """
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    msg = (
        f"{path} is damaged, so that it is made again; the damaged file is now {aside.name} "
        f"({shortened(str(reason), 200)})"
    )
    warnings.warn(msg, DamagedFileWarning, stacklevel=3)


def check_file(path: Path) -> None:
    """Compare a file with its checksums in the same folder.

    These are in its card, ``NAME.json``, and in a list, ``SHA256SUMS``, if there are any.

    Raises:
        DamagedFile: If a checksum differs, or the card or the list is damaged.
    """
    card = path.with_suffix(".json")
    listed = path.with_name(HASH_LIST)
    known = {}
    if card != path and card.is_file():
        known[card] = read_sealed(card, "fetch or make it again, or delete it").get(OF_FILE)
    if listed.is_file():
        known[listed] = _hashes(listed).get(path.name)
    for source, expected in known.items():
        if expected is not None:
            compare(sha256_of(path), expected, path, str(source))


def compare(
    found: str, expected: str, path: Path | str, source: str, advice: str = "fetch or make it again"
) -> None:
    """Compare the SHA-256 of a file with the expected one.

    Args:
        found: SHA-256 of the file.
        expected: The SHA-256 that it must have.
        path: The file.
        source: Where the expected SHA-256 is from, for the message.
        advice: End of the message: what to do.

    Raises:
        DamagedFile: If they differ.
    """
    if found != expected:
        msg = (
            f"{path} must have the SHA-256 that {source} says. "
            f"Got another one: the file is damaged, {advice}."
        )
        raise DamagedFile(msg)


def shortened(error: BaseException | str, most: int = 100) -> str:
    """A message on one line, cut off if it is long.

    Args:
        error: The message, or an error that has it.
        most: Most characters.

    Example:
        >>> shortened("one  two " + 100 * "x", 20)
        'one two xxxxxxxxx...'
    """
    line = " ".join(str(error).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _hashes(listed: Path) -> dict[str, str]:
    """File -> SHA-256, from a list that sha256sum wrote.

    Raises:
        DamagedFile: If a line has another form.
    """
    found = {}
    for number, line in enumerate(listed.read_text(errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            msg = (
                f"{listed} must have lines of sha256sum. "
                f"Got {shortened(line, 40)!r} in line {number}: make it again."
            )
            raise DamagedFile(msg)
        found[match[2].removeprefix("./")] = match[1]
    return found
