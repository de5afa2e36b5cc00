"""A benchmark stored in a file. Finished entries are kept, so that a stopped run can continue."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adjointbackmap.benchmark.entries import Measure, entries, warm_up
from adjointbackmap.benchmark.fresh import package_of
from adjointbackmap.benchmark.ways import QUICK, Settings
from adjointbackmap.files.checked import DamagedFile, read_or_set_aside, sealed_text
from adjointbackmap.files.disk import hold_file, write
from adjointbackmap.machine import environment
from adjointbackmap.report.sheets import PagePlace

FORMAT = 2  # of the file; raised when its content changes
SPEED_PLACE = PagePlace("<!-- speed: written by adjointbackmap bench -->", "<!-- speed: end -->")


def settings_for(quick: bool, repeats: int | None) -> Settings:
    """The settings of a quick look or of a full run.

    Raises:
        ValueError: If the number of repeats is less than one.
    """
    chosen = QUICK if quick else Settings()
    if repeats is not None and repeats < 1:
        msg = f"--repeats must be at least 1. Got {repeats}."
        raise ValueError(msg)
    return replace(chosen, repeats=repeats or chosen.repeats)


def read_or_begin(out: Path, settings: Settings) -> dict[str, Any]:
    """The content of a file, or an empty result if there is none.

    Raises:
        ValueError: If the file is not one of this benchmark, or was measured elsewhere or with
            other settings.
    """
    here = {"format": FORMAT, "quick": settings.quick, "environment": environment()}
    msg = (
        "--out must be a file of this benchmark, or a new one. "
        f"Got {out}: delete it or name another file."
    )
    try:
        found = read_or_set_aside(out, "format")
    except DamagedFile as error:
        raise ValueError(msg) from error
    if found is None:
        return {**here, "entries": {}}
    if found.get("format") != FORMAT:
        raise ValueError(msg)
    other = [key for key in here if found.get(key) != here[key]]
    if other:
        msg = (
            f"--out must be measured with the same {other[0]}. "
            f"Got {out} with another: delete it or name another file."
        )
        raise ValueError(msg)
    return found


def run_benchmark(
    out: Path,
    only: str = "",
    quick: bool = False,
    repeats: int | None = None,
    report: Callable[[str, float], None] | None = None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Measure every entry that the file lacks.

    Args:
        out: The file.
        only: Part of the names of the entries to measure, such as ``vgg7`` or ``conv1``.
        quick: Whether to measure only a few entries, with one run each.
        repeats: Number of runs; the median of their times is taken.
        report: Called with the name of the next entry and the finished share.
        before: Worktree of an older commit to compare with.

    Returns:
        The content of the file: ``format``, ``quick``, ``environment`` and ``entries``.

    Raises:
        ValueError: If no entry has such a name, the file is not one of this benchmark, or
            ``before`` holds no package.
        BlockingIOError: If another process writes to the file.
    """
    settings = settings_for(quick, repeats)
    if before is not None:
        package_of(before)
        settings = replace(settings, before=str(before))
    order = entries(settings)
    if not any(only in name for name in order):
        some = ", ".join(list(order)[:3])
        msg = f"--only must be part of an entry's name, such as {some}. Got {only!r}."
        raise ValueError(msg)
    with hold_file(out):
        return _with_missing(out, settings, order, only, report)


def _with_missing(
    out: Path,
    settings: Settings,
    order: dict[str, Measure],
    only: str,
    report: Callable[[str, float], None] | None,
) -> dict[str, Any]:
    """Measure the entries that the file lacks. No other process writes to it."""
    found = read_or_begin(out, settings)
    wanted = [name for name in order if only in name and name not in found["entries"]]
    run = time.strftime("%Y-%m-%d %H:%M:%S")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' libraries warn
        if wanted:
            warm_up(settings)
        for i, name in enumerate(wanted):
            if report:
                report(name, i / len(wanted))
            entry = {**entry_of(order[name], settings), "run": run}
            found["entries"] = in_order({**found["entries"], name: entry}, order)
            write(out, sealed_text(found))
    return found


def in_order(
    kept: dict[str, dict[str, Any]], order: dict[str, Measure]
) -> dict[str, dict[str, Any]]:
    """Entries in the order of the tables; those of other settings come last."""
    names = [name for name in order if name in kept]
    names += [name for name in kept if name not in order]
    return {name: kept[name] for name in names}


def entry_of(measure: Measure, settings: Settings) -> dict[str, Any]:
    """One entry, with its settings, the machine's load before it, and its duration in seconds."""
    load = os.getloadavg()[0]
    started = time.perf_counter()
    entry = {**measure(settings), "repeats": settings.repeats, "load": load}
    return {**entry, "took": round(time.perf_counter() - started, 1)}
