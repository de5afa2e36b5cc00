"""The file of a verification's results."""

from pathlib import Path
from typing import Any

from adjointbackmap.files.checked import DamagedFile, read_or_set_aside, read_sealed
from adjointbackmap.machine import environment
from adjointbackmap.study.setup import write_json
from adjointbackmap.study.verification.tally import Tally

FORMAT = 2  # raised when the content of the file changes
RESULTS = "verification.json"


class Results:
    """The results so far, in a file that is replaced atomically.

    Attributes:
        path: The file.
        found: ``format``, ``environments`` and ``networks``.
        place: Index of this run's environment in ``environments``.

    Raises:
        ValueError: If the file is not one of this experiment.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.path = folder / RESULTS
        empty: dict[str, Any] = {"format": FORMAT, "environments": [], "networks": {}}
        self.found = _continued(self.path) or empty
        here = environment(device)
        if here not in self.found["environments"]:
            self.found["environments"].append(here)
        self.place = self.found["environments"].index(here)

    def network(self, name: str, weights: str) -> dict[str, Any]:
        """The entry of a network. An empty entry is added if there is none.

        Raises:
            ValueError: If the entry has results of other weights.
        """
        entry = self.found["networks"].setdefault(name, {"weights sha256": weights, "runs": {}})
        if entry["weights sha256"] != weights:
            msg = (
                f"{self.path} must have results of the weights {weights[:8]} of {name}. "
                f"Got those of {entry['weights sha256'][:8]}: name another folder with --out."
            )
            raise ValueError(msg)
        return entry

    def write(self) -> None:
        """Replace the file."""
        write_json(self.path, self.found)


def read_results(path: Path) -> dict[str, Any]:
    """Read the results from a file.

    Raises:
        ValueError: If the file has no results of this experiment.
    """
    try:
        return _of_this_experiment(read_sealed(path, "make it again"), path)
    except FileNotFoundError as error:
        raise ValueError(_no_results(path)) from error


def _continued(path: Path) -> dict[str, Any] | None:
    """The results that a run continues.

    A damaged file is set aside. Its results are then computed again from the finished images.

    Raises:
        ValueError: If the file is not one of this experiment.
    """
    try:
        found = read_or_set_aside(path, "format")
    except DamagedFile as error:
        raise ValueError(_no_results(path)) from error
    return found and _of_this_experiment(found, path)


def _of_this_experiment(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the results if they are of this experiment.

    Raises:
        ValueError: If they are not.
    """
    if found.get("format") != FORMAT or "networks" not in found:
        raise ValueError(_no_results(path))
    try:
        for entry in found["networks"].values():
            for parts in entry["runs"].values():
                for part in parts.values():
                    for layer in part["layers"].values():
                        Tally.from_dict(layer)
    # Results of older versions may be damaged unnoticed: they have no checksum.
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(_no_results(path)) from error
    return found


def _no_results(path: Path) -> str:
    return (
        "Results must be a file that study verification wrote. "
        f"Got {path}: delete it or name another."
    )
