"""Works in fresh processes: with an older commit of the package, and on a busy machine."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import adjointbackmap as abm
from adjointbackmap.benchmark import works
from adjointbackmap.benchmark.ways import Settings

ROUNDS = 3  # fresh processes of each way, one after the other in turn
NOW = Path(abm.__file__).parent.parent  # the folder with this package


def package_of(folder: Path) -> Path:
    """The folder with the package in a worktree of a commit.

    Raises:
        ValueError: If there is none.
    """
    found = folder / "src"
    if not (found / abm.__name__ / "__init__.py").is_file():
        msg = (
            "--before must be a worktree of an older commit, with src/adjointbackmap. "
            f"Got {folder}: make one with git worktree add."
        )
        raise ValueError(msg)
    return found.resolve()


def fresh(name: str, source: Path, threads: int, repeats: int) -> float:
    """Seconds of a work in a fresh process.

    Args:
        name: The work, see :func:`adjointbackmap.benchmark.works.work`.
        source: The folder with the package.
        threads: Number of processor threads.
        repeats: Number of runs; the median is taken.

    Raises:
        RuntimeError: If the process fails, or takes the package from another folder.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
    # -P: the folder of the script, which holds the modules of the benchmark, is not searched
    command = [sys.executable, "-P", works.__file__, name, str(repeats)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        reason = " ".join(run.stderr.strip().splitlines()[-1:])
        msg = f"The work {name} must run with the package in {source}. Got {reason}."
        raise RuntimeError(msg)
    found = json.loads(run.stdout.splitlines()[-1])
    if not Path(found["package"]).is_relative_to(source):
        msg = f"The package must be that in {source}. Got {found['package']}: unset PYTHONPATH."
        raise RuntimeError(msg)
    return float(found["seconds"])


def before_entry(name: str, settings: Settings) -> dict[str, Any]:
    """A work of the commit before and of this one, in turn, each in fresh processes."""
    sources = {"the commit before": package_of(Path(settings.before)), "now": NOW}
    threads = torch.get_num_threads()
    calls = {title: (name, source, threads) for title, source in sources.items()}
    return in_turn(calls, settings.repeats)


def busy_entry(settings: Settings) -> dict[str, Any]:
    """All layers of VGG7 with two threads and with one, while one process per core spins."""
    counts = {"two threads": 2, "one thread": 1}
    calls = {title: ("vgg7/layers", NOW, count) for title, count in counts.items()}
    with busy_cores():
        return in_turn(calls, settings.repeats)


def in_turn(calls: dict[str, tuple[str, Path, int]], repeats: int) -> dict[str, Any]:
    """The median times of some works in fresh processes, in turn.

    Args:
        calls: Title -> work, folder and threads.
        repeats: Number of runs of each process.
    """
    times: dict[str, list[float]] = {title: [] for title in calls}
    for _ in range(ROUNDS):
        for title, call in calls.items():
            times[title].append(fresh(*call, repeats))
    ways = {
        title: {"seconds": statistics.median(t), "fastest": min(t), "runs": len(t), "mib": None}
        for title, t in times.items()
    }
    return {"ways": ways, "pair": list(calls)}


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process per core that computes without end."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
