"""Run all experiments one after the other, and collect their report sections."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adjointbackmap
from adjointbackmap.files.checked import read_or_set_aside, shortened
from adjointbackmap.files.disk import DiskFull, hold_folder, remove_partial
from adjointbackmap.machine import environment
from adjointbackmap.report.sections import Section
from adjointbackmap.study import attributions, origins
from adjointbackmap.study.adversarial import many, noise, scaled, strengths, targets
from adjointbackmap.study.adversarial.many_report import many_section
from adjointbackmap.study.adversarial.noise_report import noise_section
from adjointbackmap.study.adversarial.strengths_report import strengths_section
from adjointbackmap.study.adversarial.targets_report import targets_section
from adjointbackmap.study.judgement import run as judgement
from adjointbackmap.study.judgement.report import judgement_section
from adjointbackmap.study.pictures import run as pictures
from adjointbackmap.study.setup import Setup, read_json, write_json
from adjointbackmap.study.verification import run as verification
from adjointbackmap.study.verification.page import verification_section


@dataclass(frozen=True)
class Experiment:
    """An experiment of the dissertation.

    Attributes:
        compute: Computes the results of a run into its folder. It is called with the run, and with
            a function that takes the current task and its finished share.
        section: Builds the report section from the folder; ``None`` if there are no results.
    """

    compute: Callable[[Setup, Callable[[str, float], None]], None]
    section: Callable[[Path], Section | None]


EXPERIMENTS = {
    verification.KEY: Experiment(verification.compute_verification, verification_section),
    pictures.KEY: Experiment(pictures.compute_pictures, pictures.pictures_section),
    many.KEY: Experiment(many.compute_many, many_section),
    noise.KEY: Experiment(noise.compute_noise, noise_section),
    targets.KEY: Experiment(targets.compute_targets, targets_section),
    scaled.KEY: Experiment(scaled.compute_scaled, scaled.scaled_section),
    attributions.KEY: Experiment(
        attributions.compute_attributions, attributions.attributions_section
    ),
    origins.KEY: Experiment(origins.compute_origins, origins.origins_section),
    strengths.KEY: Experiment(strengths.compute_strengths, strengths_section),
    judgement.KEY: Experiment(judgement.compute_judgement, judgement_section),
}
"""Key -> experiment, in the order of the report."""

ABOUT = "study.json"  # the folder's record of its runs


def check_experiments(keys: Sequence[str] | None) -> list[str]:
    """The experiments to run, in their order. If ``keys`` is empty, they are all.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [key for key in keys or () if key not in EXPERIMENTS]
    if unknown:
        msg = (
            f"--only must be some of {', '.join(EXPERIMENTS)}. "
            f"Got {', '.join(unknown)}: leave it out for all of them."
        )
        raise ValueError(msg)
    return [key for key in EXPERIMENTS if not keys or key in keys]


def run_experiments(
    setup: Setup, keys: Sequence[str], report: Callable[[str, float], None]
) -> None:
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
        for folder in (setup.folder / key for key in EXPERIMENTS):
            if folder.is_dir():
                remove_partial(folder)
        _check_settings(setup)
        for key in keys:
            _write_about(setup, key)
            started = time.monotonic()
            try:
                EXPERIMENTS[key].compute(setup, report)
            except BaseException:
                with suppress(DiskFull):  # the first error already reports the full disk
                    _write_about(setup, key, time.monotonic() - started)
                raise
            _write_about(setup, key, time.monotonic() - started)


def _check_settings(setup: Setup) -> None:
    """Check that the results in the folder were computed with the settings of the run.

    Only results of the run's networks are checked.

    Raises:
        ValueError: If they were not.
    """
    kept = _read_about(setup.folder)["settings"]
    for name in setup.networks:
        computed = any(any(setup.folder.glob(f"*/{name}{end}")) for end in (".json", "-*"))
        if computed and kept.get(name, setup.settings) != setup.settings:
            msg = (
                f"{setup.folder} must have results of {name} for the same settings: "
                f"{setup.settings}. Got those for {kept[name]}: name another folder with --out."
            )
            raise ValueError(msg)


def _read_about(folder: Path) -> dict[str, Any]:
    """The folder's record of its runs so far."""
    return read_or_set_aside(folder / ABOUT) or {"settings": {}, "seconds": {}}


def _write_about(setup: Setup, key: str, seconds: float = 0.0) -> None:
    """Add an experiment to the folder's record of its runs."""
    before = _read_about(setup.folder)
    total = round(before["seconds"].get(key, 0.0) + seconds, 1)
    now = {
        "version": adjointbackmap.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "settings": before["settings"] | dict.fromkeys(setup.networks, setup.settings),
        "seconds": {**before["seconds"], key: total},
    }
    write_json(setup.folder / ABOUT, now)


def about(folder: Path) -> dict[str, Any]:
    """Read the folder's record of its runs.

    Raises:
        ValueError: If it holds no results of the study.
    """
    if not (folder / ABOUT).is_file():
        msg = (
            "The folder must hold the results of adjointbackmap study all. "
            f"Got {folder}, which has no {ABOUT}."
        )
        raise ValueError(msg)
    return read_json(folder / ABOUT)


def sections(folder: Path) -> list[Section]:
    """Build the report section of each experiment from its results, and draw its figures again.

    Raises:
        ValueError: If results are damaged, or not those of an experiment.
    """
    found = []
    for key, experiment in EXPERIMENTS.items():
        try:
            found.append(experiment.section(folder))
        # Results of older versions may be damaged unnoticed: they have no checksum.
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {shortened(error)}"
            msg = (
                f"{folder / key} must hold results of study all. "
                f"They could not be read ({reason}): run it again elsewhere."
            )
            raise ValueError(msg) from error
    return [section for section in found if section is not None]
