"""Run all experiments one after the other, and collect their report sections."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import adjointbackmap
from adjointbackmap.files.checked import read_or_set_aside, shortened
from adjointbackmap.files.disk import DiskFull, hold_folder, remove_partial
from adjointbackmap.machine import environment
from adjointbackmap.report.sections import Section
from adjointbackmap.study import attributions
from adjointbackmap.study.adversarial import many, noise, scaled, targets
from adjointbackmap.study.pictures import run as pictures
from adjointbackmap.study.setup import Setup, read_json, write_json
from adjointbackmap.study.verification import page
from adjointbackmap.study.verification import run as verification

EXPERIMENTS = {
    module.KEY: module for module in (page, pictures, many, noise, targets, scaled, attributions)
}
"""Key -> the module with ``section``, which reports the results.

The module also has ``compute``, which produces them. For ``page``, ``verification`` has it.
"""

ABOUT = "study.json"


def check_experiments(keys: Sequence[str] | None) -> list[str]:
    """The experiments to run, in their order. If ``keys`` is empty, they are all.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [key for key in keys or () if key not in EXPERIMENTS]
    if unknown:
        msg = f"--only must be some of {', '.join(EXPERIMENTS)}. Got {', '.join(unknown)}: leave it out for all of them."
        raise ValueError(msg)
    return [key for key in EXPERIMENTS if not keys or key in keys]


def run(setup: Setup, keys: Sequence[str], report: Callable[[str, float], None]) -> None:
    """Run experiments. Results that the folder already has are not computed again.

    Args:
        setup: Networks, images and folder.
        keys: Which experiments, see :func:`check_experiments`.
        report: Called with the current task and its finished share.

    Raises:
        ValueError: If the folder has results of other settings for a network of the run.
        BlockingIOError: If another process writes to the folder.
    """
    with hold_folder(setup.folder):
        for folder in (setup.folder / key for key in EXPERIMENTS if (setup.folder / key).is_dir()):
            remove_partial(folder)
        _check_settings(setup)
        for key in keys:
            _tell(setup, key)
            started = time.monotonic()
            try:
                (verification if key == verification.KEY else EXPERIMENTS[key]).compute(
                    setup, report
                )
            except BaseException:
                with suppress(DiskFull):  # the first error already reports the full disk
                    _tell(setup, key, time.monotonic() - started)
                raise
            _tell(setup, key, time.monotonic() - started)


def _check_settings(setup: Setup) -> None:
    """Check that the results in the folder were computed with the settings of the run.

    Only results of the run's networks are checked.

    Raises:
        ValueError: If it was not.
    """
    kept = _before(setup.folder)["settings"]
    for name in setup.networks:
        computed = any(any(setup.folder.glob(f"*/{name}{end}")) for end in (".json", "-*"))
        if computed and kept.get(name, setup.settings) != setup.settings:
            msg = f"{setup.folder} must have results of {name} for the same settings: {setup.settings}. "
            msg += f"Got those for {kept[name]}: name another folder with --out."
            raise ValueError(msg)


def _before(folder: Path) -> dict[str, Any]:
    """The folder's record of its runs so far."""
    return read_or_set_aside(folder / ABOUT) or {"settings": {}, "seconds": {}}


def _tell(setup: Setup, key: str, seconds: float = 0.0) -> None:
    """Add an experiment to the folder's record of its runs."""
    before = _before(setup.folder)
    write_json(
        setup.folder / ABOUT,
        {
            "version": adjointbackmap.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "environment": environment(),
            "settings": before["settings"] | dict.fromkeys(setup.networks, setup.settings),
            "seconds": {
                **before["seconds"],
                key: round(before["seconds"].get(key, 0.0) + seconds, 1),
            },
        },
    )


def about(folder: Path) -> dict[str, Any]:
    """Read the folder's record of its runs.

    Raises:
        ValueError: If it holds no results of the study.
    """
    if not (folder / ABOUT).is_file():
        msg = f"The folder must hold the results of adjointbackmap study all. Got {folder}, which has no {ABOUT}."
        raise ValueError(msg)
    return read_json(folder / ABOUT)


def sections(folder: Path) -> list[Section]:
    """Build the report section of each experiment from its results, and draw its figures again.

    Raises:
        ValueError: If results are damaged, or not those of an experiment.
    """
    found = []
    for key, module in EXPERIMENTS.items():
        try:
            found.append(module.section(folder))
        except (
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
        ) as error:  # of an older version, which has no checksum
            reason = f"{type(error).__name__}: {shortened(error)}"
            msg = f"{folder / key} must hold results of study all. They could not be read ({reason}): run it again elsewhere."
            raise ValueError(msg) from error
    return [section for section in found if section is not None]
