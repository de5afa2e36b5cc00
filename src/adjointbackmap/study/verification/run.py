"""Verify every unit of every layer of the study's networks, as in [Wan2022, Tables 3.3 and 3.4]."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjointbackmap import data, models
from adjointbackmap.engine.network import Network
from adjointbackmap.exactness.checks import Terms
from adjointbackmap.exactness.journal import Record
from adjointbackmap.exactness.layer_check import LayerCheck, checks_of
from adjointbackmap.exactness.verification import Checks, fits, job_of, terms_of, verified
from adjointbackmap.files.checked import DamagedFile, read_or_set_aside, read_sealed
from adjointbackmap.files.disk import hold_folder
from adjointbackmap.machine import environment
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.sources import NetworkOptions, Subject, load_subject
from adjointbackmap.study.published.columns import COLUMNS
from adjointbackmap.study.setup import SCALE, Setup, write_json
from adjointbackmap.study.verification.summation import BATCH, orders, outside_alone, products
from adjointbackmap.study.verification.tally import Tally
from adjointbackmap.training.loop import accuracy

KEY = "verification"
FORMAT = 2
RESULTS = "verification.json"
ARITHMETIC = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    # The same images as in the next run. Finished images come from the file of "float32".
    "float32 again": (torch.float32, torch.float32),
    "float32, sums in float64": (torch.float32, torch.float64),
}
"""Name -> precision of values and hyperplanes, then precision of the inner products."""

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Counts:
    """How many test images to use, taken in the order of their hashes.

    ``None`` means the number of the study.

    Attributes:
        images: In float32. The default is all for VGG7 and 1,000 for ResNet20.
        images_float64: In float64, and for the two runs that compare sums in float32 and float64.
            The default is 200 for VGG7 and 50 for ResNet20.
        images_fc: For the layer ``fc``. The default is all.
    """

    images: int | None = None
    images_float64: int | None = None
    images_fc: int | None = None

    def check(self, available: int) -> None:
        """Check that the numbers do not exceed the available test images.

        Raises:
            ValueError: If one is less than 1, or more than there are.
        """
        for count in (self.images, self.images_float64, self.images_fc):
            if count is not None and not 0 < count <= available:
                msg = f"The number of images must be from 1 to {available}. Got {count}: leave it out for that of the study."
                raise ValueError(msg)

    def of(self, name: str, arithmetic: str) -> int:
        """Number of images for the convolutions of a network."""
        small = models.architecture(name).startswith("vgg7")
        if arithmetic == "float32":
            return self.images or (10_000 if small else 1_000)
        return self.images_float64 or (200 if small else 50)


WANTED = Counts()


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
        self.found = _before(self.path) or empty
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
            msg = f"{self.path} must have results of the weights {weights[:8]} of {name}. Got those of "
            msg += f"{entry['weights sha256'][:8]}: name another folder with --out."
            raise ValueError(msg)
        return entry

    def write(self) -> None:
        """Replace the file."""
        write_json(self.path, self.found)


def read(path: Path) -> dict[str, Any]:
    """Read the results from a file.

    Raises:
        ValueError: If the file has no results of this experiment.
    """
    try:
        return _of_this_experiment(read_sealed(path, "make it again"), path)
    except FileNotFoundError as error:
        raise ValueError(_no_results(path)) from error


def _before(path: Path) -> dict[str, Any] | None:
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
            for part in (part for parts in entry["runs"].values() for part in parts.values()):
                for layer in part["layers"].values():
                    Tally.from_dict(layer)
    except (
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # of an older version, which has no checksum
        raise ValueError(_no_results(path)) from error
    return found


def _no_results(path: Path) -> str:
    return f"Results must be a file that study verification wrote. Got {path}: delete it or name another."


def check_networks(names: Sequence[str] | None) -> list[str]:
    """The networks to verify, in the order of the study.

    If ``names`` is empty, all shipped networks with published numbers are verified.

    Raises:
        ValueError: If a network is not shipped, or has no published numbers.
    """
    able = [name for name in COLUMNS if name in models.names()]
    unknown = [name for name in names or () if name not in able]
    if unknown:
        msg = f"--network must be one of {', '.join(able)}. Got {', '.join(unknown)}: leave it out for all of them."
        raise ValueError(msg)
    return [name for name in able if not names or name in names]


def run(
    folder: Path,
    names: Sequence[str],
    counts: Counts = WANTED,
    root: Path | None = None,
    workers: int | None = None,
    report: Report = lambda what, share: None,
    sample: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Verify networks.

    Images that are finished in a file of the folder are not computed again. A later run only adds
    images.

    Args:
        folder: Folder for finished images and results.
        names: Shipped networks, see :func:`check_networks`.
        counts: Numbers of images.
        root: Folder of the official binary files.
        workers: Number of processes that share the images of the convolutions.
        report: Called with the current task and its finished share.
        sample: Whether to use only the 200 test images of CIFAR-10 that ship.
        device: ``"cpu"`` or ``"cuda"``, where everything is computed.

    Returns:
        The content of ``verification.json`` in the folder after the run.

    Raises:
        ValueError: If there are fewer images than asked for, or a file of the folder is that of
            another job.
        OSError: If another process writes to the folder, or the disk is full. Finished images are
            kept.
    """
    with hold_folder(folder):
        results = Results(folder, device)
        for name in names:
            dataset = models.card(name)["dataset"]
            images = (
                data.sample()
                if sample and dataset == "cifar10"
                else data.load(dataset, "test", root)
            ).by_hash()
            counts.check(len(images))
            _Study(name, images, results, counts, workers, report, device).run()
        results.write()
        return read(results.path)


def compute(setup: Setup, report: Report) -> None:
    """Verify the networks of a run.

    The run's number of images is used in float32, and a tenth of it in float64.
    """
    counts = Counts(setup.images, max(1, setup.images // 10), setup.images)
    run(
        setup.folder / KEY,
        check_networks(setup.networks),
        counts,
        setup.root,
        None,
        report,
        setup.sample,
    )


@dataclass(frozen=True)
class _Study:
    """The verification runs of one network."""

    name: str
    images: data.Images
    results: Results
    counts: Counts
    workers: int | None
    report: Report
    device: str

    @cached_property
    def subject(self) -> Subject:
        return load_subject(NetworkOptions(self.name, fold=True))

    @cached_property
    def network(self) -> Network:
        return self.subject.trace(self.device)

    @cached_property
    def entry(self) -> dict[str, Any]:
        return self.results.network(self.name, self.network.weights_hash())

    def layers(self, part: str) -> list[str]:
        """Names of all convolutions except the first, or of the fully connected layers."""
        kernels = [layer for layer in self.network.layers.values() if layer.kernel is not None]
        return [layer.name for layer in kernels[1:] if ("RM0" in layer.modes) == (part == "fc")]

    def run(self) -> None:
        """Compute accuracy, errors of every unit in each arithmetic, and the summation orders."""
        if self.entry.get("accuracy", {}).get("images") != len(self.images):
            self.report(f"{self.name}: accuracy", 0.0)
            self.entry["accuracy"] = accuracies(
                load_subject(NetworkOptions(self.name)),
                self.subject,
                self.images,
                self.device,
            )
            self.results.write()
        for arithmetic in ARITHMETIC:
            self.verify(arithmetic, "fc", self.counts.images_fc or len(self.images))
        for arithmetic in ARITHMETIC:
            self.verify(arithmetic, "convolutions", self.counts.of(self.name, arithmetic))
        self.entry["orders"] = self.orders()
        self.entry["outside alone"] = self.alone()
        self.results.write()

    def verify(self, arithmetic: str, part: str, asked: int) -> None:
        """Verify every unit of the convolutions, or every output of ``fc``.

        Only images that the results do not count yet are verified.
        """
        nothing = {"images": 0, "seconds": 0.0, "environments": [], "layers": {}}
        run = self.entry["runs"].setdefault(arithmetic, {}).setdefault(part, nothing)
        first = run.get("first", run)["images"]
        if asked <= first:
            return
        chosen = self.images[first:asked]
        (dtype, accumulate) = ARITHMETIC[arithmetic]
        terms = terms_of(self.network, self.layers(part), False, SCALE, dtype, accumulate)
        x = self.subject.prepare(chosen.unit_interval()).to(self.device, dtype)
        precision = "-".join(
            str(d).removeprefix("torch.") for d in dict.fromkeys((dtype, accumulate))
        )
        keep = self.results.path.parent / f"{self.name}-{part}-{precision}.jsonl"
        what = f"{self.name}, {part}, {arithmetic}"
        arguments = (
            self.network,
            x,
            terms,
            chosen.hashes,
            lambda share: self.report(what, share),
            keep,
        )
        with self._kept(run) as tallies:
            for _, checks in (
                outputs_verified(*arguments) if part == "fc" else verified(*arguments, self.workers)
            ):
                for name, check in checks.items():
                    tallies.setdefault(name, Tally(LayerCheck(name))).add(check)
        run.pop("first", None)
        self.results.write()

    def orders(self) -> dict[str, Any]:
        """For each convolution, sum the terms of its worst float32 unit in several ways."""
        images = dict(zip(self.images.hashes, self.images.pixels, strict=True))
        found = {}
        for name, layer in self.entry["runs"]["float32"]["convolutions"]["layers"].items():
            image, unit = layer["check"]["worst"]
            x = self.subject.prepare(images[image].float() / 255).to(self.device)
            found[name] = orders(self.network, x, (image, tuple(unit)), name, SCALE)
        return found

    def alone(self) -> dict[str, int]:
        """Count the units with an error above 1 % from the network's own rounding alone.

        The images are those of the runs that compare sums in float32 and float64.
        """
        found = {}
        for part, run in self.entry["runs"]["float32 again"].items():
            x = self.subject.prepare(self.images[: run["images"]].unit_interval()).to(self.device)
            found.update(outside_alone(self.network, x, self.layers(part)))
        return found

    @contextmanager
    def _kept(self, run: dict[str, Any]) -> Iterator[dict[str, Tally]]:
        """Tallies that continue from the first images of a run.

        They are written into the run at the end, also if it is stopped. A stopped run may have
        counted any of its images. Therefore the run also keeps the tallies of the first images
        until it is finished.
        """
        first = run.setdefault(
            "first",
            {key: run[key] for key in ("images", "environments", "layers")},
        )
        started = time.monotonic()
        tallies = {name: Tally.from_dict(entry) for name, entry in first["layers"].items()}
        try:
            yield tallies
        finally:
            if tallies:
                run["layers"] = {name: tally.to_dict() for name, tally in tallies.items()}
                run["images"] = next(iter(tallies.values())).images
                run["environments"] = sorted({*first["environments"], self.results.place})
                run["seconds"] = round(run["seconds"] + time.monotonic() - started, 1)
                self.results.write()


def accuracies(
    trained: Subject,
    folded: Subject,
    images: data.Images,
    device: str = "cpu",
) -> dict[str, int | float]:
    """Accuracy of a network and of its folded version [Wan2022, section 3.5.1.2]."""
    pair = {"trained": trained, "folded": folded}
    shares = {key: accuracy(s.module.to(device), images, s.prepare) for key, s in pair.items()}
    return {"images": len(images), **shares}


def outputs_verified(
    network: Network,
    x: Tensor,
    terms: Terms,
    names: Sequence[str],
    report: Callable[[float], None],
    keep: Path,
) -> Iterator[tuple[str, Checks]]:
    """Yield the name and the errors of each image for fully connected layers.

    Their RM0 hyperplanes are computed for many images at once.

    Args:
        network: Traced network.
        x: Batch.
        terms: What is verified.
        names: Name of each image.
        report: Called with the finished share.
        keep: File of finished images.
    """
    record = Record(keep, {**job_of(network, terms), "mode": "RM0"}, fits(network, terms))
    kept = {
        name: {layer: LayerCheck.from_dict(entry) for layer, entry in found.items()}
        for name, found in record.results()
    }
    yield from ((name, kept[name]) for name in names if name in kept)
    missing = [n for n, name in enumerate(names) if name not in kept]
    for start in range(0, len(missing), BATCH):
        report(1 - (len(missing) - start) / len(names))
        part = missing[start : start + BATCH]
        for name, checks in _outputs(network, x[part], terms, [names[n] for n in part]):
            record.append(name, {layer: check.to_dict() for layer, check in checks.items()})
            yield name, checks
    report(1.0)


def _outputs(
    network: Network,
    x: Tensor,
    terms: Terms,
    names: Sequence[str],
) -> list[tuple[str, Checks]]:
    """Names and errors of the images of a batch."""
    found: list[tuple[str, Checks]] = [(name, {}) for name in names]
    for layer in terms.layers:
        planes = hyperplanes(
            network,
            x,
            layer,
            "RM0",
            None,
            terms.own_bias,
            terms.scale,
            terms.dtype,
        )
        parts = products(planes, terms.accumulate)
        sums = parts.sum(-1)
        magnitudes = parts.abs().sum(-1)
        for (_, checks), check in zip(
            found,
            checks_of(layer, planes.value, sums, magnitudes, names),
            strict=True,
        ):
            checks[layer] = check
    return found
