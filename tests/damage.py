"""Ways to damage a file, drawn with a seed: a broken disk, a stopped copy, an editor."""

import os
import random
from pathlib import Path

HARMS = {
    "flip": lambda draw, path, others: path.write_bytes(flipped(draw, path.read_bytes())),
    "truncate": lambda draw, path, others: os.truncate(path, draw.randrange(path.stat().st_size)),
    "zeros": lambda draw, path, others: path.write_bytes(zeroed(draw, path.read_bytes())),
    "garbage": lambda draw, path, others: path.write_bytes(draw.randbytes(path.stat().st_size)),
    "longer": lambda draw, path, others: path.write_bytes(path.read_bytes() + draw.randbytes(7)),
    "empty": lambda draw, path, others: path.write_bytes(b""),
    "missing": lambda draw, path, others: path.unlink(),
    "another": lambda draw, path, others: path.write_bytes(draw.choice(others).read_bytes()),
}
"""Name -> what is done to a file; ``others`` are the files of its folder."""


def flipped(draw: random.Random, content: bytes) -> bytes:
    """One bit is another."""
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zeroed(draw: random.Random, content: bytes) -> bytes:
    """A part is zeros, as after a power failure."""
    first = draw.randrange(len(content))
    length = draw.randint(1, len(content) - first)
    return content[:first] + bytes(length) + content[first + length :]


def harm(
    folder: Path, seed: int, pattern: str = "*", harms: tuple[str, ...] = tuple(HARMS)
) -> Path:
    """Damage one file of a folder, never in a way that leaves it as it was; the file."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    path = draw.choice(files)
    before = path.read_bytes()
    while path.is_file() and path.read_bytes() == before:
        HARMS[draw.choice(harms)](draw, path, files)
    return path
