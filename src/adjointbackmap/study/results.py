"""Numbers and arrays of each network in files beside each other: kept once, read for the page."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adjointbackmap.exactness.journal import differences
from adjointbackmap.files import disk
from adjointbackmap.files.checked import DamagedFile, compare, read_or_set_aside, set_aside, sha256_of, shortened
from adjointbackmap.study.published.columns import COLUMNS
from adjointbackmap.study.setup import read_json, write_json

ARRAYS = "arrays sha256"  # key of the checksum of the NPZ

Found = dict[str, Any]
Arrays = dict[str, np.ndarray]


def keep(path: Path, settings: Found, measure: Callable[[], tuple[Found, Arrays]]) -> None:
    """Write numbers with their settings as JSON, and arrays as NPZ beside it; what is there is never replaced.

    A damaged file is set aside, which is said, and both are made again.

    Args:
        path: The JSON.
        settings: What the numbers hang on, as JSON has it.
        measure: Gives numbers and arrays.

    Raises:
        ValueError: If the file holds results of other settings.
    """
    before = _whole(path)
    if before is not None:
        other = differences(before["settings"], settings)
        if other:
            msg = f"{path} must hold results of this run's settings. Got others ({other}): name another folder with --out."
            raise ValueError(msg)
        return
    found, arrays = measure()
    content = disk.npz(arrays)
    disk.write(path.with_suffix(".npz"), content)  # first: a run that is stopped leaves no numbers without arrays
    write_json(path, {"settings": settings, **found, ARRAYS: hashlib.sha256(content).hexdigest()})


def kept(folder: Path) -> Iterator[tuple[str, Found, Arrays]]:
    """Name, numbers and arrays of each network of a folder, in the order of the study.

    Raises:
        ValueError: If a file is damaged.
    """
    for path in (folder / f"{name}.json" for name in COLUMNS):
        if path.exists():
            found = read_json(path)
            yield path.stem, found, _arrays(path.with_suffix(".npz"), found)


def _whole(path: Path) -> Found | None:
    """The numbers that are there with their arrays; ``None`` where one of the two is missing, or damaged, which is said."""
    found = read_or_set_aside(path)
    arrays = path.with_suffix(".npz")
    if found is None or not arrays.exists():
        return None
    try:
        _arrays(arrays, found)
    except DamagedFile as error:
        set_aside(arrays, error)
        return None
    return found


def _arrays(path: Path, found: Found) -> Arrays:
    """The arrays of some numbers; results of older versions do not have their checksum, but that of each array.

    Raises:
        FileNotFoundError: If there are none.
        DamagedFile: If they are damaged, or those of other numbers.
    """
    advice = "run the same study again, which makes it anew"
    if not path.is_file():
        msg = f"{path} must be a file. Got none: {advice}."
        raise FileNotFoundError(msg)
    if ARRAYS in found:
        compare(sha256_of(path), found[ARRAYS], path, path.with_suffix(".json").name, advice)
    try:
        return dict(np.load(path, allow_pickle=False))
    except Exception as error:  # what a damaged ZIP file raises
        msg = f"{path} must hold arrays. It could not be read ({shortened(error)}): {advice}."
        raise DamagedFile(msg) from error


def run_words(name: str, found: Found) -> str:
    """Network, weights, image, class and the attack of experiment 2, for the paragraph of what was run."""
    settings, attack = found["settings"], found["settings"]["attack"]
    steps = ", ".join(f"{s:.4g}" for s in (attack["step"] if isinstance(attack["step"], list) else [attack["step"]]))
    return (
        f"{name} (weights {settings['weights sha256'][:8]}): image {settings['image'][:8]}, {found['classes'][found['label']]}; "
        f"{attack['iterations']} steps of {steps} in pixels from 0 to 1; seed {settings['seed']}"
    )
