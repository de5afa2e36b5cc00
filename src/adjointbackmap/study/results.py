"""Numbers and arrays of each network, kept in two files next to each other."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adjointbackmap import plots
from adjointbackmap.exactness.journal import setting_differences
from adjointbackmap.files import disk
from adjointbackmap.files.checked import (
    DamagedFile,
    compare,
    read_or_set_aside,
    set_aside,
    sha256_of,
    shortened,
)
from adjointbackmap.report.sections import Picture
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.setup import read_json, write_json

ARRAYS = "arrays sha256"  # key of the checksum of the NPZ file

Found = dict[str, Any]
Arrays = dict[str, np.ndarray]


def keep(path: Path, settings: Found, measure: Callable[[], tuple[Found, Arrays]]) -> None:
    """Compute numbers and arrays unless the files exist. Numbers go to JSON, arrays to NPZ.

    Existing results are not replaced. A damaged file is set aside with a message, and both files
    are made again.

    Args:
        path: Path of the JSON file.
        settings: Settings that identify the results, as JSON-compatible values.
        measure: Returns numbers and arrays.

    Raises:
        ValueError: If the file holds results of other settings.
    """
    before = _whole(path)
    if before is not None:
        other = setting_differences(before["settings"], settings)
        if other:
            msg = (
                f"{path} must hold results of this run's settings. "
                f"Got others ({other}): name another folder with --out."
            )
            raise ValueError(msg)
        return
    found, arrays = measure()
    content = disk.npz(arrays)
    # The arrays are written first: a stopped run then leaves no numbers without arrays.
    disk.write(path.with_suffix(".npz"), content)
    write_json(path, {"settings": settings, **found, ARRAYS: hashlib.sha256(content).hexdigest()})


def kept(folder: Path) -> Iterator[tuple[str, Found, Arrays]]:
    """Yield name, numbers and arrays of each network in a folder, in the order of the study.

    Raises:
        ValueError: If a file is damaged.
    """
    for path in (folder / f"{name}.json" for name in PUBLISHED_COLUMNS):
        if path.exists():
            found = read_json(path)
            yield path.stem, found, _arrays(path.with_suffix(".npz"), found)


def _whole(path: Path) -> Found | None:
    """The numbers if they and their arrays exist and are undamaged, otherwise ``None``.

    A damaged file is set aside with a message.
    """
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
    """Read the arrays that belong to some numbers.

    Results of older versions have no checksum of the file, only one of each array in it.

    Raises:
        FileNotFoundError: If there is no file of arrays.
        DamagedFile: If it is damaged, or belongs to other numbers.
    """
    advice = "run the same study again, which makes it anew"
    if not path.is_file():
        msg = f"{path} must be a file. Got none: {advice}."
        raise FileNotFoundError(msg)
    if ARRAYS in found:
        compare(sha256_of(path), found[ARRAYS], path, path.with_suffix(".json").name, advice)
    try:
        return dict(np.load(path, allow_pickle=False))
    except Exception as error:  # a damaged ZIP file raises various errors
        msg = f"{path} must hold arrays. It could not be read ({shortened(error)}): {advice}."
        raise DamagedFile(msg) from error


def save_picture(
    folder: Path, stem: str, drawing: plots.Drawing, caption: str, published: str = ""
) -> Picture:
    """Save a figure as PNG and SVG into the folder of the results.

    The caption is on the page, and not in the picture too.

    Args:
        folder: Folder of the results.
        stem: Path of the files in it, without suffix.
        drawing: The figure.
        caption: Caption on the page.
        published: The figures of the dissertation that it corresponds to.
    """
    drawing.figure.supxlabel("")
    caption = f"{caption[:1].upper()}{caption[1:].rstrip('.')}."
    path = plots.save(drawing, folder / f"{stem}.png", formats=("png", "svg"))
    return Picture(path.relative_to(folder), caption, published, heading_of(drawing))


def heading_of(drawing: plots.Drawing) -> str:
    """The heading of a figure in one line."""
    return " ".join(drawing.figure.get_suptitle().split())


def run_words(name: str, found: Found) -> str:
    """Describe a run of experiment 2 in words: network, weights, image, class and attack."""
    settings = found["settings"]
    attack = settings["attack"]
    step = attack["step"]
    steps = ", ".join(f"{s:.4g}" for s in (step if isinstance(step, list) else [step]))
    return (
        f"{name} (weights {settings['weights sha256'][:8]}): image {settings['image'][:8]}, "
        f"{found['classes'][found['label']]}; {attack['iterations']} steps of {steps} in pixels "
        f"from 0 to 1; seed {settings['seed']}"
    )
