"""Numbers and arrays of each network in files beside each other: kept once, read for the page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adjointbackmap import disk
from adjointbackmap.records import differences
from adjointbackmap.study.published import COLUMNS
from adjointbackmap.study.setup import read_json, write_json

Found = dict[str, Any]
Arrays = dict[str, np.ndarray]


def keep(path: Path, settings: Found, measure: Callable[[], tuple[Found, Arrays]]) -> None:
    """Write numbers with their settings as JSON, and arrays as NPZ beside it; what is there is never replaced.

    Args:
        path: The JSON.
        settings: What the numbers hang on, as JSON has it.
        measure: Gives numbers and arrays.

    Raises:
        ValueError: If the file holds results of other settings.
    """
    if path.exists():
        other = differences(read_json(path)["settings"], settings)
        if other:
            msg = f"{path} must hold results of this run's settings. Got others ({other}): name another folder with --out."
            raise ValueError(msg)
        return
    found, arrays = measure()
    disk.write(path.with_suffix(".npz"), disk.npz(arrays))  # first: a run that is stopped leaves no numbers without arrays
    write_json(path, {"settings": settings, **found})


def kept(folder: Path) -> Iterator[tuple[str, Found, Arrays]]:
    """Name, numbers and arrays of each network of a folder, in the order of the study."""
    for path in (folder / f"{name}.json" for name in COLUMNS):
        if path.exists():
            yield path.stem, read_json(path), dict(np.load(path.with_suffix(".npz")))


def run_words(name: str, found: Found) -> str:
    """Network, weights, image, class and the attack of experiment 2, for the paragraph of what was run."""
    settings, attack = found["settings"], found["settings"]["attack"]
    steps = ", ".join(f"{s:.4g}" for s in (attack["step"] if isinstance(attack["step"], list) else [attack["step"]]))
    return (
        f"{name} (weights {settings['weights sha256'][:8]}): image {settings['image'][:8]}, {found['classes'][found['label']]}; "
        f"{attack['iterations']} steps of {steps} in pixels from 0 to 1; seed {settings['seed']}"
    )
